"""Which blocks decode need not read: an int8 copy of K proves that they will be skipped.

One program scans up to WORD_BLOCKS blocks for one position and GQA group, and writes a bit for
each. It computes the scores of the seed (block 0 and the newest block), as decode does; from their
maximum follows what every later block will at least be compared with. The proof:
docs/int8-filter.md.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .int8_keys import (
    CHUNK,
    LARGEST_NORM,
    NORM_SLACK,
    check_copy,
    int8_norm,
    int8_scale,
    nearest,
    read_mean,
)
from .rules import (
    LARGEST_LOG_LAMBDA,
    block_max,
    block_scores,
    blocks_seen,
    is_visible,
    larger,
    load_keys,
    load_queries,
    smaller,
    span,
    vote_of,
)

WORD_BLOCKS = tl.constexpr(16)
U = tl.constexpr(2.0**-24)
#: K smaller than this is read sooner than a second kernel starts. Not measured: 16 MiB take an H200
#: 4 microseconds.
LEAST_KEY_BYTES = 16 << 20


@triton.jit
def prove_kernel(
    q_ptr,
    k_ptr,
    copy_ptr,  # int32, see int8_keys.py
    valid_ptr,  # bool [B, Lk] or none
    request_ptr,  # int32 [B, 3] or none, see `span`
    log_lambda_ptr,  # float32 [B|1, Hq|1] or none
    threshold_ptr,  # float32 [B|1, Hq|1, Lq|1] or none
    proved_ptr,  # int32 [B, Hkv, Lq, ceil(NK / WORD_BLOCKS)]
    scale,  # > 0
    window,
    q_len,
    kv_len,
    kv_heads,
    group,
    head_words,
    n_words,
    cost,  # of scanning a block, in reads of a block of K
    stride_qb,
    stride_qh,
    stride_ql,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_kd,
    stride_lb,
    stride_lh,
    stride_tb,
    stride_th,
    stride_tr,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD: tl.constexpr,  # at least 32: what a tensor core multiplies
    PADDED_GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """One word, for one position and GQA group; grid `(words, Lq * Hkv, B)`."""
    word = tl.program_id(0)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    row = tl.program_id(1) // kv_heads
    batch = tl.program_id(2).to(tl.int64)
    first, keys, offset = span(request_ptr, batch, q_len, kv_len)
    here = offset + row
    low, high, newest = blocks_seen(here, keys, window, BLOCK_K, CAUSAL, HAS_WINDOW)
    first_block = word * WORD_BLOCKS
    begin = tl.maximum(tl.maximum(low, 1), first_block)
    stop = tl.minimum(high, first_block + WORD_BLOCKS)
    if CAUSAL:
        stop = tl.minimum(stop, newest)
    bits = 0
    if begin < stop:
        members = tl.arange(0, PADDED_GROUP)
        real = members < group
        head = kv_head * group + tl.where(real, members, 0)
        dims = tl.arange(0, PADDED_HEAD)
        columns = tl.arange(0, BLOCK_K)
        position = here + tl.zeros([1], tl.int32)  # of all rows
        valid_at = batch * kv_len + first
        q_ptr += batch * stride_qb + row * stride_ql
        q = load_queries(q_ptr, head, real, dims, stride_qh, stride_qd, HEAD_SIZE)
        k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
        copy_ptr += (batch * kv_heads + kv_head) * head_words

        # The seed's running max, and the longest of its keys.
        m = tl.full([PADDED_GROUP], -float("inf"), tl.float32)
        longest = 0.0
        for t in range(2):
            block = tl.where(t == 0, 0, newest)
            if ((t == 0) | (newest != 0)) & (block >= low) & (block < high):
                column = block * BLOCK_K + columns
                inside = column < keys
                k = load_keys(k_base, first + column, inside, dims, stride_kl, stride_kd, HEAD_SIZE)
                visible = is_visible(
                    position, column, inside, valid_ptr, valid_at, window, CAUSAL, HAS_WINDOW
                )
                s = block_scores(q, k, visible & real[:, None], scale, 0.0, False)
                m = tl.maximum(m, block_max(s, 1))
                wide = k.to(tl.float32)
                squares = tl.sum(wide * wide, 1)
                seen = tl.max(visible.to(tl.int32), 0) > 0
                longest = tl.maximum(longest, tl.max(tl.where(seen, squares, 0.0), 0))
        # Squares below the normal range are flushed: hence the term behind.
        longest = tl.sqrt(longest) * NORM_SLACK + 1e-17

        # The query row as q = b q8 + f, all of it times `scale`.
        x = q.to(tl.float32)
        top = tl.max(tl.abs(x), 1)
        unit, inverse = int8_scale(top)
        y = x * inverse[:, None]
        q8 = nearest(y)
        norm = int8_norm(tl.sum(y * y, 1), unit, inverse, HEAD_SIZE)
        missed = int8_norm(tl.sum((y - q8) * (y - q8), 1), unit, inverse, HEAD_SIZE)
        mean = read_mean(copy_ptr, dims, HEAD_SIZE)
        mean_norm = tl.sqrt(tl.sum(mean * mean, 0)) * NORM_SLACK + 1e-17
        along_mean = tl.sum(x * mean[None, :], 1) * scale
        tame = (top < LARGEST_NORM) & (larger(norm, mean_norm) < LARGEST_NORM)
        norm, missed, unit = norm * scale, missed * scale, unit * scale
        tame = tame & (norm < LARGEST_NORM) & (unit >= 1e-30)
        norm, missed = tl.maximum(norm, 1e-35), tl.maximum(missed, 1e-35)  # else flushed
        steps: tl.constexpr = 32 * (HEAD_SIZE + 8) * U

        # What every key's score must be proved to lie below. NaN: nothing does.
        bound = tl.full([PADDED_GROUP], float("inf"), tl.float32)
        if log_lambda_ptr is not None:
            relative = tl.load(log_lambda_ptr + batch * stride_lb + head * stride_lh)
            relative = tl.minimum(relative, LARGEST_LOG_LAMBDA)
            # Decode's own m may differ from this one by the rounding of two products.
            m -= norm * (steps * longest + 1e-30) + 1e-30
            bound = m + relative - 8 * U * (tl.abs(m) + tl.abs(relative))
        if threshold_ptr is not None:
            vote = vote_of(row, offset, q_len, CAUSAL)
            threshold_ptr += batch * stride_tb + vote * stride_tr
            absolute = tl.load(threshold_ptr + head * stride_th)
            bound = smaller(bound, absolute - 8 * U * tl.abs(absolute))
        rest = norm * (steps * mean_norm + 1e-30) + 8 * U * tl.abs(bound) + 1e-30
        room = tl.where(tame, bound - along_mean - rest, -float("inf"))
        per_copied = missed + steps * norm
        per_missed = norm * (1.0 + steps)
        q8 = tl.where(tame[:, None], q8, 0.0).to(tl.int32).to(tl.int8)

        WIDTH: tl.constexpr = (HEAD_SIZE + 3) // 4
        fours = tl.arange(0, PADDED_HEAD // 4)
        debt = 0.0
        for block in range(begin, stop):
            if debt <= 1.0:  # else the scan costs more than it saves
                column = block * BLOCK_K + columns
                visible = is_visible(
                    position, column, column < keys, valid_ptr, valid_at, window, CAUSAL, HAS_WINDOW
                )
                seen = tl.max(visible.to(tl.int32), 0) > 0
                at = first + column
                lane = copy_ptr + (1 + at // CHUNK) * (CHUNK * (WIDTH + 3)) + at % CHUNK
                words = tl.load(
                    lane[None, :] + fours[:, None] * CHUNK,
                    mask=seen[None, :] & (fours[:, None] < WIDTH),
                    other=0,
                )
                lane += WIDTH * CHUNK
                a = tl.load(lane, mask=seen, other=0).to(tl.float32, bitcast=True)
                copied = tl.load(lane + CHUNK, mask=seen, other=0).to(tl.float32, bitcast=True)
                left = tl.load(lane + 2 * CHUNK, mask=seen, other=0).to(tl.float32, bitcast=True)

                most = tl.dot(q8, bytes_of(words, PADDED_HEAD, BLOCK_K)).to(tl.float32)
                most = most * (unit[:, None] * a[None, :]) + (
                    per_copied[:, None] * copied[None, :] + per_missed[:, None] * left[None, :]
                )
                below = (most < room[:, None]) & (a > 0.0)[None, :]
                is_open = seen[None, :] & real[:, None] & (below == 0)
                anyone = tl.max(seen.to(tl.int32), 0)
                proved = anyone & (tl.max(is_open.to(tl.int32)) == 0).to(tl.int32)
                bits |= proved << (block - first_block)
                debt += anyone.to(tl.float32) * cost - proved.to(tl.float32)
    at = ((batch * kv_heads + kv_head) * q_len + row) * n_words + word
    tl.store(proved_ptr + at, bits)


@triton.jit
def bytes_of(words, PADDED_HEAD: tl.constexpr, BLOCK_K: tl.constexpr):
    """int8 [D, keys] of the copy's words [D / 4, keys]."""
    signed = words ^ -2139062144  # 0x80808080: takes 128 off every byte
    even = tl.join(signed, signed >> 16)
    odd = tl.join(signed >> 8, signed >> 24)
    four = tl.join(even, odd).to(tl.int8)  # byte 2 i + j of a word at [..., i, j]
    return tl.reshape(tl.permute(four, (0, 2, 3, 1)), [PADDED_HEAD, BLOCK_K])


