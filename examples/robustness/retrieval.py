"""Does training under sparsity make a model robust to it? The small retrieval model.

    python examples/robustness/retrieval.py --out benchmarks/results/robustness_retrieval.json

Each seed fine-tunes the checkpoint twice, on the same sequences in the same order: dense (the fair
control) and with `SparseAttentionCallback`, whose lambda rises over the run. Then the checkpoint
and both models answer the same held-out questions at rising lambda.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import Rows, Scores, experiment, parser
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

HOME = Path(__file__).parents[1] / "retrieval"
sys.path.insert(0, str(HOME))
import tasks  # noqa: E402


def load() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        HOME / "checkpoint", dtype=torch.float32, attn_implementation="blasst"
    )


def sequences(options: argparse.Namespace, seed: int) -> Rows:
    """Training sequences, the tasks in turn."""
    rng = np.random.default_rng([seed, 2])
    made = tasks.batch(rng, list(tasks.TASKS), options.length, options.steps * options.batch)
    return [
        {"input_ids": ids, "labels": labels}
        for ids, labels in zip(made.input_ids, made.labels, strict=True)
    ]


def score(options: argparse.Namespace, model: nn.Module) -> Scores:
    """By task: accuracy, and the cross entropy of the answers in nats."""
    scores: Scores = {"accuracy": {}, "cross_entropy": {}}
    for task in tasks.TASKS:
        right, nats = [], []
        for sample in tasks.held_out(task, options.length, options.samples):
            logits = model(input_ids=sample.input_ids, use_cache=False).logits[:, :-1]
            labels = sample.labels[:, 1:]
            asked = labels != tasks.IGNORE
            right.append(logits.argmax(-1)[asked] == labels[asked])
            nats.append(cross_entropy(logits[asked], labels[asked], reduction="none"))
        scores["accuracy"][task] = torch.cat(right).float().mean().item()
        scores["cross_entropy"][task] = torch.cat(nats).mean().item()
    return scores


def main() -> None:
    defaults = {"steps": 120, "batch": 4, "length": 2048, "samples": 8, "learning_rate": 5e-4}
    options = parser(__doc__.splitlines()[0], **defaults).parse_args()
    experiment(options, load, partial(sequences, options), partial(score, options))


if __name__ == "__main__":
    main()
