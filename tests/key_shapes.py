"""Keys that are hard to copy into eight bits: each function changes k `[B, Hkv, L, D]`, float32."""

from __future__ import annotations

import torch
from torch import Tensor


def plain(k: Tensor) -> Tensor:
    return k


def offset(k: Tensor) -> Tensor:
    """All keys share most of themselves, as real ones do."""
    return k + 20 * torch.randn(k.shape[-1])


def outlier_channel(k: Tensor) -> Tensor:
    """One channel dwarfs the others, so that they get few of the eight bits."""
    k[..., 3] *= 200
    return k


def outlier_keys(k: Tensor) -> Tensor:
    """A few keys dwarf the others of their chunk."""
    k[:, :, ::50] *= 100
    return k


def mixed_scales(k: Tensor) -> Tensor:
    """Every chunk of keys has a magnitude of its own, over fourteen decades."""
    return k * 10.0 ** torch.linspace(-12, 2, k.shape[2])[:, None]


def zeros(k: Tensor) -> Tensor:
    """Half of the keys are zero."""
    k[:, :, 1::2] = 0
    return k


def subnormal(k: Tensor) -> Tensor:
    """Half of the keys lie below the smallest normal number."""
    k[:, :, 1::2] *= 1e-39
    return k


def tiny(k: Tensor) -> Tensor:
    return k * 1e-25


def huge(k: Tensor) -> Tensor:
    return k * 1e16


def int8(k: Tensor) -> Tensor:
    """Keys that the copy holds exactly, of mean zero, so that only the query's rounding remains."""
    half = torch.randint(-127, 128, (*k.shape[:2], k.shape[2] // 2, k.shape[3])).float()
    half[:, :, ::64, 0] = 127.0
    return torch.cat([half, -half], dim=2) / 64


KEY_SHAPES = [
    plain, offset, outlier_channel, outlier_keys, mixed_scales, zeros, subnormal, tiny, huge, int8,
]  # fmt: skip
