"""Exact attention, no skipping: torch's SDPA where it can, explicit math where it cannot.

The last resort of `auto`: it takes every call, arbitrary masks and dropout included. Every use of
it in place of a skipping backend is counted by the caller. Memory is linear in the length: where a
mask must be written out, that is done for a few rows at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, SkipRule

NAME = "dense"
GEOMETRIES: tuple[str, ...] | None = None  # None: any, it has no blocks
PREFERRED: tuple[str, ...] = ()

#: Mask elements that are written out at a time.
_MASK_ELEMENTS = 1 << 24


def available() -> str | None:
    """Why this machine cannot run the backend, or None: it always can."""
    return None


def supports(call: AttentionCall, rule: SkipRule, geometry: BlockGeometry) -> str | None:
    """Why this call cannot be served, or None: it takes everything, and ignores the rule."""
    return None


def run(
    call: AttentionCall,
    rule: SkipRule,
    geometry: BlockGeometry,
    *,
    return_skips: bool = False,
    return_dropped_mass: bool = False,
) -> AttentionResult:
    """Computes `call` exactly; lse, counts and skips are None."""
    batch, heads, q_len, _ = call.q.shape
    kv_len, v_dim = call.v.shape[2:]
    if batch == 0 or q_len == 0 or kv_len == 0:
        return AttentionResult(call.q.new_zeros((batch, q_len, heads, v_dim)), backend=NAME)
    if _needs_no_mask(call):
        return AttentionResult(_sdpa(call, call.q, None).transpose(1, 2).contiguous(), backend=NAME)
    step = max(1, _MASK_ELEMENTS // (batch * kv_len))
    if q_len <= step:  # not a loop of one: a loop would fix the length in a compiled graph
        return AttentionResult(_rows(call, 0, q_len).transpose(1, 2).contiguous(), backend=NAME)
    parts = [_rows(call, start, min(start + step, q_len)) for start in range(0, q_len, step)]
    return AttentionResult(torch.cat(parts, dim=2).transpose(1, 2).contiguous(), backend=NAME)


def _needs_no_mask(call: AttentionCall) -> bool:
    q_len, kv_len = call.q.shape[2], call.k.shape[2]
    special = (call.q_offset, call.key_valid, call.window, call.softcap, call.sinks, call.mask)
    return all(x is None for x in special) and (not call.causal or q_len in (1, kv_len))


def _rows(call: AttentionCall, start: int, end: int) -> Tensor:
    """Attention of query rows `start` to `end` under a written-out mask: `[B, Hq, rows, Dv]`."""
    q = call.q[:, :, start:end]
    visible = visibility(call, start, end)
    mask = visible
    if call.mask is not None:
        given = call.mask[:, :, start:end] if call.mask.shape[2] > 1 else call.mask
        if given.dtype == torch.bool:
            visible = mask = visible & given
        else:
            mask = given.to(q.dtype).masked_fill(~visible, -math.inf)
    if call.softcap is None and call.sinks is None:
        out = _sdpa(call, q, mask)
    else:
        out = _explicit(call, q, mask)
    return out.masked_fill(~visible.any(-1, keepdim=True), 0.0)


def visibility(call: AttentionCall, start: int, end: int) -> Tensor:
    """Which keys query rows `start` to `end` see, bool `[B|1, 1, rows, Lk]` (`call.mask` aside)."""
    q_len, kv_len = call.q.shape[2], call.k.shape[2]
    device = call.q.device
    column = torch.arange(kv_len, device=device)
    row = torch.arange(start, end, device=device)
    offset = kv_len - q_len if call.q_offset is None else call.q_offset[:, None]
    position = (row + offset).view(-1, 1, end - start, 1)  # [B|1, 1, rows, 1]
    visible = torch.ones((1, 1, end - start, kv_len), dtype=torch.bool, device=device)
    if call.causal:
        visible = column <= position
    if call.window is not None:
        visible = visible & (column > position - call.window)
    if call.key_valid is not None:
        visible = visible & call.key_valid[:, None, None, :]
    return visible


def _sdpa(call: AttentionCall, q: Tensor, mask: Tensor | None) -> Tensor:
    k, v, group = call.k, call.v, call.group
    causal = mask is None and call.causal and q.shape[2] > 1
    if group > 1 and q.shape[2] == 1 and (mask is None or mask.shape[1] == 1):
        # Decode: the group's heads as rows of one query; far faster than enable_gqa on a CPU.
        folded = q.reshape(q.shape[0], k.shape[1], group, q.shape[3])
        out = scaled_dot_product_attention(
            folded, k, v, mask, call.dropout, False, scale=call.scale
        )
        return out.reshape(q.shape[0], q.shape[1], 1, v.shape[3])
    return scaled_dot_product_attention(
        q, k, v, mask, call.dropout, causal, scale=call.scale, enable_gqa=group > 1
    )


def _explicit(call: AttentionCall, q: Tensor, mask: Tensor) -> Tensor:
    """Softmax written out, in at least float32, for what SDPA does not know: softcap and sinks."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k = call.k.repeat_interleave(call.group, 1).to(dtype)
    v = call.v.repeat_interleave(call.group, 1).to(dtype)
    scores = call.scale * q.to(dtype) @ k.transpose(2, 3)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    else:
        scores = scores + mask
    if call.sinks is not None:
        sink = call.sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    scores = scores.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[2]]
    weights = torch.nn.functional.dropout(weights, call.dropout)
    return (weights @ v).to(q.dtype)