def _cost(k: Tensor) -> float:
    """What reading a block of the copy costs, in reads of a block of K."""
    size = k.shape[3]
    return ((size + 3) // 4 * 4 + 12) / (size * k.element_size())


def proved_blocks(
    q: Tensor,
    k: Tensor,
    key_valid: Tensor | None,
    request: Tensor | None,
    rule: tuple[Tensor | None, Tensor | None, Tensor | None],
    shape: dict,
    int8_keys: Tensor | None,
) -> Tensor | None:
    """Bits for `decode_kernel`, int32 `[B, Hkv, Lq, words]`; None where the copy cannot help.

    Raises:
        ValueError: `int8_keys` cannot be a copy of `k`.
    """
    if int8_keys is None:
        return None
    check_copy(int8_keys, k, k.shape[2])
    log_lambda, threshold, eps = rule
    has_rule = log_lambda is not None or threshold is not None
    exact = eps is not None or shape["WANTS_DROPPED"] or shape["HAS_SOFTCAP"]
    if exact or not has_rule or not shape["scale"] > 0 or shape["ORDER"] != 1:
        return None
    if k.numel() * k.element_size() < LEAST_KEY_BYTES:
        return None
    batch, kv_heads, kv_len, size = k.shape
    q_len, group = q.shape[2], q.shape[1] // kv_heads
    n_words = triton.cdiv(kv_len, shape["BLOCK_K"] * WORD_BLOCKS.value)
    proved = q.new_empty((batch, kv_heads, q_len, n_words), dtype=torch.int32)
    words = int8_keys.view(torch.int32)
    own = {
        "PADDED_HEAD": max(32, triton.next_power_of_2(size)),
        "PADDED_GROUP": max(16, triton.next_power_of_2(group)),
        "kv_heads": kv_heads,
        "group": group,
        "head_words": math.prod(words.shape[2:]),
        "n_words": n_words,
        "cost": _cost(k),
    }
    shared = {name: x for name, x in shape.items() if name in prove_kernel.arg_names}
    prove_kernel[(n_words, q_len * kv_heads, batch)](
        q,
        k,
        words,
        key_valid,
        request,
        log_lambda,
        threshold,
        proved,
        **{**shared, **own},
        num_warps=4,
        num_stages=1,
    )
    return proved
