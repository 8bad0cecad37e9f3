"""What one attention tells, in plain torch: the definition, and the way without a kernel.

lambda < 1 leaves every running max where dense attention has it (a skipped block never raises it),
so the gap `max_i (m_new_i - m_i)` of each block, seen once, tells for every lambda whether the
block would be skipped; its share of the final softmax tells what that would drop. The budget rule's
decisions depend on each other and are simulated. BSFA needs the largest score of each block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_sparse_attention.backends.reference import visit_order
from hf_sparse_attention.calibration import tallies
from hf_sparse_attention.calibration.top_blocks import candidates, kept_blocks, midpoints
from hf_sparse_attention.types import PHASES, AttentionCall, BlockGeometry, Phase

_SCORES_AT_A_TIME = 2**24  # float32 scores held at once: 64 MiB


@dataclass(frozen=True)
class Observed:
    """What one request told; voters are query heads in prefill, key/value heads in decode.

    Args:
        out: the dense attention's output, `[1, L, Hq, Dv]`.
        tallies: by geometry name, phase and length, int64 `[voters, tallies.WIDTH]`.
        tops: by geometry name and phase, the midpoints `[levels, voters, positions]` that keep just
            a level's blocks, for each complete block row; -inf where nothing may be skipped.
    """

    out: Tensor
    tallies: dict[tuple[str, Phase, int], Tensor]
    tops: dict[tuple[str, Phase], Tensor]


def observe(
    call: AttentionCall,
    geometries: Sequence[BlockGeometry],
    levels: Sequence[int],
    keep_sink: bool,
) -> Observed:
    """Looks at an unpadded causal prefill of one request, `[1, Hq, L, D]` against as many keys."""
    length, heads = call.q.shape[2], call.q.shape[1]
    out = call.q.new_zeros((1, length, heads, call.v.shape[3]))
    counts: dict[tuple[str, Phase, int], Tensor] = {}
    tops: dict[tuple[str, Phase], Tensor] = {}
    for geometry in geometries:
        for phase, voters in zip(PHASES, (heads, call.k.shape[1]), strict=True):
            shape = (len(levels), voters, length // geometry.block_q)
            tops[geometry.name, phase] = torch.full(shape, -math.inf, device=call.q.device)
    for block_q in sorted({geometry.block_q for geometry in geometries}):
        for row in block_rows(call, block_q):
            if row.out is not None:
                out[0, row.position : row.position + block_q, row.heads] = row.out
            for geometry in geometries:
                if geometry.block_q != block_q:
                    continue
                blocks = Blocks.of(row, geometry)
                voters = heads if row.phase == "prefill" else call.k.shape[1]
                group = row.kv_len if row.phase == "prefill" else tallies.length_group(row.kv_len)
                key = (geometry.name, row.phase, group)
                if key not in counts:
                    counts[key] = torch.zeros(
                        (voters, tallies.WIDTH), dtype=torch.int64, device=call.q.device
                    )
                counts[key][row.heads] += tally(row, blocks, geometry)
                if row.full:
                    kept = [kept_blocks(geometry, level) for level in levels]
                    among = candidates(blocks.seen, blocks.diagonal, keep_sink)
                    tops[geometry.name, row.phase][:, row.heads, row.start // block_q] = midpoints(
                        blocks.top.amax(dim=1)[:, among], kept
                    ).float()
    return Observed(out, counts, tops)


@dataclass(frozen=True)
class BlockRow:
    """One block row of one attention, for a run of key/value heads.

    Args:
        phase: `prefill`, or `decode` for its last query as if that were the newest position.
        heads: the voters here: query heads in prefill, key/value heads in decode.
        start: the first query of the block row; position: the first that takes part.
        kv_len: L of the request that it is part of.
        scores: `[voters, rows, K]` of the keys up to the last query, -inf where hidden. In decode
            the rows are the heads of the group.
        lse: `[voters, rows]`, sinks included.
        first: the first key that some row sees.
        full: whether the block row has all its `block_q` queries.
        out: `[rows, voters, Dv]`, prefill only.
    """

    phase: Phase
    heads: slice
    start: int
    position: int
    kv_len: int
    scores: Tensor
    lse: Tensor
    first: int
    full: bool
    out: Tensor | None = None


def block_rows(call: AttentionCall, block_q: int) -> Iterator[BlockRow]:
    """The block rows of an unpadded causal prefill, and each one's last query as a decode step.

    Args:
        call: one request, `[1, Hq, L, D]` against as many keys.
        block_q: queries in a block row.
    """
    length = call.q.shape[2]
    kv_heads, group = call.k.shape[1], call.group
    dtype = torch.promote_types(call.q.dtype, torch.float32)
    keys, values = call.k[0].to(dtype).transpose(1, 2), call.v[0].to(dtype)
    queries = call.q[0].to(dtype).reshape(kv_heads, group, length, -1) * call.scale
    step = max(1, _SCORES_AT_A_TIME // (group * block_q * length))
    for start in range(0, length, block_q):
        stop = min(start + block_q, length)
        for h in range(0, kv_heads, step):
            some = slice(h, min(h + step, kv_heads))
            scores = _scores(call, queries[some, :, start:stop], keys[some], start)
            lse = _lse(call, scores, some)
            out = (scores - lse[..., None]).exp().flatten(1, 2) @ values[some, :stop]
            yield BlockRow(
                phase="prefill",
                heads=slice(some.start * group, some.stop * group),
                start=start,
                position=start,
                kv_len=min(length, call.window or length),
                scores=scores.flatten(0, 1),
                lse=lse.flatten(0, 1),
                first=_first_key(call, start),
                full=stop - start == block_q,
                out=out.view(-1, stop - start, out.shape[-1]).transpose(0, 1).to(call.q.dtype),
            )
            yield BlockRow(
                phase="decode",
                heads=some,
                start=start,
                position=stop - 1,
                kv_len=min(stop, call.window or stop),
                scores=scores[:, :, -1],  # the group's heads vote together
                lse=lse[:, :, -1],
                first=_first_key(call, stop - 1),
                full=stop - start == block_q,
            )


def _scores(call: AttentionCall, q: Tensor, k: Tensor, start: int) -> Tensor:
    """Scores of `q` `[h, G, R, D]` (scaled) against the keys up to its last, `[h, G, R, K]`."""
    end = start + q.shape[2]
    scores = (q.flatten(1, 2) @ k[:, :, :end]).view(*q.shape[:3], end)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    position = torch.arange(start, end, device=q.device)[:, None]
    column = torch.arange(end, device=q.device)
    hidden = column > position
    if call.window is not None:
        hidden |= column <= position - call.window
    return scores.masked_fill_(hidden, -math.inf)


def _lse(call: AttentionCall, scores: Tensor, heads: slice) -> Tensor:
    lse = scores.logsumexp(-1)
    if call.sinks is None:
        return lse
    sinks = call.sinks.to(lse.dtype).view(-1, call.group)[heads, :, None]
    return torch.logaddexp(lse, sinks)


def _first_key(call: AttentionCall, position: int) -> int:
    return 0 if call.window is None else max(0, position - call.window + 1)


@dataclass(frozen=True)
class Blocks:
    """A block row cut into the blocks of a geometry.

    Args:
        top: `[voters, rows, NK]`, the largest score, -inf where a row sees nothing.
        log_mass: `[voters, rows, NK]`, ln of the sum of exp(score).
        seen: the blocks that hold a visible key; diagonal: those that the causal diagonal crosses.
        seed: blocks that decode keeps whatever they hold; splits: the others, in visiting order,
            each split from the seed on.
    """

    top: Tensor
    log_mass: Tensor
    seen: list[int]
    diagonal: range
    seed: list[int]
    splits: list[list[int]]

    @classmethod
    def of(cls, row: BlockRow, geometry: BlockGeometry) -> Blocks:
        """`row` in blocks of `geometry.block_k` keys."""
        block_k, end = geometry.block_k, row.scores.shape[-1]
        blocks = pad(row.scores, (0, -end % block_k), value=-math.inf)
        blocks = blocks.reshape(*blocks.shape[:2], -1, block_k)
        seen = list(range(row.first // block_k, blocks.shape[2]))
        diagonal = range(row.position // block_k, (end - 1) // block_k + 1)
        seed, splits = visit_order(seen, geometry, diagonal, row.phase == "decode")
        return cls(blocks.amax(-1), blocks.logsumexp(-1), seen, diagonal, seed, splits)

    @property
    def order(self) -> list[int]:
        """The blocks as `gaps` has them: the seed, then split by split."""
        return [*self.seed, *(j for split in self.splits for j in split)]

    def gaps(self) -> Tensor:
        """`max_i (m_new_i - m_i)` of each visited block, `[voters, visited]`, in their order.

        inf where the block is never skipped; section 2 of the BLASST paper, with our orders.
        """
        nothing = self.top.new_full((*self.top.shape[:2], 1), -math.inf)
        start = torch.cat([nothing, self.top[..., self.seed]], dim=-1).amax(-1, keepdim=True)
        gaps = [self.top.new_full((len(self.top), len(self.seed)), math.inf)]
        for split in self.splits:
            m_new = self.top[..., split]
            m = torch.cat([start, m_new], dim=-1).cummax(dim=-1).values[..., :-1]
            # A row that sees nothing of a block does not mind its being skipped: -inf - -inf.
            gaps.append((m_new - m).masked_fill(m_new == -math.inf, -math.inf).amax(dim=1))
        return torch.cat(gaps, dim=1)

    def skipped_by_budget(self, block_k: int) -> Tensor:
        """How many blocks each eps of the grid skips, int64 `[voters, eps]`."""
        top = self.top.double()
        reference = top.amax(-1, keepdim=True)
        most = block_k * (top - reference).exp()  # what a block holds at most
        mass = (self.log_mass.double() - reference).exp()
        eps = torch.tensor(tallies.BUDGET_GRID, dtype=torch.float64, device=top.device)
        seed_mass = mass[..., self.seed].sum(-1)
        count = torch.zeros((len(top), len(eps)), dtype=torch.int64, device=top.device)
        for split in self.splits:
            # Each may spend an equal share of what the seed holds.
            kept = (seed_mass / len(self.splits))[..., None].expand(-1, -1, len(eps))
            dropped = torch.zeros_like(kept)
            for j in split:
                then = dropped + most[..., j, None]
                agrees = (then <= eps * kept) | (top[..., j, None] == -math.inf)
                skip = agrees.all(dim=1, keepdim=True)
                dropped = torch.where(skip, then, dropped)
                kept = torch.where(skip, kept, kept + mass[..., j, None])
                count += skip[:, 0]
        return count


def tally(row: BlockRow, blocks: Blocks, geometry: BlockGeometry) -> Tensor:
    """One block row in numbers, int64 `[voters, tallies.WIDTH]`."""
    order = blocks.order
    bins = tallies.gap_bins(blocks.gaps(), row.kv_len)
    # The rows' average of the softmax share that is lost with the block.
    share = (blocks.log_mass[..., order] - row.lse[..., None]).exp().double().mean(dim=1)
    counts = torch.zeros((len(bins), tallies.WIDTH), dtype=torch.int64, device=bins.device)
    counts[:, tallies.GAPS].scatter_add_(1, bins, torch.ones_like(bins))
    mass = torch.zeros_like(counts[:, tallies.GAPS], dtype=torch.float64)
    mass.scatter_add_(1, bins, share)
    counts[:, tallies.MASS] = (mass / tallies.MASS_UNIT).nan_to_num(nan=0.0).round().long()
    weight = tallies.budget_weight(geometry, row.start)
    if weight:
        budget = counts[:, tallies.BUDGET]
        budget[:, 0] = weight * len(order)
        budget[:, 1:] = weight * blocks.skipped_by_budget(geometry.block_k)
    return counts
