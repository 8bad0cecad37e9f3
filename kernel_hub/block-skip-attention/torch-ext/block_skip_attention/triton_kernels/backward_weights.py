"""The backward in Triton: gradients over the blocks that the forward kept, read from its skip bits.

Two kernels recompute the weights from the scores and the forward's lse: one sums dQ along a block
row (`backward_q.py`), the other dK and dV along a block column, over all query heads of the group
(`backward_kv.py`). Neither waits for the other or adds to what another program adds to, so results
do not depend on the order of programs. With P the weights, dP = dO V^T and delta = sum(dO * O) of
each row, dS = P (dP - delta); a softcap multiplies it by 1 - (s / softcap)^2. This file holds what
both share.
"""

import triton
import triton.language as tl

from .rules import block_scores, dot, span

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_range(request_ptr, batch, q_len, kv_len, CAUSAL: tl.constexpr):
    """First valid key, number of keys, column of row 0 (from the first key), first row."""
    first, keys, offset = span(request_ptr, batch, q_len, kv_len)
    first_row = 0
    if CAUSAL:
        first_row = tl.minimum(tl.maximum(-offset, 0), q_len)
    return first, keys, offset, tl.where(keys == 0, q_len, first_row)


@triton.jit
def was_kept(
    skips_ptr, voter_at, vote, rows, block, n_votes, skip_bytes, q_len, DECODE: tl.constexpr
):
    """Which of `rows` kept `block`: bool [rows]. In decode each row has a vote of its own."""
    kept = rows < q_len
    if skips_ptr is not None:
        if DECODE:
            mine = kept & (rows >= vote)
            at = (voter_at * n_votes + rows - vote) * skip_bytes + block // 8
            bits = tl.load(skips_ptr + at, mask=mine, other=0)
        else:
            at = (voter_at * n_votes + vote) * skip_bytes + block // 8
            bits = tl.load(skips_ptr + at) + tl.zeros_like(rows).to(tl.uint8)
        kept = kept & (((bits.to(tl.int32) >> (block % 8)) & 1) == 0)
    return kept


@triton.jit
def weights_and_slopes(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    visible,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
):
    """P and dS (with respect to q k^T, scale included), float32 [rows, columns]."""
    s = block_scores(q, k, visible, scale, softcap, HAS_SOFTCAP)
    alive = visible & (lse[:, None] > -float("inf"))
    p = tl.where(alive, tl.exp2((s - lse[:, None]) * LOG2_E), 0.0)
    ds = p * (dot(dout, tl.trans(v)) - delta[:, None])
    if HAS_SOFTCAP:
        t = tl.where(alive, s / softcap, 0.0)
        ds = ds * (1.0 - t * t)
    return p, ds * scale
