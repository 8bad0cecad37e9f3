"""Evaluation: how accurate, how sparse and how fast a model is under each setting."""

from __future__ import annotations

from hf_sparse_attention.evaluation.runner import evaluate
from hf_sparse_attention.evaluation.speed import benchmark

__all__ = ["benchmark", "evaluate"]
