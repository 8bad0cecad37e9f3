"""Which blocks an attention would skip, and what that does, in plain torch and in any order.

For experiments that no backend runs: every order of visiting, any block size, any bound. One pass
over a layer gives all orders and lambdas, since lambda < 1 leaves each running max where dense
attention has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_sparse_attention.calibration.observation_reference import BlockRow, Blocks, block_rows
from hf_sparse_attention.types import AttentionCall, BlockGeometry

Order = Callable[[Blocks], list[int]]


def ascending(blocks: Blocks) -> list[int]:
    return blocks.seen


def sink_first(blocks: Blocks) -> list[int]:
    """Ours: the sink, the diagonal, then ascending."""
    return _first([0, *blocks.diagonal], blocks)


def diagonal_first(blocks: Blocks) -> list[int]:
    return _first(list(blocks.diagonal), blocks)


def reverse(blocks: Blocks) -> list[int]:
    return blocks.seen[::-1]


def _first(front: list[int], blocks: Blocks) -> list[int]:
    return [*dict.fromkeys(j for j in front if j in blocks.seen)] + [
        j for j in blocks.seen if j not in front
    ]


ORDERS: dict[str, Order] = {
    "ascending": ascending,
    "sink first": sink_first,
    "diagonal first": diagonal_first,
    "reverse": reverse,
}


def prefill_rows(
    layer: Sequence[Tensor], geometry: BlockGeometry
) -> Iterator[tuple[BlockRow, Blocks]]:
    """The block rows of one layer's prefill; `layer` is q, k, v, each `[1, H, L, D]`."""
    q, k, v = layer
    call = AttentionCall(q, k, v, scale=q.shape[-1] ** -0.5)
    for row in block_rows(call, geometry.block_q):
        if row.phase == "prefill":
            yield row, Blocks.of(row, geometry)


def gaps(blocks: Blocks, order: list[int]) -> Tensor:
    """`max_i (m_new_i - m_i)` of each block in `order`, `[heads, visited]`; inf for the first."""
    m_new = blocks.top[..., order]
    m = m_new.cummax(dim=-1).values[..., :-1]
    rest = (m_new[..., 1:] - m).masked_fill(m_new[..., 1:] == -math.inf, -math.inf).amax(dim=1)
    return torch.cat([rest.new_full((len(rest), 1), math.inf), rest], dim=1)


def gaps_to_the_end(blocks: Blocks) -> Tensor:
    """The same if each row knew its final max beforehand: no order can skip more."""
    final = blocks.top.amax(-1, keepdim=True)
    return (blocks.top - final).masked_fill(blocks.top == -math.inf, -math.inf).amax(1)


def all_gaps(layers: dict[int, Sequence[Tensor]], geometry: BlockGeometry, order: Order) -> Tensor:
    """The gaps of all blocks of all heads of all layers, sorted."""
    found = [
        gaps(blocks, order(blocks)).flatten()
        for layer in layers.values()
        for _, blocks in prefill_rows(layer, geometry)
    ]
    return torch.cat(found).sort().values


def free_gaps(layers: dict[int, Sequence[Tensor]], geometry: BlockGeometry) -> Tensor:
    """Those of the blocks that are neither the sink nor on the diagonal, sink first, sorted."""
    found = []
    for layer in layers.values():
        for _, blocks in prefill_rows(layer, geometry):
            order = sink_first(blocks)
            front = len({0, *blocks.diagonal} & set(order))
            found.append(gaps(blocks, order)[:, front:].flatten())
    return torch.cat(found).sort().values


def lambda_for(sparsity: float, sorted_gaps: Tensor) -> float:
    """The lambda that skips this share of the blocks."""
    return math.exp(sorted_gaps[int(sparsity * len(sorted_gaps))].item())


@dataclass
class Loss:
    """What skipping costs, gathered over layers.

    Attributes:
        skipped, visited: blocks.
        errors: of each layer, |out - exact| / |exact|.
        dropped: of each query of each head, the share of its softmax mass.
    """

    skipped: int = 0
    visited: int = 0
    errors: list[float] = field(default_factory=list)
    dropped: list[Tensor] = field(default_factory=list)

    def told(self) -> dict[str, float]:
        """The numbers that a table shows."""
        mass = torch.cat(self.dropped)
        return {
            "sparsity": self.skipped / self.visited,
            "error": sum(self.errors) / len(self.errors),
            "worst_layer_error": max(self.errors),
            "dropped_mean": mass.mean().item(),
            "dropped_p99": mass.quantile(0.99).item() if len(mass) < 2**24 else math.nan,
            "dropped_max": mass.max().item(),
        }


def losses(
    layers: dict[int, Sequence[Tensor]],
    geometry: BlockGeometry,
    order: Order,
    lambdas: Sequence[float],
) -> list[dict[str, float]]:
    """For each lambda what is skipped and lost, one dict as `Loss.told` gives it."""
    found = [Loss() for _ in lambdas]
    for layer in layers.values():
        squares = torch.zeros(len(lambdas) + 1, dtype=torch.float64)
        values = layer[2][0].repeat_interleave(layer[0].shape[1] // layer[2].shape[1], 0)
        for row, blocks in prefill_rows(layer, geometry):
            visited = order(blocks)
            of_visit = gaps(blocks, visited)
            exact = row.out.transpose(0, 1)
            squares[-1] += exact.double().square().sum()
            share = (blocks.log_mass - row.lse[..., None]).exp()  # [heads, rows, NK]
            weights = (row.scores - row.lse[..., None]).exp()
            for i, lam in enumerate(lambdas):
                skip = torch.zeros_like(blocks.top[:, 0], dtype=torch.bool)
                skip[:, visited] = of_visit < math.log(lam)
                dropped = (share * skip[:, None]).sum(-1)
                hidden = skip.repeat_interleave(geometry.block_k, 1)[:, : weights.shape[-1]]
                kept = weights.masked_fill(hidden[:, None], 0.0)
                out = kept @ values[row.heads, : weights.shape[-1]] / kept.sum(-1, keepdim=True)
                squares[i] += (out - exact).double().square().sum()
                found[i].skipped += int(skip.sum())
                found[i].visited += skip.shape[0] * len(visited)
                found[i].dropped.append(dropped.flatten())
        for i, loss in enumerate(found):
            loss.errors.append((squares[i] / squares[-1]).sqrt().item())
    return [loss.told() for loss in found]
