"""What test_cpu_kernel_sanitized runs under the sanitizers: every feature, forward and backward.

    python tests/sanitized_calls.py VARIANT LEVEL ...

Each tensor ends where its memory ends, so that reading past a row is seen. A level that this
machine lacks is left out; each that ran is printed.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import kernels
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [(64, 64), (64, 128), (64, 1), (7, 8)]
VALID = torch.rand(2, 200, generator=torch.Generator().manual_seed(0)) < 0.7
VALID[1, :40] = False
RULES: list[dict[str, Any]] = [
    {},
    {"log_lambda": torch.full((1, 1), -2.0)},
    {"block_threshold": torch.zeros(1, 4, 1), "max_dropped_mass": torch.full((1, 1), 0.1)},
]
FEATURES: list[dict[str, Any]] = [
    {},
    {"key_valid": VALID, "window": 50},
    {"softcap": 3.0, "sinks": torch.zeros(4)},
]


def inputs(
    dtype: torch.dtype, batch: int, heads: int, q_len: int, kv_len: int, size: int
) -> list[Tensor]:
    """q, k, v of `heads` query and half as many key/value heads; a value head size of 19."""
    q = torch.randn(batch, heads, q_len, size)
    k = torch.randn(batch, heads // 2, kv_len, size)
    k[:, :, 0] += 4 * q.mean((0, 1, 2))  # a sink, so that something is skipped
    v = torch.randn(batch, heads // 2, kv_len, 19)
    return [x.to(dtype) for x in (q, k, v)]


def both_ways(module: ModuleType, qkv: list[Tensor], **options: Any) -> None:
    """A forward, and the backward over what it kept."""
    for x in qkv:
        x.requires_grad_()
    out, lse, *_ = module.forward(*qkv, **options, scale=0.5, return_skips=True)
    torch.autograd.grad([out, lse], qkv, [torch.randn_like(out), torch.randn_like(lse)])


def run(module: ModuleType) -> None:
    """All calls, at the level that is chosen."""
    cases = itertools.product(DTYPES, (33, 64), (67, 3), BLOCKS)
    for turn, (dtype, size, q_len, (block_q, block_k)) in enumerate(cases):
        # Each rule with one feature a turn: after three turns it has met them all.
        for i, rule in enumerate(RULES):
            both_ways(
                module,
                inputs(dtype, 2, 4, q_len, 200, size),
                **rule,
                **FEATURES[(turn + i) % len(FEATURES)],
                block_q=block_q,
                block_k=block_k,
                split_k=64,
                return_dropped_mass=True,
            )
    # Long enough for the int8 filter, which stays out of calls that want the certificate.
    for dtype, size, (block_q, block_k) in itertools.product(DTYPES, (33, 64), BLOCKS):
        options = {"log_lambda": torch.full((1, 1), -1.0), "block_q": block_q, "block_k": block_k}
        both_ways(module, inputs(dtype, 1, 2, 267, 267, size), **options)
        # Decode, with an int8 copy of the keys that is made in two steps.
        q, k, v = inputs(dtype, 2, 4, 1, 267, size)
        copy = module.empty_int8_keys(2, 2, 267, size)
        for start, end in ((0, 200), (200, 267)):
            module.append_int8_keys(k[:, :, start:end].contiguous(), torch.tensor(start), copy)
        module.forward(q, k, v, **options, scale=0.5, int8_keys=copy)
    observe(module)
    for dtype, size, norm in itertools.product(DTYPES, (2, 34, 64), (False, True)):
        x = torch.randn(2, 3, 67, size).to(dtype)
        tables = torch.randn(2, 2, 67, size).to(dtype)
        module.rotate_(x, *tables, torch.rand(3, size) if norm else None, 1e-6)


def observe(module: ModuleType) -> None:
    """Calibration's pass over three geometries, odd ones among them."""
    plan = {
        "geometries": torch.tensor([[64, 100], [128, 64], [1, 70]]),
        "kept": torch.tensor([[1, 2], [1, 1], [64, 300]]),
        "eps": torch.rand(3),
        "group_count": 2,
        "bins": 50,
        "u_min": -9.0,
        "bins_per_nat": 3.0,
        "mass_unit": 1e-6,
        "sample_every": 2,
        "sample_from": 100,
    }
    features: list[dict[str, Any]] = [{}, {"window": 50}, {"softcap": 3.0}]
    for dtype, size, length in itertools.product(DTYPES, (33, 64), (1, 67, 267)):
        groups = torch.arange(-(-length // 64))[None] % 2
        for feature in features:
            qkv = inputs(dtype, 1, 4, length, length, size)
            module.observe(*qkv, None, groups=groups, **feature, scale=0.5, **plan)


def main() -> None:
    """The command line: see the module's docstring."""
    module = kernels.get_local_kernel(Path(sys.argv[1]), backend="cpu")
    torch.set_num_threads(2)
    best = module.cpu_level()
    levels = sys.argv[2:]
    for level in levels[: levels.index(best) + 1]:
        os.environ["HF_SPARSE_ATTENTION_CPU_LEVEL"] = level
        assert module.cpu_level() == level
        run(module)
        print(level, "ran", flush=True)


if __name__ == "__main__":
    main()
