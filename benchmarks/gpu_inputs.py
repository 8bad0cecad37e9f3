"""Inputs for the checks on a GPU: q, k and v in which a chosen share of the blocks lies low."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator

import torch
from torch import Tensor

#: Of the rule, and how far below the others the low blocks' scores lie.
LAMBDA = 1e-3
GAP = 12.0


def make(
    batch: int,
    heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    size: int,
    *,
    sparsity: float = 0.0,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    seed: int = 0,
    block: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v; about `sparsity` of the blocks of `block` keys lie `GAP` below the others.

    Low blocks are spread evenly, and block 0 is high. Scores, at scale 1/sqrt(D), are otherwise
    those of standard normal q and k.
    """
    maker = torch.Generator(device).manual_seed(seed)

    def normal(n: int, length: int) -> Tensor:
        x = torch.empty((batch, n, length, size), dtype=dtype, device=device)
        return x.normal_(generator=maker)

    q, k, v = normal(heads, q_len), normal(kv_heads, kv_len), normal(kv_heads, kv_len)
    if sparsity:
        number = torch.arange(-(-kv_len // block), device=device)
        low = (number % 100 * 61 % 100 < 100 * sparsity) & (number > 0)
        q[..., 0] = 8.0
        # The deviation of a score is 1, so maxima over a block differ by a few units at most.
        step = (GAP - math.log(LAMBDA)) * size**0.5 / 8.0
        k[..., 0] = -step * low.repeat_interleave(block)[:kv_len].to(dtype)
    return q, k, v


@contextlib.contextmanager
def variables(**values: str) -> Iterator[None]:
    """Sets environment variables, which the kernels read at each call, and removes them again."""
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
