"""The one place where a call, a rule and a geometry are checked, before any backend sees them.

Checks shapes, dtypes and settings only, never tensor values: it costs microseconds, needs no device
sync and can be traced. Values are checked where a rule or a config is made.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_sparse_attention.types import ORDERS, AttentionCall, BlockGeometry, SkipRule

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(call: AttentionCall, rule: SkipRule, geometry: BlockGeometry) -> None:
    """Raises ValueError or TypeError naming what was expected and what was found."""
    _check_tensors(call)
    _check_options(call)
    _check_geometry(geometry)
    _check_rule(rule, call, geometry)


def _check_tensors(call: AttentionCall) -> None:
    q, k, v = call.q, call.k, call.v
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions [B, H, L, D], got {_shape(x)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise TypeError(
                f"{name}: expected q's dtype and device {q.dtype} on {q.device}, "
                f"got {x.dtype} on {x.device}"
            )
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v: expected [B, Hkv, Lk] as in k {_shape(k)}, got {_shape(v)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k: expected q's batch and head size {_shape(q)}, got {_shape(k)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q: expected a multiple of k's {k.shape[1]} heads, got {q.shape[1]} query heads"
        )
    if q.shape[3] == 0 or v.shape[3] == 0:
        raise ValueError(
            f"head size: expected at least 1, got {q.shape[3]} (q, k), {v.shape[3]} (v)"
        )


def _check_options(call: AttentionCall) -> None:
    batch, heads, q_len, _ = call.q.shape
    kv_len = call.k.shape[2]
    if not abs(call.scale) < math.inf:  # unlike math.isfinite, this can be traced
        raise ValueError(f"scale: expected a finite number, got {call.scale}")
    if call.window is not None and call.window < 1:
        raise ValueError(f"window: expected at least 1 key, got {call.window}")
    if call.window is not None and not call.causal:
        raise ValueError("window: expected causal=True with a window, got causal=False")
    if call.softcap is not None and not 0 < call.softcap < math.inf:
        raise ValueError(f"softcap: expected a positive number, got {call.softcap}")
    if not 0.0 <= call.dropout < 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {call.dropout}")
    _expect(call.key_valid, "key_valid", [(batch, kv_len)], torch.bool)
    _expect(call.q_offset, "q_offset", [(1,), (batch,)], torch.int64)
    _expect(call.sinks, "sinks", [(heads,)], None)
    if call.mask is not None:
        _expect_broadcast(call.mask, "mask", (batch, heads, q_len, kv_len))


def _check_geometry(geometry: BlockGeometry) -> None:
    if geometry.block_q < 1 or geometry.block_k < 1:
        raise ValueError(f"geometry: expected blocks of at least 1x1, got {geometry.name}")
    if geometry.order not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {geometry.order!r}")
    if geometry.split_k < 1 or geometry.split_k % geometry.block_k:
        raise ValueError(
            f"split_k: expected a multiple of block_k {geometry.block_k}, got {geometry.split_k}"
        )


def _check_rule(rule: SkipRule, call: AttentionCall, geometry: BlockGeometry) -> None:
    batch, heads, q_len, _ = call.q.shape
    rows = q_len if call.phase == "decode" else -(-q_len // geometry.block_q)
    for name, x, shape in (
        ("log_lambda", rule.log_lambda, (batch, heads)),
        ("max_dropped_mass", rule.max_dropped_mass, (batch, heads)),
        ("block_threshold", rule.block_threshold, (batch, heads, rows)),
    ):
        if x is None:
            continue
        if x.dtype != torch.float32 or x.device != call.q.device:
            raise TypeError(
                f"{name}: expected torch.float32 on {call.q.device}, got {x.dtype} on {x.device}"
            )
        _expect_broadcast(x, name, shape)


def _expect(
    x: Tensor | None, name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype | None
) -> None:
    if x is None:
        return
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {x.dtype}")
    if tuple(x.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name}: expected shape {wanted}, got {_shape(x)}")


def _expect_broadcast(x: Tensor, name: str, shape: tuple[int, ...]) -> None:
    fits = x.dim() == len(shape) and all(n in (1, m) for n, m in zip(x.shape, shape, strict=True))
    if not fits:
        raise ValueError(
            f"{name}: expected shape {list(shape)} (or 1 in any place), got {_shape(x)}"
        )


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
