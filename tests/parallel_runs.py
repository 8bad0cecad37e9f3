"""The same runs on one process and, as a script under torchrun, on each rank of several."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tiny_models import token_ids
from transformers import AutoModelForCausalLM

from hf_sparse_attention import SparseAttentionConfig, collect_stats, set_sparse_attention
from hf_sparse_attention.thresholds import ModelFingerprint, Thresholds
from hf_sparse_attention.types import PHASES, BlockGeometry

LENGTH = 200
GEOMETRY = BlockGeometry(16, 16)


def tables(config: Any) -> Thresholds:
    """BSFA thresholds under which each head skips all it may or nothing, layers unlike.

    So that no rounding decides, and any other head's thresholds would show.
    """
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    # All but head 0, 2, ...: in decode a whole group must agree, and one group of each layer does.
    skips = torch.tensor([[h != 2 * n for h in range(heads)] for n in range(layers)])
    everything = torch.tensor(1e9)
    table = torch.where(skips, everything, -torch.inf)[None, :, :, None].expand(1, -1, -1, 4)
    fingerprint = ModelFingerprint.of(config)
    name = GEOMETRY.name
    tensors = {f"{name}.{phase}.T": table.clone() for phase in ("prefill", "decode")}
    return Thresholds(tensors, {name: GEOMETRY}, [4], fingerprint=fingerprint)


def settings(config: Any) -> Iterator[tuple[str, SparseAttentionConfig]]:
    """What is run, by name."""
    common: dict[str, Any] = {"geometry": GEOMETRY, "min_length": 0, "backend": "reference"}
    yield "dense", SparseAttentionConfig(threshold_scale_factor=0, **common)
    yield "blasst", SparseAttentionConfig(threshold_scale_factor=150.0, **common)
    yield "budget", SparseAttentionConfig(max_dropped_mass=1.0, **common)
    yield "bsfa", SparseAttentionConfig(method="bsfa", tables=tables(config), **common)


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
    torch.save(run(parallel), out / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
