"""Runs of `Trainer` on a tiny model; as a script under torchrun, on each rank of several."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tiny_models
import torch
from transformers import Trainer, TrainingArguments

from hf_sparse_attention import (
    SparseAttentionCallback,
    SparseAttentionConfig,
    set_sparse_attention,
)
from hf_sparse_attention.fingerprint import ModelFingerprint
from hf_sparse_attention.fits import Fit, PhaseFit
from hf_sparse_attention.thresholds import Thresholds
from hf_sparse_attention.training import Schedule
from hf_sparse_attention.types import BlockGeometry

LENGTH, SAMPLES, STEPS = 96, 16, 6
FACTOR = 60.0
#: Blocks so small that random scores leave many of them out.
GEOMETRY = BlockGeometry(16, 1)


def samples(count: int = SAMPLES, length: int = LENGTH) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(3, tiny_models.VOCABULARY, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def settings(**changes: Any) -> SparseAttentionConfig:
    fit = Fit(GEOMETRY, {"prefill": PhaseFit(2.0, 5.0), "decode": PhaseFit(1.0, 5.0)})
    common: dict[str, Any] = {"fits": {GEOMETRY.name: fit}, "target_sparsity": 0.3}
    return SparseAttentionConfig(**{**common, "min_length": 0, "backend": "reference", **changes})


def model(**changes: Any) -> Any:
    torch.manual_seed(0)
    made = tiny_models.llama()
    set_sparse_attention(made, settings(**changes))
    return made


def bsfa(levels: tuple[int, ...] = (1, 2, 4)) -> SparseAttentionConfig:
    """Thresholds of the tiny model under which a smaller k skips more."""
    config = tiny_models.llama().config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    heights = 3.0 / torch.tensor(levels, dtype=torch.float32)
    table = heights[:, None, None, None].expand(-1, layers, heads, 6)
    tensors = {f"{GEOMETRY.name}.{phase}.T": table.clone() for phase in ("prefill", "decode")}
    tables = Thresholds(
        tensors, {GEOMETRY.name: GEOMETRY}, list(levels), fingerprint=ModelFingerprint.of(config)
    )
    return SparseAttentionConfig(
        method="bsfa", tables=tables, min_length=0, backend="reference", geometry=GEOMETRY
    )


def ramp(**options: Any) -> SparseAttentionCallback:
    """Two dense steps, two rising, then full strength."""
    goal = {} if "level" in options else {"threshold_scale_factor": FACTOR}
    options = {**goal, "schedule": Schedule("linear", dense_steps=2, ramp_steps=2), **options}
    if "target_sparsity" in options:
        del options["threshold_scale_factor"]
    return SparseAttentionCallback(**options)


def arguments(folder: Path | str, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def trainer(folder: Path | str, made: Any = None, *callbacks: Any, **options: Any) -> Trainer:
    return Trainer(
        model() if made is None else made,
        arguments(folder, **options),
        train_dataset=samples(),
        eval_dataset=samples(2),
        callbacks=list(callbacks) or [ramp()],
    )


def logged(trained: Trainer, *names: str) -> list[tuple[float, ...]]:
    """Entries of the training steps: `names` of each."""
    rows = [row for row in trained.state.log_history if "loss" in row]
    return [tuple(row[name] for name in names) for row in rows]


if __name__ == "__main__":
    # training_runs.py OUT: trains under DDP, then under FSDP2, and writes what each rank logs.
    out = Path(sys.argv[1])
    found: dict[str, Any] = {}
    fsdp = {"fsdp": "full_shard", "fsdp_config": {"version": 2, "reshard_after_forward": True}}
    for name, options in {"ddp": {}, "fsdp2": fsdp}.items():
        run = trainer(
            out / name,
            per_device_train_batch_size=1,
            save_strategy="steps",
            save_steps=3,
            **options,
        )
        run.train()
        found[name] = logged(run, "loss", "sparsity", "threshold_scale_factor")
        rank = torch.distributed.get_rank()
    (out / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
