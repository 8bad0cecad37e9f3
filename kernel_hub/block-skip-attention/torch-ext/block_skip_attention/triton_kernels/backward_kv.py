"""The backward of k and v in Triton; see `backward_weights.py`."""

import triton
import triton.language as tl

from .backward_weights import row_range, was_kept, weights_and_slopes
from .rules import dot, is_visible, narrow


@triton.jit
def dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    skips_ptr,
    valid_ptr,
    request_ptr,
    dk_ptr,  # [B, Hkv, Lk, D]
    dv_ptr,  # [B, Hkv, Lk, Dv]
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
    """DK and dV of one key block of one key/value head; grid `(NK, Hkv, B)`."""
    block = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    first, keys, offset, first_row = row_range(request_ptr, batch, q_len, kv_len, CAUSAL)
    begin = block * BLOCK_K
    if begin < keys:
        column = begin + tl.arange(0, BLOCK_K)
        inside = column < keys
        dims = tl.arange(0, PADDED_HEAD)
        values = tl.arange(0, PADDED_VALUE)
        at = (first + column)[:, None].to(tl.int64)
        k = tl.load(
            k_ptr
            + batch * stride_kb
            + kv_head * stride_kh
            + at * stride_kl
            + dims[None, :] * stride_kd,
            mask=inside[:, None] & (dims[None, :] < HEAD_SIZE),
            other=0.0,
        )
        v = tl.load(
            v_ptr
            + batch * stride_vb
            + kv_head * stride_vh
            + at * stride_vl
            + values[None, :] * stride_vd,
            mask=inside[:, None] & (values[None, :] < VALUE_SIZE),
            other=0.0,
        )
        # The block rows that may see any of these keys.
        low = 0
        high = tl.cdiv(q_len - first_row, BLOCK_Q)
        if CAUSAL:
            low = tl.maximum(begin - (offset + first_row), 0) // BLOCK_Q
        if HAS_WINDOW:
            reach = begin + BLOCK_K - 1 + window - (offset + first_row)
            high = tl.minimum(high, tl.cdiv(tl.maximum(reach, 0), BLOCK_Q))
        dk = tl.zeros([BLOCK_K, PADDED_HEAD], tl.float32)
        dv = tl.zeros([BLOCK_K, PADDED_VALUE], tl.float32)
        for step in range(group * tl.maximum(high - low, 0)):
            head = kv_head * group + step // (high - low)
            row_block = low + step % (high - low)
            rows = first_row + row_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
            voter_at = batch * heads + head
            vote = row_block
            if DECODE:
                voter_at = batch * (heads // group) + kv_head
                vote = first_row
            kept = was_kept(
                skips_ptr, voter_at, vote, rows, block, n_votes, skip_bytes, q_len, DECODE
            )
            if tl.max(kept.to(tl.int32), 0) > 0:
                real = rows < q_len
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
                visible = is_visible(
                    offset + rows,
                    column,
                    inside,
                    valid_ptr,
                    batch * kv_len + first,
                    window,
                    CAUSAL,
                    HAS_WINDOW,
                )
                p, ds = weights_and_slopes(
                    q, k, v, dout, lse, delta, visible & kept[:, None], scale, softcap, HAS_SOFTCAP
                )
                dv += dot(tl.trans(narrow(p, dout.dtype)), dout)
                dk += dot(tl.trans(narrow(ds, q.dtype)), q)
        out_at = ((batch * (heads // group) + kv_head) * kv_len + first + column)[:, None]
        tl.store(
            dk_ptr + out_at * HEAD_SIZE + dims[None, :],
            narrow(dk, dk_ptr.dtype.element_ty),
            mask=inside[:, None] & (dims[None, :] < HEAD_SIZE),
        )
        tl.store(
            dv_ptr + out_at * VALUE_SIZE + values[None, :],
            narrow(dv, dv_ptr.dtype.element_ty),
            mask=inside[:, None] & (values[None, :] < VALUE_SIZE),
        )
