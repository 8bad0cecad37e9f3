"""What calibration learns from one attention: block maxima and gaps, block row by block row.

lambda < 1 leaves every running max where dense attention has it (DESIGN: a skipped block never
raises it), so the gap `max_i (m_new_i - m_i)` of each block, seen once, tells for every lambda
whether the block would be skipped. BSFA needs less: the largest score of each block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_sparse_attention.backends.reference import visit_order
from hf_sparse_attention.types import AttentionCall, BlockGeometry, Phase

_SCORES_AT_A_TIME = 2**24  # float32 scores held at once: 64 MiB


@dataclass(frozen=True)
class BlockRow:
    """One block row of one attention, for a run of key/value heads.

    Args:
        phase: `prefill`, or `decode` for a single position as if it were the newest.
        heads: the voters here: query heads in prefill, key/value heads in decode.
        position: of the first query; kv_len: L of the request that it is part of.
        row_max: `[voters, rows, NK]`, largest score of each row in each block, -inf if it sees
            none.
        seen: the blocks that hold a visible key; diagonal: those that the causal diagonal crosses.
        full: whether the block row has all its `block_q` queries.
    """

    phase: Phase
    heads: slice
    position: int
    kv_len: int
    row_max: Tensor
    seen: list[int]
    diagonal: range
    full: bool

    def gaps(self, geometry: BlockGeometry) -> Tensor:
        """`max_i (m_new_i - m_i)` of each visited block, `[voters, visited]`, in visiting order.

        inf where the block is never skipped; section 2 of the BLASST paper, with our orders.
        """
        seed, splits = visit_order(self.seen, geometry, self.diagonal, self.phase == "decode")
        nothing = self.row_max.new_full((*self.row_max.shape[:2], 1), -math.inf)
        start = torch.cat([nothing, self.row_max[..., seed]], dim=-1).amax(-1, keepdim=True)
        gaps = [self.row_max.new_full((len(self.row_max), len(seed)), math.inf)]
        for split in splits:
            m_new = self.row_max[..., split]
            m = torch.cat([start, m_new], dim=-1).cummax(dim=-1).values[..., :-1]
            # A row that sees nothing of a block does not mind its being skipped: -inf - -inf.
            gaps.append((m_new - m).masked_fill(m_new == -math.inf, -math.inf).amax(dim=1))
        return torch.cat(gaps, dim=1)


def block_rows(call: AttentionCall, geometry: BlockGeometry) -> Iterator[BlockRow]:
    """The block rows of an unpadded causal prefill, and each one's last query as a decode step.

    Args:
        call: one request, `[1, Hq, L, D]` against as many keys.
        geometry: how to cut it.
    """
    length = call.q.shape[2]
    kv_heads, group = call.k.shape[1], call.group
    block_q, block_k = geometry.block_q, geometry.block_k
    padding = -length % block_k
    keys = pad(call.k[0].float(), (0, 0, 0, padding)).transpose(1, 2)  # [Hkv, D, K]
    queries = call.q[0].float().reshape(kv_heads, group, length, -1) * call.scale
    step = max(1, _SCORES_AT_A_TIME // (group * block_q * (length + padding)))
    for start in range(0, length, block_q):
        stop = min(start + block_q, length)
        first = 0 if call.window is None else max(0, start - call.window + 1) // block_k
        for h in range(0, kv_heads, step):
            some = slice(h, min(h + step, kv_heads))
            row_max = _row_max(call, queries[some, :, start:stop], keys[some], start, block_k)
            yield BlockRow(
                "prefill",
                slice(some.start * group, some.stop * group),
                start,
                min(length, call.window or length),
                row_max.flatten(0, 1),
                list(range(first, row_max.shape[-1])),
                range(start // block_k, (stop - 1) // block_k + 1),
                stop - start == block_q,
            )
            last = stop - 1
            first_of_last = 0 if call.window is None else max(0, last - call.window + 1) // block_k
            yield BlockRow(
                "decode",
                some,
                last,
                min(stop, call.window or stop),
                row_max[:, :, -1],  # the group's heads vote together
                list(range(first_of_last, row_max.shape[-1])),
                range(last // block_k, last // block_k + 1),
                stop - start == block_q,
            )


def _row_max(call: AttentionCall, q: Tensor, k: Tensor, start: int, block_k: int) -> Tensor:
    """Scores of `q` `[h, G, R, D]` (scaled) cut down to `[h, G, R, NK]`, NK up to the diagonal."""
    rows = q.shape[2]
    end = -(-(start + rows) // block_k) * block_k
    scores = (q.flatten(1, 2) @ k[:, :, :end]).view(*q.shape[:3], end)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    position = torch.arange(start, start + rows, device=q.device)[:, None]
    column = torch.arange(end, device=q.device)
    hidden = column > position
    if call.window is not None:
        hidden |= column <= position - call.window
    return scores.masked_fill_(hidden, -math.inf).view(*q.shape[:3], -1, block_k).amax(dim=-1)


# Histograms of u = gap + ln(L): a block is skipped under `scale_factor` if u < ln(scale_factor).
U_MIN, U_BINS, BINS_PER_NAT = -32.0, 800, 16


@dataclass
class GapHistograms:
    """BLASST's observations: how many blocks have which gap, by phase, layer and length.

    A block with gap g in a request of L keys is skipped by `scale_factor` if `g + ln L` is below
    its logarithm, so lengths are comparable. Memory does not grow with lengths or samples.
    """

    geometry: BlockGeometry
    #: `[Hq | Hkv, U_BINS + 1]` int64, the last bin for blocks that no lambda < 1 skips.
    counts: dict[tuple[Phase, int, int], Tensor] = field(default_factory=dict)

    def add(self, layer: int, heads: int, row: BlockRow) -> None:
        """Adds a block row of a layer that has `heads` voters."""
        gaps = row.gaps(self.geometry)
        u = (gaps + math.log(row.kv_len) - U_MIN) * BINS_PER_NAT
        index = u.clamp(0, U_BINS - 1).to(torch.int64).masked_fill(gaps >= 0, U_BINS)
        # Prefill lengths are few, the calibration's own; decode's are grouped by half octaves.
        length = row.kv_len if row.phase == "prefill" else _half_octave(row.kv_len)
        key = (row.phase, layer, length)
        if key not in self.counts:
            shape = (heads, U_BINS + 1)
            self.counts[key] = torch.zeros(shape, dtype=torch.int64, device=gaps.device)
        self.counts[key][row.heads].scatter_add_(1, index, torch.ones_like(index))

    def lengths(self, phase: Phase) -> list[int]:
        """The lengths seen in `phase`, ascending."""
        return sorted({length for each, _, length in self.counts if each == phase})

    def total(self, phase: Phase, length: int) -> Tensor:
        """The histogram over all layers and heads at `length`, `[U_BINS + 1]`."""
        parts = [
            x.sum(dim=0).cpu()
            for (each, _, n), x in self.counts.items()
            if each == phase and n == length
        ]
        return torch.stack(parts).sum(dim=0)


def _half_octave(length: int) -> int:
    return round(2 ** (round(2 * math.log2(length)) / 2))


@dataclass
class TopBlocks:
    """BSFA's observations: for several k, the midpoint of the k-th and (k+1)-th largest block max.

    Summed over samples, per phase and layer: `[levels, heads, positions]` float64, and how many
    samples reached each position. -inf where fewer than k + 1 blocks compete: nothing may be
    skipped there.
    """

    geometry: BlockGeometry
    levels: list[int]
    keep_sink: bool
    sums: dict[tuple[Phase, int], Tensor] = field(default_factory=dict)
    samples: dict[tuple[Phase, int], Tensor] = field(default_factory=dict)
    #: By phase: blocks visited, and for each level those beyond the k that are kept.
    blocks: dict[Phase, list[int]] = field(default_factory=dict)

    def add(self, layer: int, heads: int, row: BlockRow) -> None:
        """Adds a block row of a layer that has `heads` voters; incomplete ones say nothing.

        Nor do modules without a layer number (negative ones): thresholds are found by it.
        """
        if not row.full or layer < 0:
            return
        always = {*row.diagonal, 0} if self.keep_sink else {*row.diagonal}
        candidates = [j for j in row.seen if j not in always]
        largest = row.row_max.amax(dim=1)[:, candidates].double()
        largest = largest.topk(min(self.levels[-1] + 1, len(candidates)), dim=1).values
        key, i = (row.phase, layer), row.position // self.geometry.block_q
        sums, samples = self._room(key, heads, i + 1, largest.device)
        for n, k in enumerate(self.levels):
            if len(candidates) > k:
                sums[n, row.heads, i] += (largest[:, k - 1] + largest[:, k]) / 2
            else:
                sums[n, row.heads, i] = -math.inf
        if row.heads.start == 0:
            samples[i] += 1
        here = [len(row.seen), *(max(0, len(candidates) - k) for k in self.levels)]
        voters = row.heads.stop - row.heads.start
        before = self.blocks.get(row.phase, [0] * len(here))
        self.blocks[row.phase] = [x + voters * n for x, n in zip(before, here, strict=True)]

    def predicted_sparsity(self, phase: Phase) -> dict[str, float]:
        """The sparsity that keeping exactly k gives on the same samples, by k (paper, 5.1)."""
        visited, *skipped = self.blocks[phase]
        return {str(k): round(n / visited, 4) for k, n in zip(self.levels, skipped, strict=True)}

    def _room(
        self, key: tuple[Phase, int], heads: int, positions: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The accumulators for `key`, with room for `positions`."""
        if key not in self.sums:
            shape = (len(self.levels), heads, 0)
            self.sums[key] = torch.zeros(shape, dtype=torch.float64, device=device)
            self.samples[key] = torch.zeros(0, dtype=torch.int64, device=device)
        missing = max(0, positions - len(self.samples[key]))
        self.sums[key] = pad(self.sums[key], (0, missing))
        self.samples[key] = pad(self.samples[key], (0, missing))
        return self.sums[key], self.samples[key]

    def table(self, phase: Phase, heads: int) -> Tensor | None:
        """T, `[levels, layers, heads, positions]` float32; None if no block row was complete.

        Layers that were not seen get -inf; shorter layers or positions reuse their last entry.
        """
        layers = {layer: x for (each, layer), x in self.sums.items() if each == phase}
        positions = max((x.shape[2] for x in layers.values()), default=0)
        if positions == 0:
            return None
        table = torch.full((len(self.levels), max(layers) + 1, heads, positions), -math.inf)
        for layer, sums in layers.items():
            mean = (sums / self.samples[phase, layer]).float().cpu()
            mean = mean.repeat_interleave(heads // mean.shape[1], dim=1)  # decode: a group's heads
            mean = torch.cat(
                [mean, mean[..., -1:].expand(-1, -1, positions - mean.shape[2])], dim=2
            )
            table[:, layer] = mean
        return table
