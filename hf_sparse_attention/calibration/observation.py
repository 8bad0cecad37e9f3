"""What dense passes over text told, added up: all that thresholds are fitted from.

The attention function hands its calls to `Observations.observe` while a model calibrates. One dense
pass tells it, for every geometry and both phases, how many blocks each lambda would skip, what that
would drop, what the budget rule would skip, and BSFA's thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attention.calibration import observation_native, observation_reference, tallies
from hf_sparse_attention.calibration.observation_reference import Observed
from hf_sparse_attention.calibration.top_blocks import TopBlocks, blocks_by_level
from hf_sparse_attention.types import ORDERS, PHASES, AttentionCall, BlockGeometry, Phase

#: Every geometry that a backend runs: a model calibrated on a laptop must run on a GPU server.
DEFAULT_GEOMETRIES: tuple[BlockGeometry, ...] = tuple(
    BlockGeometry.from_name(name) for name in ("64x128", "64x64", "64x1")
)


class Observations:
    """Sums over samples, by geometry, phase, layer and length; equal whatever their order.

    Prefill counts every block row of a sample. Decode counts each block row's last query as if it
    were the newest position of its request. Voters are query heads in prefill and, as a group's
    heads vote together, key/value heads in decode. Lengths are those of the request, or of the
    window if that is shorter; in decode grouped by half octaves. Modules without a layer number
    (vision towers) have negative ones: they count, but get no thresholds of BSFA.

    Args:
        geometries: how to cut the scores; their names must differ.
        levels: BSFA's k, see `kept_blocks`; may be empty.
        keep_sink: BSFA never skips block 0, which then does not compete either.
    """

    def __init__(
        self,
        geometries: Sequence[BlockGeometry] = DEFAULT_GEOMETRIES,
        levels: Sequence[int] = (),
        keep_sink: bool = True,
    ) -> None:
        names = [geometry.name for geometry in geometries]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"geometries: expected different ones, got {names}")
        if any(level < 1 for level in levels):
            raise ValueError(f"levels: expected positive integers, got {list(levels)}")
        self.geometries = {geometry.name: geometry for geometry in geometries}
        self.levels = sorted(set(levels))
        self.keep_sink = keep_sink
        #: Query heads, by layer.
        self.heads: dict[int, int] = {}
        self._tallies: dict[tuple[str, Phase, int, int], Tensor] = {}
        self._tops: dict[tuple[str, Phase, int], TopBlocks] = {}
        #: Blocks visited, and for each level those that it skips.
        self._by_level: dict[tuple[str, Phase], Tensor] = {}

    # What is taken in

    @torch.no_grad()
    def observe(self, layer: int, call: AttentionCall) -> Tensor | None:
        """Takes in one attention and returns its output `[B, L, Hq, Dv]`, computed on the way.

        None if it teaches nothing: if it is not a causal prefill.

        Raises:
            ValueError: the call has padding.
        """
        q_len, kv_len = call.q.shape[2], call.k.shape[2]
        if not call.causal or call.mask is not None or q_len != kv_len or not q_len:
            return None
        if call.q_offset is not None and bool((call.q_offset != 0).any()):
            return None
        if call.key_valid is not None and not bool(call.key_valid.all()):
            raise ValueError("calibrate: expected samples without padding, got padded ones")
        outs = []
        for b in range(len(call.q)):
            q, k, v = (x[b : b + 1] for x in (call.q, call.k, call.v))
            told = self._look(replace(call, q=q, k=k, v=v, key_valid=None, q_offset=None))
            self._add(layer, call, told)
            outs.append(told.out)
        return torch.cat(outs)

    def _look(self, call: AttentionCall) -> Observed:
        geometries = list(self.geometries.values())
        native = [g for g in geometries if observation_native.serves(call, g)]
        if not native:
            return observation_reference.observe(call, geometries, self.levels, self.keep_sink)
        told = observation_native.observe(call, native, self.levels, self.keep_sink)
        others = [g for g in geometries if g not in native]
        if others:
            more = observation_reference.observe(call, others, self.levels, self.keep_sink)
            told.tallies.update(more.tallies)
            told.tops.update(more.tops)
        return told

    def _add(self, layer: int, call: AttentionCall, told: Observed) -> None:
        self.heads[layer] = call.q.shape[1]
        for (name, phase, length), counts in told.tallies.items():
            key = (name, phase, layer, length)
            before = self._tallies.get(key)
            self._tallies[key] = counts.cpu().clone() if before is None else before + counts.cpu()
        if layer < 0 or not self.levels:
            return
        for (name, phase), tops in told.tops.items():
            self._top_blocks(name, phase, layer, tops.shape[1]).add(TopBlocks.of(tops))
            blocks = torch.tensor(
                blocks_by_level(
                    self.geometries[name],
                    tuple(self.levels),
                    self.keep_sink,
                    phase,
                    call.q.shape[2],
                    call.window,
                )
            )
            before = self._by_level.get((name, phase), torch.zeros_like(blocks))
            self._by_level[name, phase] = before + tops.shape[1] * blocks

    def _top_blocks(self, name: str, phase: Phase, layer: int, voters: int) -> TopBlocks:
        empty = TopBlocks.empty(len(self.levels), voters)
        return self._tops.setdefault((name, phase, layer), empty)

    # What was told

    @property
    def layers(self) -> list[int]:
        """The layers seen, ascending."""
        return sorted(self.heads)

    def lengths(self, phase: Phase) -> list[int]:
        """The lengths seen in `phase`, ascending."""
        return sorted({length for _, each, _, length in self._tallies if each == phase})

    def gaps(self, geometry: str, phase: Phase, layer: int, length: int) -> Tensor:
        """How many blocks have which gap, int64 `[voters, U_BINS + 1]`: see `tallies`.

        A block is skipped under `scale_factor` if its `gap + ln L` is below ln(scale_factor).
        """
        return self._row(geometry, phase, layer, length)[:, tallies.GAPS]

    def mass(self, geometry: str, phase: Phase, layer: int, length: int) -> Tensor:
        """The softmax share that those blocks hold, float64 `[voters, U_BINS + 1]`.

        Of each block the average over its voting rows, relative to the final lse: what skipping it
        drops. Divided by the number of block rows it is the mass lost in the average row.
        """
        row = self._row(geometry, phase, layer, length)
        return row[:, tallies.MASS].double() * tallies.MASS_UNIT

    def budget(self, geometry: str, phase: Phase, layer: int, length: int) -> Tensor:
        """Blocks visited, and skipped under each eps of `BUDGET_GRID`: int64 `[voters, 1 + eps]`.

        Single keys are followed in a part of the block rows only: see `tallies.budget_weight`.
        """
        return self._row(geometry, phase, layer, length)[:, tallies.BUDGET]

    def total(self, geometry: str, phase: Phase, length: int) -> Tensor:
        """The gaps over all layers and heads at `length`, int64 `[U_BINS + 1]`."""
        layers = [self.gaps(geometry, phase, layer, length).sum(dim=0) for layer in self.layers]
        return torch.stack(layers).sum(dim=0)

    def _row(self, geometry: str, phase: Phase, layer: int, length: int) -> Tensor:
        """The tallies `[voters, WIDTH]`; zeros if the layer saw no request of that length."""
        self._check_geometry(geometry)
        known = [x for (_, p, n, _), x in self._tallies.items() if p == phase and n == layer]
        if not known:
            raise ValueError(f"layer: expected one of {self.layers} in {phase}, got {layer}")
        return self._tallies.get((geometry, phase, layer, length), torch.zeros_like(known[0]))

    def tops(self, geometry: str, phase: Phase) -> Tensor | None:
        """BSFA's T, float32 `[levels, layers, heads, positions]`; None without a whole block row.

        Layers that were not seen get -inf; shorter layers reuse their last entry.
        """
        self._check_geometry(geometry)
        layers = {
            layer: tops.thresholds()
            for (name, each, layer), tops in self._tops.items()
            if name == geometry and each == phase and len(tops.samples)
        }
        if not layers:
            return None
        heads = max(self.heads[layer] for layer in layers)
        positions = max(x.shape[2] for x in layers.values())
        table = torch.full((len(self.levels), max(layers) + 1, heads, positions), -math.inf)
        for layer, rows in layers.items():
            rows = rows.repeat_interleave(self.heads[layer] // rows.shape[1], dim=1)  # decode
            table[:, layer, : rows.shape[1], : rows.shape[2]] = rows
            table[:, layer, : rows.shape[1], rows.shape[2] :] = rows[..., -1:]
        return table

    def predicted_sparsity(self, geometry: str, phase: Phase) -> dict[str, float]:
        """The sparsity that keeping just a level's blocks gives on the same samples, by level."""
        visited, *skipped = self._by_level[geometry, phase].tolist()
        return {str(k): round(n / visited, 4) for k, n in zip(self.levels, skipped, strict=True)}

    def _check_geometry(self, name: str) -> None:
        if name not in self.geometries:
            raise ValueError(f"geometry: expected one of {list(self.geometries)}, got {name!r}")

    # Several processes, and a run that goes on

    def merge(self, other: Observations) -> None:
        """Adds what `other`, of the same geometries and levels, was told."""
        self._merge(other.state_dict())

    def state_dict(self) -> dict[str, Tensor]:
        """All of it, flat, for safetensors; `load_state_dict` is the inverse."""
        heads = torch.tensor(sorted(self.heads.items()), dtype=torch.int64).reshape(-1, 2)
        state = {**self._settings(), "heads": heads}
        for key, x in self._tallies.items():
            state[_joined("tallies", *key)] = x
        for (name, phase, layer), tops in self._tops.items():
            state[_joined("tops.sums", name, phase, layer)] = tops.sums
            state[_joined("tops.finite", name, phase, layer)] = tops.finite
            state[_joined("tops.samples", name, phase, layer)] = tops.samples
        for (name, phase), x in self._by_level.items():
            state[_joined("by_level", name, phase)] = x
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes `state` in place of what was told so far.

        Raises:
            ValueError: it comes from other geometries, levels or bins.
        """
        fresh = Observations(list(self.geometries.values()), self.levels, self.keep_sink)
        fresh._merge(state)
        self.heads, self._tallies = fresh.heads, fresh._tallies
        self._tops, self._by_level = fresh._tops, fresh._by_level

    def _settings(self) -> dict[str, Tensor]:
        """What must be equal for sums to mean the same."""
        geometries = [
            [g.block_q, g.block_k, ORDERS.index(g.order), g.split_k]
            for g in self.geometries.values()
        ]
        bins = [tallies.U_MIN, tallies.U_BINS, tallies.BINS_PER_NAT, tallies.MASS_UNIT]
        return {
            "geometries": torch.tensor(geometries),
            "levels": torch.tensor(self.levels, dtype=torch.int64),
            "keep_sink": torch.tensor(self.keep_sink),
            "bins": torch.tensor([*bins, *tallies.BUDGET_GRID], dtype=torch.float64),
        }

    def _merge(self, state: Mapping[str, Tensor]) -> None:
        for name, ours in self._settings().items():
            theirs = state.get(name)
            if theirs is None or not torch.equal(theirs, ours):
                got = "none" if theirs is None else theirs.tolist()
                raise ValueError(f"observations: expected {name} {ours.tolist()}, got {got}")
        theirs_by_layer = dict(state["heads"].tolist())
        for layer, heads in theirs_by_layer.items():
            ours_here = self.heads.get(layer, heads)
            if ours_here != heads:
                raise ValueError(
                    f"observations: expected {ours_here} heads in layer {layer}, got {heads}"
                )
        self.heads.update(theirs_by_layer)
        for (name, phase, layer, length), x in _parts(state, "tallies"):
            key = (name, phase, int(layer), int(length))
            self._tallies[key] = self._tallies[key] + x if key in self._tallies else x.clone()
        for (name, phase, layer), sums in _parts(state, "tops.sums"):
            finite, samples = (
                state[_joined(f"tops.{part}", name, phase, layer)] for part in ("finite", "samples")
            )
            tops = self._top_blocks(name, phase, int(layer), sums.shape[1])
            tops.add(TopBlocks(sums, finite, samples))
        for (name, phase), x in _parts(state, "by_level"):
            self._by_level[name, phase] = self._by_level.get((name, phase), 0) + x


def _joined(kind: str, *key: str | int) -> str:
    return "/".join([kind, *map(str, key)])


def _parts(state: Mapping[str, Tensor], kind: str) -> Iterator[tuple[list[Any], Tensor]]:
    """The entries of `state` whose names start with `kind`, by the rest of their names."""
    for name, x in sorted(state.items()):
        first, *rest = name.split("/")
        if first == kind:
            assert rest[1] in PHASES
            yield rest, x
