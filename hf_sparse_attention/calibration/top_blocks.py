"""BSFA's observations: the thresholds that keep just k blocks of a block row, summed over samples.

The threshold of a block row is the midpoint of its k-th and (k+1)-th largest block maximum (section
4 of the BSFA paper). Sums are integers, in units of 2^-24, so that their order does not matter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_sparse_attention.types import BlockGeometry, Phase

_UNIT = 2.0**-24


def kept_blocks(geometry: BlockGeometry, level: int) -> int:
    """How many competing blocks a level keeps in a block row.

    As many as its number says; where single keys are blocks, that many times 64 of them, so that
    one level means about the same work in every geometry.
    """
    return level if geometry.block_k > 1 else 64 * level


def candidates(seen: Iterable[int], diagonal: range, keep_sink: bool) -> list[int]:
    """The blocks that compete: neither on the diagonal nor, if it is always kept, the sink."""
    return [j for j in seen if j not in diagonal and not (keep_sink and j == 0)]


def midpoints(largest: Tensor, kept: Sequence[int]) -> Tensor:
    """Thresholds that keep just so many blocks, `[len(kept), voters]`, -inf where fewer compete.

    Args:
        largest: `[voters, n]`, the largest score of each competing block.
        kept: ascending.
    """
    n = largest.shape[1]
    largest = largest.double().topk(min(kept[-1] + 1, n) if kept else 0, dim=1).values
    rows = [
        (largest[:, k - 1] + largest[:, k]) / 2
        if n > k
        else largest.new_full((len(largest),), -math.inf)
        for k in kept
    ]
    return torch.stack(rows) if rows else largest.new_zeros((0, len(largest)))


@functools.lru_cache(maxsize=256)
def blocks_by_level(
    geometry: BlockGeometry,
    levels: tuple[int, ...],
    keep_sink: bool,
    phase: Phase,
    length: int,
    window: int | None,
) -> tuple[int, ...]:
    """For one voter of a request: blocks visited, and for each level those that it skips.

    Of complete block rows only: no others are calibrated.
    """
    total = [0] * (1 + len(levels))
    for start in range(0, length - geometry.block_q + 1, geometry.block_q):
        last = start + geometry.block_q - 1
        position = start if phase == "prefill" else last
        first = 0 if window is None else max(0, position - window + 1) // geometry.block_k
        visited = last // geometry.block_k + 1 - first
        always = last // geometry.block_k - position // geometry.block_k + 1
        always += keep_sink and first == 0 and position >= geometry.block_k
        total[0] += visited
        for n, level in enumerate(levels):
            total[1 + n] += max(0, visited - always - kept_blocks(geometry, level))
    return tuple(total)


@dataclass
class TopBlocks:
    """Midpoints of one geometry, phase and layer, over samples.

    Args:
        sums: int64 `[levels, voters, positions]`, of finite midpoints, in units of 2^-24.
        finite: int64, how many of them there were, in the same shape.
        samples: int64 `[positions]`, how many samples reached each position.
    """

    sums: Tensor
    finite: Tensor
    samples: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @classmethod
    def empty(cls, levels: int, voters: int) -> TopBlocks:
        """Nothing seen yet."""
        nothing = torch.zeros((levels, voters, 0), dtype=torch.int64)
        return cls(nothing, nothing)

    @classmethod
    def of(cls, tops: Tensor) -> TopBlocks:
        """One sample's midpoints `[levels, voters, positions]`."""
        tops = tops.double().cpu()
        finite = tops.isfinite()
        sums = (tops.masked_fill(~finite, 0.0) / _UNIT).round().long()
        return cls(sums, finite.long(), torch.ones(tops.shape[2], dtype=torch.int64))

    def add(self, other: TopBlocks) -> None:
        """Adds other samples."""
        positions = max(len(self.samples), len(other.samples))

        def both(a: Tensor, b: Tensor) -> Tensor:
            return pad(a, (0, positions - a.shape[-1])) + pad(b, (0, positions - b.shape[-1]))

        self.sums = both(self.sums, other.sums)
        self.finite = both(self.finite, other.finite)
        self.samples = both(self.samples, other.samples)

    def thresholds(self) -> Tensor:
        """T, float32 `[levels, voters, positions]`; -inf where a sample had too few blocks."""
        mean = self.sums.double() * _UNIT / self.samples
        return mean.masked_fill(self.finite < self.samples, -math.inf).float()
