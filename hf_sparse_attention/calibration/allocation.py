"""One sparsity for the whole model, shared out among layers or heads.

The global fit gives every head the same lambda. Here each layer or head gets its own, such that all
together skip the target and the next block to skip costs each the same softmax mass. Were these
costs to add up, no other sharing of the same sparsity would drop less. (Letting each skip the same
part of its blocks drops two to five times the mass of the global fit on SmolLM2-135M.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_sparse_attention.calibration.curves import Curves, table_of
from hf_sparse_attention.calibration.fitting import lengths_of
from hf_sparse_attention.calibration.observation import Observations
from hf_sparse_attention.calibration.tallies import BINS_PER_NAT, U_MIN
from hf_sparse_attention.config import Granularity
from hf_sparse_attention.types import Phase

_STEPS = 50  # of a bisection: far below the width of a bin


def coefficients(
    observations: Observations,
    geometry: str,
    phase: Phase,
    targets: Sequence[float],
    granularity: Granularity,
) -> tuple[Tensor, Tensor]:
    """`ln a` and `b` for each layer and query head, float32 `[layers, heads]` each.

    Each row's `ln(scale_factor)` at every length and target is fitted by a line in the target.
    Layers and heads that were not seen get -inf and 0: they skip nothing.

    Raises:
        ValueError: every target is out of reach.
    """
    curves = lengths_of(observations, geometry, phase, granularity)
    wanted = [(each, s) for each in curves.values() for s in targets if s < _reach(each)]
    if not wanted:
        raise ValueError(f"target_sparsity: expected one within reach in {phase}, got {targets}")
    shares = torch.stack([share(each, s) for each, s in wanted])  # [points, rows]
    seen = torch.stack([each.blocks > 0 for each, _ in wanted])
    x = torch.tensor([s for _, s in wanted], dtype=torch.float64)
    log_a, b = (
        table_of(rows, observations, geometry, phase, granularity)
        for rows in _lines(x, shares, seen)
    )
    return log_a, b.masked_fill(log_a == -torch.inf, 0.0)


def share(curves: Curves, target: float) -> Tensor:
    """Each row's `ln(scale_factor)`, float64 `[rows]`, together skipping `target` of all.

    Every block is skipped whose cost, as its row's histogram has it, is below one bound for all.
    """

    def at_bound(log_cost: float) -> Tensor:
        cheap = curves.marginal_cost <= math.exp(log_cost)
        return U_MIN + cheap.sum(1).double() / BINS_PER_NAT

    return at_bound(_least(lambda x: curves.total_sparsity(at_bound(x)) >= target, -60.0, 1.0))


def _reach(curves: Curves) -> float:
    """The sparsity that lambda -> 1 gives everywhere."""
    return float((curves.largest * curves.blocks).sum() / curves.blocks.sum())


def _least(enough: Callable[[float], bool], low: float, high: float) -> float:
    """The least number between `low` and `high` that is enough, by bisection."""
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _lines(x: Tensor, y: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of each column of `y` `[points, rows]` on `x` `[points]`, where it was `seen`.

    Start and slope, `[rows]`; -inf and 0 where nothing was seen.
    """
    weight = seen.double()
    count = weight.sum(0).clamp(min=1)
    mean_x = (weight * x[:, None]).sum(0) / count
    mean_y = (weight * y).sum(0) / count
    dx = (x[:, None] - mean_x) * weight
    spread = (dx * dx).sum(0)
    slope = torch.where(spread > 0, (dx * (y - mean_y)).sum(0) / spread.clamp(min=1e-12), 0.0)
    start = mean_y - slope * mean_x
    unseen = ~seen.any(0)
    return start.masked_fill(unseen, -torch.inf), slope.masked_fill(unseen, 0.0)
