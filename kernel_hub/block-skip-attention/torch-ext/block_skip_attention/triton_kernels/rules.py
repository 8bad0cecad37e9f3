"""What the Triton kernels share: visibility, scores, and when a row agrees to skip a block."""

import math
import os

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST_LOG_LAMBDA = tl.constexpr(math.log(1.0 - 2.0**-24))
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "") == "1")

# How float32 is multiplied. TF32 alone rounds to 10 bits; three products of it are as good as
# float32's own, and run on tensor cores: by plain multiply-adds the kernels spill, and take a
# minute to compile. AMD's have no such mode.
FLOAT32_DOT = tl.constexpr("ieee" if torch.version.hip else "tf32x3")


@triton.jit
def dot(a, b):
    """A @ b with float32 sums, and without TF32's rounding."""
    if INTERPRETED:  # its dot multiplies bfloat16's bits as if they were integers (Triton 3.9)
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    if a.dtype == tl.float32:
        return tl.dot(a, b, input_precision=FLOAT32_DOT)
    return tl.dot(a, b)


@triton.jit
def larger(a, b):
    """The larger of two; NaN if one of them is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(a, b):
    """The smaller of two; NaN if one of them is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def block_max(x, axis: tl.constexpr):
    """The maximum along `axis`; NaN if there is one, which `tl.max` would leave out."""
    if INTERPRETED:  # where any other reduction takes very long
        return tl.max(x, axis) + tl.sum(tl.where(x == x, 0.0, x), axis)
    return tl.reduce(x, axis, larger)


@triton.jit
def in_all_rows(x, BY_SCAN: tl.constexpr):
    """Whether x, bool [rows], is true in all of them; BY_SCAN: in a way that compiles anywhere."""
    x = x.to(tl.int32)
    if BY_SCAN:
        return tl.max(tl.cumsum(x, 0), 0) == x.shape[0]
    return tl.min(x, 0) > 0


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x, float32, rounded to the nearest value of `dtype`."""
    if INTERPRETED and dtype == tl.bfloat16:  # where a cast only cuts off (Triton 3.9)
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def span(request_ptr, batch, q_len, kv_len):
    """First valid key, number of keys, and the column of query row 0 from that first key.

    Without `request_ptr` (int32 [B, 3]: first valid key, end of valid keys, column of row 0) the
    request is unpadded, and its last query sees its last key.
    """
    first = 0
    end = kv_len
    column = kv_len - q_len
    if request_ptr is not None:
        first = tl.load(request_ptr + batch * 3)
        end = tl.load(request_ptr + batch * 3 + 1)
        column = tl.load(request_ptr + batch * 3 + 2)
    return first, end - first, column - first


@triton.jit
def vote_of(row, offset, q_len, CAUSAL: tl.constexpr):
    """The number of a position's decision in decode: counted from the first that may see a key."""
    vote = row
    if CAUSAL:
        vote = tl.maximum(row - tl.minimum(tl.maximum(-offset, 0), q_len), 0)
    return vote


