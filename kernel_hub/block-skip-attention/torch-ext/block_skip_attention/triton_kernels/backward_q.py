"""The backward of q in Triton; see `backward_weights.py`."""

import triton
import triton.language as tl

from .backward_weights import row_range, was_kept, weights_and_slopes
from .rules import dot, is_visible, narrow


@triton.jit
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,  # [B, Lq, Hq, Dv]
    lse_ptr,  # float32 [B, Hq, Lq]
    delta_ptr,  # float32 [B, Hq, Lq]
    skips_ptr,  # uint8 [B, Hq | Hkv, NQ, skip_bytes] or none
    valid_ptr,
    request_ptr,
    dq_ptr,  # [B, Hq, Lq, D]
    scale,
    softcap,
    window,
    q_len,
    kv_len,
    heads,
    group,
    n_votes,
    skip_bytes,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vl,
    stride_vd,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PADDED_HEAD: tl.constexpr,
    PADDED_VALUE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DECODE: tl.constexpr,
):
    """DQ of one block row of one query head; grid `(NQ, Hq, B)`."""
    row_block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)  # a head's first element may lie beyond 2^31
    batch = tl.program_id(2).to(tl.int64)
    first, keys, offset, first_row = row_range(request_ptr, batch, q_len, kv_len, CAUSAL)
    start = first_row + row_block * BLOCK_Q
    if start < q_len:
        rows = start + tl.arange(0, BLOCK_Q)
        real = rows < q_len
        position = offset + rows
        dims = tl.arange(0, PADDED_HEAD)
        values = tl.arange(0, PADDED_VALUE)
        rows64 = rows.to(tl.int64)
        row_at = (batch * heads + head) * q_len + rows64
        q = tl.load(
            q_ptr
            + batch * stride_qb
            + head * stride_qh
            + rows64[:, None] * stride_ql
            + dims[None, :] * stride_qd,
            mask=real[:, None] & (dims[None, :] < HEAD_SIZE),
            other=0.0,
        )
        dout = tl.load(
            dout_ptr
            + ((batch * q_len + rows64[:, None]) * heads + head) * VALUE_SIZE
            + values[None, :],
            mask=real[:, None] & (values[None, :] < VALUE_SIZE),
            other=0.0,
        )
        lse = tl.load(lse_ptr + row_at, mask=real, other=-float("inf"))
        delta = tl.load(delta_ptr + row_at, mask=real, other=0.0)
        voter_at = batch * heads + head
        vote = row_block
        if DECODE:
            voter_at = batch * (heads // group) + head // group
            vote = first_row

        low = 0
        high = tl.cdiv(keys, BLOCK_K)
        if HAS_WINDOW:
            low = tl.maximum(offset + start - window + 1, 0) // BLOCK_K
        if CAUSAL:
            last = offset + tl.minimum(start + BLOCK_Q, q_len) - 1
            high = tl.minimum(high, last // BLOCK_K + 1)
        dq = tl.zeros([BLOCK_Q, PADDED_HEAD], tl.float32)
        for block in range(low, high):
            kept = was_kept(
                skips_ptr, voter_at, vote, rows, block, n_votes, skip_bytes, q_len, DECODE
            )
            if tl.max(kept.to(tl.int32), 0) > 0:
                column = block * BLOCK_K + tl.arange(0, BLOCK_K)
                inside = column < keys
                at = (first + column)[:, None].to(tl.int64)
                k = tl.load(
                    k_ptr
                    + batch * stride_kb
                    + (head // group) * stride_kh
                    + at * stride_kl
                    + dims[None, :] * stride_kd,
                    mask=inside[:, None] & (dims[None, :] < HEAD_SIZE),
                    other=0.0,
                )
                v = tl.load(
                    v_ptr
                    + batch * stride_vb
                    + (head // group) * stride_vh
                    + at * stride_vl
                    + values[None, :] * stride_vd,
                    mask=inside[:, None] & (values[None, :] < VALUE_SIZE),
                    other=0.0,
                )
                visible = is_visible(
                    position,
                    column,
                    inside,
                    valid_ptr,
                    batch * kv_len + first,
                    window,
                    CAUSAL,
                    HAS_WINDOW,
                )
                _, ds = weights_and_slopes(
                    q, k, v, dout, lse, delta, visible & kept[:, None], scale, softcap, HAS_SOFTCAP
                )
                dq += dot(narrow(ds, k.dtype), k)
        tl.store(
            dq_ptr + row_at[:, None] * HEAD_SIZE + dims[None, :],
            narrow(dq, dq_ptr.dtype.element_ty),
            mask=real[:, None] & (dims[None, :] < HEAD_SIZE),
        )
