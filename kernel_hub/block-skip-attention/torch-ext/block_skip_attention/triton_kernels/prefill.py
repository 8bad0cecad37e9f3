"""Prefill in Triton: one program computes one block row of one query head.

It visits the key blocks in the geometry's order. For each it computes the scores and their row
maxima, lets the rows vote, and only if the block is kept takes the exponentials, loads V and
multiplies: a skip is a branch around all three.

Positions and columns count from the request's own first valid key, so that padding changes nothing.
"""

import triton
import triton.language as tl

from .rules import (
    agrees_to_skip,
    block_max,
    block_scores,
    dot,
    in_all_rows,
    is_visible,
    larger,
    narrow,
    span,
    update_dropped,
    visit,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    valid_ptr,  # bool [B, Lk] or none
    request_ptr,  # int32 [B, 3] or none, see `span`
    sinks_ptr,  # float32 [Hq] or none
    log_lambda_ptr,  # float32 [B|1, Hq|1] or none
    threshold_ptr,  # float32 [B|1, Hq|1, NQ|1] or none
    eps_ptr,  # float32 [B|1, Hq|1] or none
    out_ptr,  # [B, Lq, Hq, Dv]
    lse_ptr,  # float32 [B, Hq, Lq]
    counts_ptr,  # int32 [B, Hq, NQ, 2]: visited, skipped
    skips_ptr,  # int8 [B, Hq, NQ, NK] or none
    dropped_ptr,  # float32 [B, Hq, Lq] or none
    scale,
    softcap,
    window,
    q_len,
    kv_len,
    heads,
    group,
    n_rows,
    n_blocks,
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
    stride_lb,  # of log_lambda; 0 where it is broadcast
    stride_lh,
    stride_tb,
    stride_th,
    stride_tr,
    stride_eb,
    stride_eh,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PADDED_HEAD: tl.constexpr,  # powers of two
    PADDED_VALUE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ORDER: tl.constexpr,  # 0 ascending, 1 sink and diagonal first, 2 descending
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KEEP_SINK: tl.constexpr,
    WANTS_DROPPED: tl.constexpr,
    BY_SCAN: tl.constexpr,  # see `in_all_rows`
):
    """One block row of one query head; grid `(NQ, Hq, B)`."""
    # The longest block rows come first: the last programs to start are short ones.
    row_block = n_rows - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)  # a head's first element may lie beyond 2^31
    batch = tl.program_id(2).to(tl.int64)

    first, keys, offset = span(request_ptr, batch, q_len, kv_len)
    first_row = 0
    end_row = q_len
    if CAUSAL:
        first_row = tl.minimum(tl.maximum(-offset, 0), q_len)
        end_row = tl.minimum(tl.maximum(keys - offset, 0), q_len)
    if keys == 0:
        first_row = q_len

    start = first_row + row_block * BLOCK_Q
    if start < q_len:
        rows = start + tl.arange(0, BLOCK_Q)
        real = rows < q_len
        position = offset + rows
        voting = real & ((start >= end_row) | (rows < end_row))

        dims = tl.arange(0, PADDED_HEAD)
        values = tl.arange(0, PADDED_VALUE)
        columns = tl.arange(0, BLOCK_K)
        q = tl.load(
            q_ptr
            + batch * stride_qb
            + head * stride_qh
            + rows[:, None].to(tl.int64) * stride_ql
            + dims[None, :] * stride_qd,
            mask=real[:, None] & (dims[None, :] < HEAD_SIZE),
            other=0.0,
        )
        k_base = k_ptr + batch * stride_kb + (head // group) * stride_kh
        v_base = v_ptr + batch * stride_vb + (head // group) * stride_vh

        log_lambda = 0.0
        if log_lambda_ptr is not None:
            log_lambda = tl.load(log_lambda_ptr + batch * stride_lb + head * stride_lh)
        threshold = 0.0
        if threshold_ptr is not None:
            threshold = tl.load(
                threshold_ptr + batch * stride_tb + head * stride_th + row_block * stride_tr
            )
        eps = 0.0
        if eps_ptr is not None:
            eps = tl.load(eps_ptr + batch * stride_eb + head * stride_eh)

        # The blocks that any row may see, and among them those on the diagonal.
        low = 0
        high = tl.cdiv(keys, BLOCK_K)
        diagonal_low = high
        diagonal_high = high
        last = offset + tl.minimum(start + BLOCK_Q, q_len) - 1
        if HAS_WINDOW:
            low = tl.maximum(offset + start - window + 1, 0) // BLOCK_K
        if CAUSAL:
            high = tl.minimum(high, last // BLOCK_K + 1)
            diagonal_low = tl.minimum((offset + start) // BLOCK_K, high)
            diagonal_high = high

        m = tl.full([BLOCK_Q], -float("inf"), tl.float32)  # running max of what was kept
        l = tl.zeros([BLOCK_Q], tl.float32)  # its sum, in units of exp(m)
        acc = tl.zeros([BLOCK_Q, PADDED_VALUE], tl.float32)
        top = tl.full([BLOCK_Q], -float("inf"), tl.float32)  # max of all that was seen
        c = tl.zeros([BLOCK_Q], tl.float32)  # bound on what was dropped, in units of exp(top)
        visited = 0
        skipped = 0
        for t in range(tl.maximum(high - low, 0)):
            block = visit(t, low, high, diagonal_low, diagonal_high, ORDER)
            column = block * BLOCK_K + columns
            inside = column < keys
            k = tl.load(
                k_base
                + (first + column)[:, None].to(tl.int64) * stride_kl
                + dims[None, :] * stride_kd,
                mask=inside[:, None] & (dims[None, :] < HEAD_SIZE),
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
            s = block_scores(q, k, visible & real[:, None], scale, softcap, HAS_SOFTCAP)
            m_new = block_max(s, 1)

            seen = in_all_rows(m_new == -float("inf"), BY_SCAN) == 0  # NaN is seen
            c_then, top_then = update_dropped(c, top, m_new, BLOCK_K)
            agrees = agrees_to_skip(
                m_new,
                m,
                l,
                c_then,
                top_then,
                log_lambda_ptr,
                log_lambda,
                threshold_ptr,
                threshold,
                eps_ptr,
                eps,
            )
            must_keep = False
            if threshold_ptr is not None:
                must_keep = (block >= diagonal_low) & (block < diagonal_high)
                if KEEP_SINK:
                    must_keep = must_keep | (block == 0)
            skip = seen & in_all_rows(agrees | (voting == 0), BY_SCAN) & (must_keep == 0)
            visited += seen.to(tl.int32)
            skipped += skip.to(tl.int32)
            if skips_ptr is not None:
                at = ((batch * heads + head) * n_rows + row_block) * n_blocks + block
                tl.store(skips_ptr + at, skip.to(tl.int8))
            if seen & (skip == 0):
                m_then = tl.maximum(m, m_new)
                shift = tl.where(m_then == -float("inf"), 0.0, m_then)
                p = tl.exp2((s - shift[:, None]) * LOG2_E)
                alpha = tl.exp2((m - shift) * LOG2_E)
                v = tl.load(
                    v_base
                    + (first + column)[:, None].to(tl.int64) * stride_vl
                    + values[None, :] * stride_vd,
                    mask=inside[:, None] & (values[None, :] < VALUE_SIZE),
                    other=0.0,
                )
                acc = acc * alpha[:, None] + dot(narrow(p, v.dtype), v)
                l = l * alpha + tl.sum(p, 1)
                m = m_then
            if WANTS_DROPPED:
                # A kept block raises `top` as well, and c's unit with it.
                rescaled = tl.where(
                    c > 0.0, c * tl.exp2((top - tl.maximum(top, m_new)) * LOG2_E), 0.0
                )
                c = tl.where(skip, c_then, rescaled)
            top = larger(top, m_new)

        shift = tl.where(m == -float("inf"), 0.0, m)
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + head)
            # The sink may outweigh everything by far: its logit then is the unit.
            unit = tl.maximum(m, sink)
            alpha = tl.exp2((m - unit) * LOG2_E)
            l = l * alpha + tl.exp2((sink - unit) * LOG2_E)
            acc = acc * alpha[:, None]
            shift = unit
        sees = (top == -float("inf")) == 0
        empty = l == 0.0
        lse = shift + tl.log2(tl.where(empty, 1.0, l)) * LN_2
        lse = tl.where(empty | (sees == 0), -float("inf"), lse)
        result = tl.where(sees[:, None], acc / tl.where(empty, 1.0, l)[:, None], 0.0)
        rows64 = rows.to(tl.int64)
        tl.store(
            out_ptr
            + ((batch * q_len + rows64[:, None]) * heads + head) * VALUE_SIZE
            + values[None, :],
            narrow(result, out_ptr.dtype.element_ty),
            mask=real[:, None] & (values[None, :] < VALUE_SIZE),
        )
        row_at = (batch * heads + head) * q_len + rows64
        tl.store(lse_ptr + row_at, lse, mask=real)
        if WANTS_DROPPED:
            # c / (l + c) = 1 / (1 + exp(lse) / c), in units that cannot overflow.
            log_c = top + tl.log2(tl.where(c > 0.0, c, 1.0)) * LN_2
            share = 1.0 / (1.0 + tl.exp2((lse - log_c) * LOG2_E))
            tl.store(dropped_ptr + row_at, tl.where(c > 0.0, share, 0.0), mask=real)
        counted = start < end_row
        at = ((batch * heads + head) * n_rows + row_block) * 2
        tl.store(counts_ptr + at, tl.where(counted, visited, 0))
        tl.store(counts_ptr + at + 1, tl.where(counted, skipped, 0))