@triton.jit
def blocks_seen(
    here, keys, window, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr
):
    """The blocks [low, high) that a position in decode may see, and the newest, its diagonal's."""
    low = 0
    high = tl.cdiv(keys, BLOCK_K)
    newest = -1
    if CAUSAL:
        high = tl.where(here < 0, 0, tl.minimum(high, here // BLOCK_K + 1))
        newest = here // BLOCK_K
    if HAS_WINDOW:
        oldest = tl.maximum(here - window + 1, 0)
        low = tl.where(oldest < keys, oldest // BLOCK_K, high)
    return low, high, newest


@triton.jit
def load_queries(q_ptr, head, real, dims, stride_qh, stride_qd, HEAD_SIZE: tl.constexpr):
    """The queries of a group's heads at one position, [heads, D]; zeros where there is none."""
    return tl.load(
        q_ptr + head[:, None] * stride_qh + dims[None, :] * stride_qd,
        mask=real[:, None] & (dims[None, :] < HEAD_SIZE),
        other=0.0,
    )


@triton.jit
def load_keys(k_ptr, column, inside, dims, stride_kl, stride_kd, HEAD_SIZE: tl.constexpr):
    """Keys of one head, [columns, D]; zeros where there is none."""
    return tl.load(
        k_ptr + column[:, None].to(tl.int64) * stride_kl + dims[None, :] * stride_kd,
        mask=inside[:, None] & (dims[None, :] < HEAD_SIZE),
        other=0.0,
    )


@triton.jit
def visit(t, low, high, diagonal_low, diagonal_high, ORDER: tl.constexpr):
    """The block that is visited at step t, of those in [low, high).

    Sink and diagonal first: block 0, then the diagonal's, then the rest ascending. The diagonal's
    blocks are the last ones, `[diagonal_low, diagonal_high)`, or none.
    """
    if ORDER == 0:
        return low + t
    if ORDER == 2:
        return high - 1 - t
    sink = tl.where(low == 0, 1, 0)
    start = tl.maximum(diagonal_low, low + sink)
    crossing = tl.maximum(diagonal_high - start, 0)
    rest = low + t - crossing  # low + sink + (t - sink - crossing)
    return tl.where(t < sink, 0, tl.where(t < sink + crossing, start + t - sink, rest))


@triton.jit
def is_visible(
    position,
    column,
    inside,
    valid_ptr,
    valid_at,
    window,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Which row, at `position`, sees which column: bool [rows, columns]."""
    if valid_ptr is not None:
        inside = inside & (tl.load(valid_ptr + valid_at + column, mask=inside, other=0) != 0)
    visible = inside[None, :] & (position[:, None] == position[:, None])
    if CAUSAL:
        visible = visible & (column[None, :] <= position[:, None])
    if HAS_WINDOW:
        visible = visible & (column[None, :] > position[:, None] - window)
    return visible


@triton.jit
def block_scores(q, k, visible, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores of q [rows, D] against k [columns, D], float32, -inf where not visible."""
    s = dot(q, tl.trans(k)) * scale
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), which neither overflows nor loses the sign.
        s = softcap * (1.0 - 2.0 / (tl.exp2((s / softcap) * (2.0 * LOG2_E)) + 1.0))
    return tl.where(visible, s, -float("inf"))


@triton.jit
def update_dropped(c, top, m_new, BLOCK_K: tl.constexpr):
    """The bound on the dropped mass if this block is dropped as well, and its unit exp(top)."""
    top_then = tl.maximum(top, m_new)
    unit = tl.where(top_then == -float("inf"), 0.0, top_then)
    return (
        tl.where(c > 0.0, c * tl.exp2((top - unit) * LOG2_E), 0.0)
        + BLOCK_K * tl.exp2((m_new - unit) * LOG2_E),
        top_then,
    )


@triton.jit
def agrees_to_skip(
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
):
    """Which rows agree to skip a block with row maxima `m_new`: to every condition that is given.

    A row that sees nothing of the block does not mind. Without any condition nobody agrees.
    """
    agrees = m_new == m_new
    if log_lambda_ptr is not None:
        # With lambda < 1 a skipped block cannot raise the running max.
        agrees = agrees & (m_new - m < tl.minimum(log_lambda, LARGEST_LOG_LAMBDA))
    if threshold_ptr is not None:
        agrees = agrees & (m_new < threshold)
    if eps_ptr is not None:
        # c in units of exp(m); with m = -inf nothing is kept yet, and nothing may be dropped.
        c_in_m = c_then * tl.exp2((top_then - m) * LOG2_E)
        agrees = agrees & (c_in_m <= eps * l)
    if log_lambda_ptr is None and threshold_ptr is None and eps_ptr is None:
        agrees = m_new != m_new
    return agrees | (m_new == -float("inf"))
