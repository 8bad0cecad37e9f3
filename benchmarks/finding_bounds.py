"""Bounds on the largest score of a block of keys that do not need the keys in full precision.

Each takes all keys of a head, `[H, L, D]`, and gives a function from scaled queries `[H, R, D]` to
an upper bound of their scores' maximum over each block, `[H, R, NK]`. Rounding is left out: the
margin that the kernel adds for it is far below the others (docs/int8-filter.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

Bound = Callable[[Tensor], Tensor]


def norms(keys: Tensor, block_k: int) -> Bound:
    """Cauchy-Schwarz: |q| times the longest key, the keys' mean taken off."""
    mean, blocks, inside = _centred(keys, block_k)
    longest = (blocks * inside).norm(dim=-1).amax(-1)  # [H, NK]
    return lambda q: _dot(q, mean) + q.norm(dim=-1, keepdim=True) * longest[:, None]


def corners(keys: Tensor, block_k: int) -> Bound:
    """The best corner of the box around the keys: a smallest and a largest value a channel."""
    _, blocks, inside = _centred(keys, block_k, centred=False)
    low = blocks.masked_fill(~inside, math.inf).amin(2).transpose(1, 2)  # [H, D, NK]
    high = blocks.masked_fill(~inside, -math.inf).amax(2).transpose(1, 2)
    return lambda q: q.clamp(min=0) @ high + q.clamp(max=0) @ low


def int8(keys: Tensor, block_k: int) -> Bound:
    """Keys in int8 with a scale a block, the mean taken off, queries in int8 too: our filter."""
    mean, blocks, inside = _centred(keys, block_k)
    scale = (blocks * inside).abs().amax((2, 3), keepdim=True).clamp(min=1e-30) / 127
    coarse = (blocks / scale).round().clamp(-127, 127) * scale
    longest = (coarse * inside).norm(dim=-1).amax(-1)[:, None]  # A, [H, 1, NK]
    off = ((blocks - coarse) * inside).norm(dim=-1).amax(-1)[:, None]  # E

    def bound(q: Tensor) -> Tensor:
        step = q.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        rough = (q / step).round() * step
        score = torch.einsum("hrd,hnkd->hrnk", rough, coarse)
        score = score.masked_fill(~inside[..., 0][:, None], -math.inf).amax(-1)
        rest = (q - rough).norm(dim=-1, keepdim=True) * longest
        return _dot(q, mean) + score + rest + q.norm(dim=-1, keepdim=True) * off

    return bound


def _dot(q: Tensor, mean: Tensor) -> Tensor:
    return (q * mean).sum(-1, keepdim=True)


def _centred(keys: Tensor, block_k: int, centred: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The mean `[H, 1, D]`, the blocks `[H, NK, block_k, D]`, and which of them are keys."""
    mean = keys.mean(1, keepdim=True) if centred else torch.zeros_like(keys[:, :1])
    heads, length, size = keys.shape
    blocks = pad(keys - mean, (0, 0, 0, -length % block_k)).view(heads, -1, block_k, size)
    inside = (torch.arange(blocks.shape[1] * block_k) < length).view(1, -1, block_k, 1)
    return mean, blocks, inside.expand(heads, -1, -1, 1)


BOUNDS: dict[str, Callable[[Tensor, int], Bound]] = {
    "norms": norms,
    "corners": corners,
    "int8": int8,
}
