"""The end of decode in Triton: the splits of a query head and position, joined."""

import triton
import triton.language as tl

from .rules import block_max, narrow

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def join_kernel(
    acc_ptr,  # as decode_kernel wrote them
    sums_ptr,
    sinks_ptr,  # float32 [Hq] or none
    out_ptr,  # [B, Lq, Hq, Dv]
    lse_ptr,  # float32 [B, Hq, Lq]
    dropped_ptr,  # float32 [B, Hq, Lq] or none
    q_len,
    heads,
    n_splits,
    VALUE_SIZE: tl.constexpr,
    PADDED_VALUE: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
):
    """The splits of one query head and position; grid `(Lq * Hq, B)`."""
    head = tl.program_id(0) % heads
    row = tl.program_id(0) // heads
    batch = tl.program_id(1).to(tl.int64)
    splits = tl.arange(0, PADDED_SPLITS)
    values = tl.arange(0, PADDED_VALUE)
    real = splits < n_splits
    row_at = (batch * heads + head) * q_len + row
    at = row_at * n_splits + splits
    m = tl.load(sums_ptr + at * 4, mask=real, other=-float("inf"))
    l = tl.load(sums_ptr + at * 4 + 1, mask=real, other=0.0)
    top = tl.load(sums_ptr + at * 4 + 2, mask=real, other=-float("inf"))

    sees = (block_max(top, 0) == -float("inf")) == 0
    largest = tl.max(m, 0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head)
        largest = tl.maximum(largest, sink)
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    weight = tl.exp2((m - shift) * LOG2_E)
    total = tl.sum(l * weight, 0)
    if sinks_ptr is not None:
        total += tl.exp2((sink - shift) * LOG2_E)
    acc = tl.zeros([PADDED_VALUE], tl.float32)
    for split in range(n_splits):
        mine = tl.sum(tl.where(splits == split, weight, 0.0), 0)
        acc += mine * tl.load(
            acc_ptr + (row_at * n_splits + split) * VALUE_SIZE + values,
            mask=values < VALUE_SIZE,
            other=0.0,
        )
    empty = total == 0.0
    lse = shift + tl.log2(tl.where(empty, 1.0, total)) * LN_2
    lse = tl.where(empty | (sees == 0), -float("inf"), lse)
    result = tl.where(sees, acc / tl.where(empty, 1.0, total), 0.0)
    tl.store(
        out_ptr + ((batch * q_len + row) * heads + head) * VALUE_SIZE + values,
        narrow(result, out_ptr.dtype.element_ty),
        mask=values < VALUE_SIZE,
    )
    tl.store(lse_ptr + row_at, lse)
    if dropped_ptr is not None:
        c = tl.load(sums_ptr + at * 4 + 3, mask=real, other=0.0)
        unit = tl.max(tl.where(c > 0.0, top, -float("inf")), 0)
        unit = tl.where(unit == -float("inf"), 0.0, unit)
        c = tl.sum(tl.where(c > 0.0, c * tl.exp2((top - unit) * LOG2_E), 0.0), 0)
        log_c = unit + tl.log2(tl.where(c > 0.0, c, 1.0)) * LN_2
        share = 1.0 / (1.0 + tl.exp2((lse - log_c) * LOG2_E))
        tl.store(dropped_ptr + row_at, tl.where(c > 0.0, share, 0.0))
