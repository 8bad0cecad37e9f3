"""What both experiments share: dense and sparsity-aware fine-tuning, and a sweep over lambda."""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Trainer, TrainingArguments

from hf_sparse_attention import SparseAttentionConfig, collect_stats, set_sparse_attention
from hf_sparse_attention.training import SparseAttentionCallback

#: lambda at evaluation; BLASST knows none above 1.
LAMBDAS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 0.999)

Rows = Sequence[dict[str, Tensor]]
Scores = dict[str, dict[str, float]]  # by measure and task


def machine() -> dict[str, Any]:
    """What the numbers were made on."""
    return {
        "cpu": [platform.processor() or platform.machine()],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options of both experiments."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--seeds", type=int)
    made.add_argument("--steps", type=int)
    made.add_argument("--batch", type=int)
    made.add_argument("--length", type=int, help="tokens a sequence, in training and evaluation")
    made.add_argument("--samples", type=int, help="held-out sequences, of each task")
    made.add_argument("--learning-rate", type=float)
    made.add_argument("--full", type=float, help="lambda at the end of training")
    made.add_argument("--geometry", help="blocks, as 64x64 or 64x1")
    made.add_argument("--threads", type=int)
    made.add_argument("--verbose", action="store_true")
    made.set_defaults(**{"geometry": "64x1", "full": 0.9, "threads": 1, "seeds": 3, **defaults})
    return made


def set_lambda(model: nn.Module, value: float, options: argparse.Namespace) -> None:
    """BLASST in prefill with `lambda = value` at the experiment's length."""
    config = SparseAttentionConfig(
        method="blasst",
        geometry=options.geometry,
        threshold_scale_factor={"prefill": value * options.length, "decode": 0.0},
    )
    set_sparse_attention(model, config, min_length=0)


def fine_tune(
    model: nn.Module, data: Rows, options: argparse.Namespace, seed: int, *, sparse: bool
) -> None:
    """`options.steps` steps on `data`, in its order; dense, or under a lambda that rises."""
    set_lambda(model, 0.0, options)
    callbacks = []
    if sparse:
        full = {"prefill": options.full * options.length, "decode": 0.0}
        callbacks.append(SparseAttentionCallback(threshold_scale_factor=full, schedule="linear"))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            seed=seed,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(10, options.steps // 5),
            weight_decay=0.0,
            adam_beta2=0.98,
            save_strategy="no",
            logging_steps=10,
            report_to=[],
            use_cpu=True,
            disable_tqdm=not options.verbose,
        )
        Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()


@torch.no_grad()
def sweep(
    model: nn.Module, score: Callable[[nn.Module], Scores], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """What `score` measures and how much is skipped, at each lambda."""
    model.eval()
    points = []
    for value in LAMBDAS:
        set_lambda(model, value, options)
        with collect_stats(model) as stats:
            scores = score(model)
        point = {"lambda": value, "sparsity": stats.sparsity("prefill"), **scores}
        points.append({**point, "dropped_mass": stats.dropped_mass("prefill")})
    return points


def experiment(
    options: argparse.Namespace,
    load: Callable[[], nn.Module],
    data: Callable[[int], Rows],
    score: Callable[[nn.Module], Scores],
) -> None:
    """The model as it is, then for each seed its two fine-tuned ones; JSON after each of them."""
    torch.set_num_threads(options.threads)
    start = time.process_time()
    runs: list[dict[str, Any]] = []

    def add(name: str, seed: int | None, model: nn.Module) -> None:
        runs.append({"model": name, "seed": seed, "points": sweep(model, score, options)})
        minutes = (time.process_time() - start) / 60
        report = {
            "options": {**vars(options), "out": None},
            "machine": machine(),
            "cpu_minutes": minutes,
            "runs": runs,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        tqdm.write(f"{name}, seed {seed}: done after {minutes:.1f} CPU minutes")

    add("dense-trained", None, load())
    for seed in range(options.seeds):
        for name, sparse in (("dense fine-tuned", False), ("sparsity-aware", True)):
            torch.manual_seed(seed)
            model = load()
            fine_tune(model, data(seed), options, seed, sparse=sparse)
            add(name, seed, model)
