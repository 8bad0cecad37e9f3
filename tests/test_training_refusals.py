"""What a training run under sparsity refuses, before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from training_runs import bsfa, model, ramp, trainer

from hf_sparse_attention import SparseAttentionConfig, set_sparse_attention
from hf_sparse_attention.fingerprint import ModelFingerprint
from hf_sparse_attention.thresholds import Thresholds
from hf_sparse_attention.training import Schedule, SparseAttentionCallback


def plain() -> Any:
    return tiny_models.llama()


def uncalibrated() -> Any:
    return model(fits={}, target_sparsity=None)


def with_dropout() -> Any:
    made = model()
    made.model.layers[0].self_attn.attention_dropout = 0.1
    return made


def of_another_model() -> SparseAttentionConfig:
    config = bsfa()
    assert config.tables is not None
    fingerprint = ModelFingerprint.of(tiny_models.llama_mqa().config)
    tables = Thresholds(
        config.tables.tensors, config.tables.geometries, config.levels, fingerprint=fingerprint
    )
    return SparseAttentionConfig(method="bsfa", tables=tables)


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (plain, {}, "expected attn_implementation 'blasst' or 'bsfa', got 'sdpa'"),
        (model, {"schedule": Schedule(ramp_steps=9)}, "the run's 6 steps, got"),
        (model, {"config": bsfa()}, "expected settings for 'blasst'.*got some for 'bsfa'"),
        (model, {"level": 2}, "blasst: expected target_sparsity or .* got level"),
        (model, {"exclude_layers": [7]}, r"expected numbers among \[0, 1\], got \[7\]"),
        (with_dropout, {}, "attention_dropout: expected 0.0.*got 0.1"),
        (model, {"calibration_data": ["some text"]}, "tokenizer"),
        (uncalibrated, {"target_sparsity": 0.5}, "expected a fit .*calibrate"),
    ],
    ids=[
        "not-ours",
        "too-long",
        "methods",
        "goal",
        "layer",
        "dropout",
        "tokenizer",
        "uncalibrated",
    ],
)
def test_bad_runs_end_before_the_first_step(
    made: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = trainer(tmp_path, made(), ramp(**options))
    before = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises((ValueError, TypeError), match=message):
        run.train()
    assert run.state.global_step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected exactly one of .*, got none"),
        ({"level": 2, "target_sparsity": 0.5}, "got target_sparsity, level"),
        ({"target_sparsity": 1.0}, r"target_sparsity: expected values in \[0, 1\), got 1.0"),
        ({"target_sparsity": {"prefil": 0.5}}, "expected phases .* got .*'prefil'"),
        ({"threshold_scale_factor": -1}, "threshold_scale_factor: expected values"),
        ({"level": 0}, "level: expected a positive integer, got 0"),
        ({"level": 2, "schedule": "exponential"}, "schedule: expected one of"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseAttentionCallback(**options)


def test_thresholds_of_another_model_are_refused(tmp_path: Path) -> None:
    made = model()
    set_sparse_attention(made, bsfa())
    with pytest.raises(ValueError, match="expected thresholds of this model, got another's"):
        trainer(tmp_path, made, ramp(level=2, config=of_another_model())).train()
