"""What one attention tells, from the compiled CPU kernel: in little more time than it takes anyway.

The same numbers as `observation_reference`, but for rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_sparse_attention.backends import cpu
from hf_sparse_attention.calibration import tallies
from hf_sparse_attention.calibration.observation_reference import Observed
from hf_sparse_attention.calibration.top_blocks import kept_blocks
from hf_sparse_attention.types import AttentionCall, BlockGeometry, Phase, SkipRule


def serves(call: AttentionCall, geometry: BlockGeometry) -> bool:
    """Whether the kernel can look at `call` under `geometry`."""
    if geometry.block_q != 64 or geometry.order != "sink_diagonal":
        return False
    if geometry.block_k != 1 and geometry.block_k % 64:
        return False
    return (cpu.available() or cpu.supports(call, SkipRule.never(), geometry)) is None


def observe(
    call: AttentionCall,
    geometries: Sequence[BlockGeometry],
    levels: Sequence[int],
    keep_sink: bool,
) -> Observed:
    """As `observation_reference.observe`, for geometries that `serves` accepts."""
    length = call.q.shape[2]
    lengths, groups = _groups(length, call.window)
    out, prefill, decode, prefill_tops, decode_tops = cpu.observe(
        call,
        geometries=torch.tensor([[g.block_k, g.split_k] for g in geometries]),
        kept=torch.tensor(
            [[kept_blocks(g, level) for level in levels] for g in geometries], dtype=torch.int64
        ).reshape(len(geometries), len(levels)),
        keep_sink=keep_sink,
        groups=groups,
        group_count=len(lengths),
        eps=torch.tensor(tallies.BUDGET_GRID, dtype=torch.float32),
        bins=tallies.BINS,
        u_min=tallies.U_MIN,
        bins_per_nat=tallies.BINS_PER_NAT,
        mass_unit=tallies.MASS_UNIT,
        sample_from=tallies.SAMPLED_FROM,
        sample_every=tallies.SAMPLED_EVERY,
    )
    counts: dict[tuple[str, Phase, int], Tensor] = {}
    tops: dict[tuple[str, Phase], Tensor] = {}
    for n, geometry in enumerate(geometries):
        counts[geometry.name, "prefill", min(length, call.window or length)] = prefill[n]
        for i, group in enumerate(lengths):
            counts[geometry.name, "decode", group] = decode[n, i]
        tops[geometry.name, "prefill"] = prefill_tops[n]
        tops[geometry.name, "decode"] = decode_tops[n]
    return Observed(out, counts, tops)


@functools.lru_cache(maxsize=64)
def _groups(length: int, window: int | None) -> tuple[list[int], Tensor]:
    """The lengths at which a request's block rows decode, and each row's place among them."""
    stops = [min(start + 64, length) for start in range(0, length, 64)]
    each = [tallies.length_group(min(stop, window or stop)) for stop in stops]
    lengths = sorted(set(each))
    return lengths, torch.tensor([[lengths.index(n) for n in each]])
