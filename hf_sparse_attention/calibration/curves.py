"""Sparsity as a function of the threshold, read off the observations' histograms.

A curve belongs to whatever shares one threshold: everything (a global fit), a layer, or a head. All
of them are kept in one tensor, a row each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad

from hf_sparse_attention.calibration.observation import Observations
from hf_sparse_attention.calibration.tallies import BINS_PER_NAT, BUDGET_GRID, U_BINS, U_MIN
from hf_sparse_attention.config import Granularity
from hf_sparse_attention.types import Phase

#: The marginal cost is averaged over this many bins, half a nat: single bins hold few blocks.
_SMOOTHED = 2 * (BINS_PER_NAT // 4) + 1


@dataclass(frozen=True, eq=False)
class Curves:
    """Histograms of one length, a row for each layer, head or whatever shares a threshold.

    Args:
        gaps: `[rows, U_BINS + 1]`, blocks by `u = gap + ln L`; those with `u < ln(scale_factor)`
            are skipped, the last bin never.
        mass: `[rows, U_BINS + 1]`, the softmax share that those blocks hold.
    """

    gaps: Tensor
    mass: Tensor

    @cached_property
    def _counted(self) -> Tensor:
        """Blocks below each bin's edge, float64 `[rows, U_BINS + 1]`."""
        return pad(self.gaps[:, :-1].double().cumsum(1), (1, 0))

    @cached_property
    def blocks(self) -> Tensor:
        """Blocks in each row, float64 `[rows]`."""
        return self.gaps.double().sum(1)

    @cached_property
    def below(self) -> Tensor:
        """Share of each row's blocks below each bin's edge, `[rows, U_BINS + 1]`."""
        return self._counted / self.blocks.clamp(min=1)[:, None]

    @property
    def largest(self) -> Tensor:
        """The sparsity that lambda -> 1 gives, `[rows]`."""
        return self.below[:, -1]

    def sparsity(self, log_factor: Tensor) -> Tensor:
        """Each row's sparsity `[rows]` under its `ln(scale_factor)` `[rows]` (or `[1]`)."""
        x = ((log_factor.double() - U_MIN) * BINS_PER_NAT).clamp(0, U_BINS)
        x = x.expand(len(self.below))
        i = x.floor().clamp(max=U_BINS - 1).long()[:, None]
        low, high = self.below.gather(1, i)[:, 0], self.below.gather(1, i + 1)[:, 0]
        return low + (high - low) * (x - i[:, 0])

    def total_sparsity(self, log_factor: Tensor) -> float:
        """The sparsity of all rows together."""
        return float((self.sparsity(log_factor) * self.blocks).sum() / self.blocks.sum())

    def total_dropped(self, log_factor: Tensor) -> float:
        """The share of all rows' softmax mass that skipping drops."""
        x = ((log_factor.double() - U_MIN) * BINS_PER_NAT).clamp(0, U_BINS)
        part = (x[:, None] - torch.arange(U_BINS)).clamp(0, 1)  # of each bin
        return float((self.mass[:, :-1] * part).sum() / self.mass.sum())

    def log_factor(self, sparsity: Tensor) -> Tensor:
        """Each row's `ln(scale_factor)` `[rows]` that skips `sparsity` `[rows]` of it.

        As much as lambda < 1 can skip, where that is less.
        """
        wanted = torch.minimum(sparsity.double(), self.largest)[:, None]
        i = ((self.below < wanted).sum(1, keepdim=True) - 1).clamp(0, U_BINS - 1)
        low, high = self.below.gather(1, i), self.below.gather(1, i + 1)
        part = ((wanted - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        return (U_MIN + (i + part) / BINS_PER_NAT)[:, 0]

    @cached_property
    def marginal_cost(self) -> Tensor:
        """What one more block costs at each bin: the softmax share it drops; never falling.

        `[rows, U_BINS]`; infinite beyond the last block that was seen: nobody knows what one would
        cost there.
        """
        window = torch.ones(1, 1, _SMOOTHED, dtype=torch.float64)

        def smooth(x: Tensor) -> Tensor:
            return conv1d(x[:, None, :-1].double(), window, padding=_SMOOTHED // 2)[:, 0]

        blocks, mass = smooth(self.gaps), smooth(self.mass)
        cost = (mass / blocks.clamp(min=1e-12)).masked_fill(blocks < 0.5, 0.0).cummax(1).values
        still_to_come = self.gaps[:, :-1].flip(1).cumsum(1).flip(1)
        return cost.masked_fill(still_to_come == 0, torch.inf)


def curves_of(
    observations: Observations,
    geometry: str,
    phase: Phase,
    length: int,
    granularity: Granularity = "global",
) -> Curves:
    """The curves of one length: one row, or one for each layer, or for each head of each layer.

    Decode has a row for each key/value head, whose group votes together.
    """
    parts = [
        (
            observations.gaps(geometry, phase, layer, length),
            observations.mass(geometry, phase, layer, length),
        )
        for layer in observations.layers
        if layer >= 0 or granularity == "global"
    ]
    if granularity != "head":
        parts = [(gaps.sum(0, keepdim=True), mass.sum(0, keepdim=True)) for gaps, mass in parts]
    gaps, mass = (torch.cat(each) for each in zip(*parts, strict=True))
    if granularity == "global":
        gaps, mass = gaps.sum(0, keepdim=True), mass.sum(0, keepdim=True)
    return Curves(gaps, mass)


def rows_of(
    table: Tensor, observations: Observations, geometry: str, phase: Phase, granularity: Granularity
) -> Tensor:
    """What `table` `[layers, heads]` of query heads says for each row of `curves_of`, `[rows]`."""
    rows = []
    for layer, voters in _voters(observations, geometry, phase, granularity):
        own = table[layer, : observations.heads[layer]]
        rows.append(own[:: len(own) // voters])
    return torch.cat(rows)


def table_of(
    rows: Tensor, observations: Observations, geometry: str, phase: Phase, granularity: Granularity
) -> Tensor:
    """The inverse of `rows_of`: float32 `[layers, heads]`, -inf where there is no such head."""
    voters = _voters(observations, geometry, phase, granularity)
    heads = observations.heads
    table = torch.full((voters[-1][0] + 1, max(heads[layer] for layer, _ in voters)), -torch.inf)
    parts = torch.split(rows.float(), [count for _, count in voters])
    for (layer, count), own in zip(voters, parts, strict=True):
        table[layer, : heads[layer]] = own.repeat_interleave(heads[layer] // count)
    return table


def _voters(
    observations: Observations, geometry: str, phase: Phase, granularity: Granularity
) -> list[tuple[int, int]]:
    """Each numbered layer, and how many rows `curves_of` has for it."""
    length = observations.lengths(phase)[-1]
    by_head = granularity == "head"
    return [
        (layer, len(observations.gaps(geometry, phase, layer, length)) if by_head else 1)
        for layer in observations.layers
        if layer >= 0
    ]


def budget_sparsity(
    observations: Observations, geometry: str, phase: Phase, length: int
) -> tuple[float, ...]:
    """The sparsity that the budget rule gives under each eps of `BUDGET_GRID`."""
    layers = observations.layers
    rows = [observations.budget(geometry, phase, layer, length).sum(0) for layer in layers]
    visited, *skipped = torch.stack(rows).sum(0).tolist()
    assert len(skipped) == len(BUDGET_GRID)
    return tuple(n / max(visited, 1) for n in skipped)
