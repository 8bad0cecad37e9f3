"""Decode in Triton: one program computes one split of the keys, for one position and GQA group.

Block 0 and the newest block are never skipped. Every split starts from the running max that these
two give, so each program computes their scores again (two blocks beside the sixteen or so of its
own), and none waits for another. The first split also adds their values. A second kernel joins the
splits: `join.py`. Blocks that an int8 copy of K proves to be skipped (`prove.py`) are not read.
"""

import triton
import triton.language as tl

from .prove import WORD_BLOCKS
from .rules import (
    agrees_to_skip,
    block_max,
    block_scores,
    blocks_seen,
    dot,
    is_visible,
    larger,
    load_keys,
    load_queries,
    narrow,
    span,
    update_dropped,
    vote_of,
)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    valid_ptr,  # bool [B, Lk] or none
    request_ptr,  # int32 [B, 3] or none, see `span`
    proved_ptr,  # int32 [B, Hkv, Lq, words], which blocks need no K (prove.py), or none
    splits_ptr,  # int32 [B, Lq], how many splits see a block besides the seed; none without holes
    log_lambda_ptr,  # float32 [B|1, Hq|1] or none
    threshold_ptr,  # float32 [B|1, Hq|1, Lq|1] or none
    eps_ptr,  # float32 [B|1, Hq|1] or none
    acc_ptr,  # float32 [B, Hq, Lq, S, Dv]
    sums_ptr,  # float32 [B, Hq, Lq, S, 4]: m, l, top, c of the split
    counts_ptr,  # int32 [B, Hkv, Lq, S, 2]: visited, skipped
    skips_ptr,  # int8 [B, Hkv, Lq, NK] or none
    scale,
    softcap,
    window,
    q_len,
    kv_len,
    kv_heads,
    group,
    n_splits,
    n_blocks,
    split_blocks,  # blocks in a split
    n_words,  # or none
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
    stride_lb,
    stride_lh,
    stride_tb,
    stride_th,
    stride_tr,
    stride_eb,
    stride_eh,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PADDED_HEAD: tl.constexpr,
    PADDED_VALUE: tl.constexpr,
    PADDED_GROUP: tl.constexpr,  # at least 16: what a tensor core multiplies
    BLOCK_K: tl.constexpr,
    ORDER: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KEEP_SINK: tl.constexpr,
    WANTS_DROPPED: tl.constexpr,
):
    """One split, for one position and GQA group; grid `(S, Lq * Hkv, B)`."""
    split = tl.program_id(0)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)  # may start beyond 2^31 elements
    row = tl.program_id(1) // kv_heads
    batch = tl.program_id(2).to(tl.int64)
    heads = kv_heads * group

    first, keys, offset = span(request_ptr, batch, q_len, kv_len)
    vote = vote_of(row, offset, q_len, CAUSAL)

    members = tl.arange(0, PADDED_GROUP)
    real = members < group
    head = kv_head * group + tl.where(real, members, 0)
    dims = tl.arange(0, PADDED_HEAD)
    values = tl.arange(0, PADDED_VALUE)
    columns = tl.arange(0, BLOCK_K)
    position = offset + row + tl.zeros([PADDED_GROUP], tl.int32)
    here = offset + row
    q_ptr += batch * stride_qb + row * stride_ql
    q = load_queries(q_ptr, head, real, dims, stride_qh, stride_qd, HEAD_SIZE)
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh
    valid_at = batch * kv_len + first

    log_lambda = tl.zeros([PADDED_GROUP], tl.float32)
    if log_lambda_ptr is not None:
        log_lambda = tl.load(log_lambda_ptr + batch * stride_lb + head * stride_lh)
    threshold = tl.zeros([PADDED_GROUP], tl.float32)
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr + batch * stride_tb + head * stride_th + vote * stride_tr)
    eps = tl.zeros([PADDED_GROUP], tl.float32)
    if eps_ptr is not None:
        eps = tl.load(eps_ptr + batch * stride_eb + head * stride_eh)

    low, high, newest = blocks_seen(here, keys, window, BLOCK_K, CAUSAL, HAS_WINDOW)

    # How many splits there are to share the seed's sum among.
    splits = 1
    if splits_ptr is not None:
        splits = tl.load(splits_ptr + batch * q_len + row)
    elif ORDER == 1:
        begin = tl.maximum(low, 1)
        stop = tl.where(newest == high - 1, newest, high)
        splits = tl.where(stop > begin, tl.cdiv(stop, split_blocks) - begin // split_blocks, 1)

    m = tl.full([PADDED_GROUP], -float("inf"), tl.float32)
    l = tl.zeros([PADDED_GROUP], tl.float32)
    base = tl.zeros([PADDED_GROUP], tl.float32)  # this split's share of the seed's sum
    acc = tl.zeros([PADDED_GROUP, PADDED_VALUE], tl.float32)
    top = tl.full([PADDED_GROUP], -float("inf"), tl.float32)
    c = tl.zeros([PADDED_GROUP], tl.float32)
    visited = 0
    skipped = 0

    # The seed first (steps 0 and 1), then the blocks of this split, ascending (or descending).
    begin = tl.maximum(low, split * split_blocks)
    stop = tl.minimum(high, (split + 1) * split_blocks)
    for t in range(tl.maximum(stop - begin, 0) + 2):
        is_seed = t < 2
        if ORDER == 2:
            block = stop + 1 - t
        else:
            block = begin + t - 2
        wanted = is_seed == 0
        if ORDER == 1:
            in_seed = (block == 0) | (block == newest)
            wanted = (is_seed & ((t == 0) | (newest != 0))) | ((is_seed == 0) & (in_seed == 0))
            block = tl.where(is_seed, tl.where(t == 0, 0, newest), block)
            wanted = wanted & (block >= low) & (block < high)
        if proved_ptr is not None:  # noqa: SIM102  # which is known when this is compiled
            if wanted & (is_seed == 0):
                word = ((batch * kv_heads + kv_head) * q_len + row) * n_words + block // WORD_BLOCKS
                if (tl.load(proved_ptr + word) >> (block % WORD_BLOCKS)) & 1:
                    # Some key of it is seen, with a finite score, far below the running max.
                    wanted = wanted & is_seed
                    visited += 1
                    skipped += 1
                    if skips_ptr is not None:
                        at = ((batch * kv_heads + kv_head) * q_len + vote) * n_blocks + block
                        tl.store(skips_ptr + at, 1)
                    top = larger(top, -3e38)
        if wanted:
            column = block * BLOCK_K + columns
            inside = column < keys
            k = load_keys(k_base, first + column, inside, dims, stride_kl, stride_kd, HEAD_SIZE)
            visible = is_visible(
                position, column, inside, valid_ptr, valid_at, window, CAUSAL, HAS_WINDOW
            )
            s = block_scores(q, k, visible & real[:, None], scale, softcap, HAS_SOFTCAP)
            m_new = block_max(s, 1)
            seen = (block_max(m_new, 0) == -float("inf")) == 0  # NaN is seen
            c_then, top_then = update_dropped(c, top, m_new, BLOCK_K)
            agrees = agrees_to_skip(
                m_new,
                m,
                l + base,
                c_then,
                top_then,
                log_lambda_ptr,
                log_lambda,
                threshold_ptr,
                threshold,
                eps_ptr,
                eps,
            )
            must_keep = is_seed
            if threshold_ptr is not None:
                must_keep = must_keep | (block == newest)
                if KEEP_SINK:
                    must_keep = must_keep | (block == 0)
            skip = seen & (tl.min((agrees | (real == 0)).to(tl.int32), 0) > 0) & (must_keep == 0)
            visited += (seen & ((is_seed == 0) | (split == 0))).to(tl.int32)
            skipped += skip.to(tl.int32)
            if skips_ptr is not None:
                at = ((batch * kv_heads + kv_head) * q_len + vote) * n_blocks + block
                if is_seed == 0:
                    tl.store(skips_ptr + at, skip.to(tl.int8))
            if seen & (skip == 0):
                m_then = tl.maximum(m, m_new)
                shift = tl.where(m_then == -float("inf"), 0.0, m_then)
                p = tl.exp2((s - shift[:, None]) * LOG2_E)
                alpha = tl.exp2((m - shift) * LOG2_E)
                weight = tl.sum(p, 1)
                base = base * alpha
                l = l * alpha
                if is_seed:
                    base += weight / splits.to(tl.float32)
                else:
                    l += weight
                acc = acc * alpha[:, None]
                if (is_seed == 0) | (split == 0):
                    v = tl.load(
                        v_base
                        + (first + column)[:, None].to(tl.int64) * stride_vl
                        + values[None, :] * stride_vd,
                        mask=inside[:, None] & (values[None, :] < VALUE_SIZE),
                        other=0.0,
                    )
                    acc += dot(narrow(p, v.dtype), v)
                m = m_then
            if WANTS_DROPPED:
                rescaled = tl.where(
                    c > 0.0, c * tl.exp2((top - tl.maximum(top, m_new)) * LOG2_E), 0.0
                )
                c = tl.where(skip, c_then, rescaled)
            top = larger(top, m_new)

    if split == 0:
        l += base * splits.to(tl.float32)
    at = ((batch * heads + head) * q_len + row) * n_splits + split
    tl.store(
        acc_ptr + at[:, None] * VALUE_SIZE + values[None, :],
        acc,
        mask=real[:, None] & (values[None, :] < VALUE_SIZE),
    )
    tl.store(sums_ptr + at * 4, m, mask=real)
    tl.store(sums_ptr + at * 4 + 1, l, mask=real)
    tl.store(sums_ptr + at * 4 + 2, top, mask=real)
    tl.store(sums_ptr + at * 4 + 3, c, mask=real)
    at = (((batch * kv_heads + kv_head) * q_len + row) * n_splits + split) * 2
    counted = here == here
    if CAUSAL:  # positions after the last valid key are padding
        counted = here < keys
    tl.store(counts_ptr + at, tl.where(counted, visited, 0))
    tl.store(counts_ptr + at + 1, tl.where(counted, skipped, 0))
