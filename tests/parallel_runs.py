"""The same runs on one process and, as a script under torchrun, on each rank of several."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tiny_models import token_ids
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_sparse_attention import SparseAttentionConfig, collect_stats, set_sparse_attention
from hf_sparse_attention.fingerprint import ModelFingerprint
from hf_sparse_attention.fits import Fit, PhaseFit
from hf_sparse_attention.thresholds import Thresholds
from hf_sparse_attention.types import PHASES, BlockGeometry

LENGTH = 200
GEOMETRY = BlockGeometry(16, 16)


def tables(config: Any, only_layer: int | None = None) -> Thresholds:
    """Thresholds of both methods: each head skips all it may or nothing, and layers are unlike.

    So that no rounding decides, and any other head's thresholds would show. With `only_layer` the
    others skip nothing.
    """
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    # All but head 0, 2, ...: in decode a whole group must agree, and one group of each layer does.
    skips = torch.tensor([[h != 2 * n for h in range(heads)] for n in range(layers)])
    if only_layer is not None:
        skips &= (torch.arange(layers) == only_layer)[:, None]
    everything = torch.tensor(1e9)
    table = torch.where(skips, everything, -torch.inf)[None, :, :, None].expand(1, -1, -1, 4)
    fingerprint = ModelFingerprint.of(config)
    name = GEOMETRY.name
    tensors = {}
    for phase in PHASES:
        tensors[f"{name}.{phase}.T"] = table.clone()
        tensors[f"{name}.{phase}.log_a"] = torch.where(skips, torch.tensor(5.0), -torch.inf)
        tensors[f"{name}.{phase}.b"] = torch.zeros(layers, heads)
    return Thresholds(tensors, {name: GEOMETRY}, [4], fingerprint=fingerprint)


def same_tables(one: SparseAttentionConfig, other: SparseAttentionConfig) -> bool:
    """Whether two configs hold the same tables."""
    assert one.tables is not None
    assert other.tables is not None
    mine, theirs = one.tables.tensors, other.tables.tensors
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def settings(config: Any) -> Iterator[tuple[str, SparseAttentionConfig]]:
    """What is run, by name."""
    common: dict[str, Any] = {"geometry": GEOMETRY, "min_length": 0, "backend": "reference"}
    yield "dense", SparseAttentionConfig(threshold_scale_factor=0, **common)
    yield "blasst", SparseAttentionConfig(threshold_scale_factor=150.0, **common)
    yield "budget", SparseAttentionConfig(max_dropped_mass=1.0, **common)
    common["tables"] = tables(config)
    yield "bsfa", SparseAttentionConfig(method="bsfa", **common)
    fits = {GEOMETRY.name: Fit(GEOMETRY, {phase: PhaseFit(a=1.0) for phase in PHASES})}
    yield "blasst-by-head", SparseAttentionConfig(granularity="head", fits=fits, **common)


@torch.no_grad()
def saved_and_loaded(model: Any, folder: Path) -> Tensor:
    """Logits of the prompt from BSFA as it is found beside the model that these ranks saved."""
    set_sparse_attention(model, dict(settings(model.config))["bsfa"])
    model.save_pretrained(folder)
    torch.distributed.barrier()
    again = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", attn_implementation="bsfa")
    return again(token_ids(1, LENGTH)).logits


def run(model: Any) -> dict[str, dict[str, Any]]:
    """Logits of a prompt and of the next token, and the blocks counted by phase and layer."""
    found = {}
    ids = token_ids(1, LENGTH + 1)
    for name, config in settings(model.config):
        set_sparse_attention(model, config)
        with collect_stats(model) as stats, torch.no_grad():
            first = model(ids[:, :LENGTH], use_cache=True)
            second = model(ids[:, LENGTH:], past_key_values=first.past_key_values)
        found[name] = {
            "logits": torch.cat([first.logits, second.logits], 1),
            "counts": {phase: stats.counts(phase) for phase in PHASES},
        }
    return found


if __name__ == "__main__":
    folder, out = map(Path, sys.argv[1:])
    parallel = AutoModelForCausalLM.from_pretrained(
        folder, tp_plan="auto", attn_implementation="blasst"
    )
    results = run(parallel)
    results["bsfa"]["reloaded"] = saved_and_loaded(parallel, out / "saved")
    torch.save(results, out / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
