"""What is counted about the blocks of one layer, and where in a row of integers it stands.

Everything is an integer, so that sums do not depend on their order: two processes that share the
samples tell, bit for bit, what one tells alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_sparse_attention.types import BlockGeometry

#: Histograms of u = gap + ln(L): a block is skipped under `scale_factor` if u < ln(scale_factor).
#: One bin more holds the blocks that no lambda < 1 skips.
U_MIN, U_BINS, BINS_PER_NAT = -32.0, 800, 16
BINS = U_BINS + 1

#: The eps for which the budget rule is simulated: eight from 1e-3 to 1, in equal ratios.
BUDGET_GRID: tuple[float, ...] = tuple(10 ** (3 * i / 7 - 3) for i in range(8))

#: Softmax shares are counted in units of 2^-36.
MASS_UNIT = 2.0**-36

# A row: blocks by bin, their mass by bin, blocks visited under the budget, and skipped by eps.
GAPS = slice(0, BINS)
MASS = slice(BINS, 2 * BINS)
BUDGET = slice(2 * BINS, 2 * BINS + 1 + len(BUDGET_GRID))
WIDTH = BUDGET.stop

#: Single keys: the budget is simulated for the first block rows and then for every fourth, which
#: counts fourfold. A key by itself is the costliest of blocks to follow, and the likeliest to be
#: alike in the next block row.
SAMPLED_FROM, SAMPLED_EVERY = 1024, 4


def budget_weight(geometry: BlockGeometry, position: int) -> int:
    """How often the block row from query `position` on counts in the budget's simulation."""
    if geometry.block_k > 1 or position < SAMPLED_FROM:
        return 1
    last = position // geometry.block_q % SAMPLED_EVERY == SAMPLED_EVERY - 1
    return SAMPLED_EVERY if last else 0


def gap_bins(gaps: Tensor, kv_len: int) -> Tensor:
    """The bins of `gaps`, int64: by `gap + ln L`, the last for gaps that are not below 0."""
    u = (gaps + math.log(kv_len) - U_MIN) * BINS_PER_NAT
    index = u.nan_to_num(nan=U_BINS).clamp(0, U_BINS - 1).to(torch.int64)
    return index.masked_fill(~(gaps < 0), U_BINS)


def length_group(length: int) -> int:
    """Half an octave of lengths: those of single positions are as many as there are keys."""
    return round(2 ** (round(2 * math.log2(length)) / 2))
