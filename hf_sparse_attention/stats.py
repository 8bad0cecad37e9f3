"""What the skipping did: blocks per layer, head and phase, dense fallbacks, and the certificate.

Nothing is recorded, and nothing costs anything, outside of `collect_stats`. Inside, counters are
added up on the device without a sync, and read when asked for; their size does not depend on
lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attention.types import PHASES, AttentionCall, AttentionResult, BlockGeometry, Phase

ATTRIBUTE = "_sparse_attention_stats"

# The certificate's sketch: a histogram with bins of equal width in log10, from 1e-8 to 1.
_DECADES, _BINS_PER_DECADE = 8, 16
_BINS = _DECADES * _BINS_PER_DECADE + 1  # bin 0 is for everything below 1e-8, zero included


@contextmanager
def collect_stats(
    model: nn.Module, *, dropped_mass: bool = True, into: Stats | None = None
) -> Iterator[Stats]:
    """Records what the sparse attention of `model` does inside the `with` block.

    Args:
        model: any module that has the attention modules somewhere inside.
        dropped_mass: also record the certificate, for which backends do a little more work.
        into: stats of an earlier block, to go on with; None starts new ones.

    Raises:
        RuntimeError: if stats are being collected on this model already.
    """
    modules = list(model.modules())
    if any(ATTRIBUTE in module.__dict__ for module in modules):
        raise RuntimeError(
            "collect_stats: expected a model whose stats nobody collects, got one inside another"
            " collect_stats"
        )
    stats = Stats(wants_dropped_mass=dropped_mass) if into is None else into
    # Straight into __dict__: wrappers such as compiled modules pass attributes on to what they
    # wrap.
    for module in modules:
        module.__dict__[ATTRIBUTE] = stats
    try:
        yield stats
    finally:
        for module in modules:
            module.__dict__.pop(ATTRIBUTE, None)


class Stats:
    """Counters per layer, head and phase. The attention function writes them, anyone may read.

    Modules that have no layer number of their own (vision towers, some encoders) are gathered under
    minus their number of heads.

    Sparsity is the share of the visited blocks (those with a visible key) that was skipped.
    """

    def __init__(self, *, wants_dropped_mass: bool = True) -> None:
        self.wants_dropped_mass = wants_dropped_mass
        # Keyed by (phase, layer). Counters are tensors even where an int would do: a compiled
        # forward would recompile for each new value of an int.
        self._counts: dict[tuple[Phase, int], Tensor] = {}  # int64 [Hq, 2]: visited, skipped
        self._sketches: dict[tuple[Phase, int], Tensor] = {}  # int64 [_BINS]
        self._largest: dict[tuple[Phase, int], Tensor] = {}  # float32 []
        self._dense: dict[tuple[Phase, int, str], Tensor] = {}  # int64 [], calls by reason
        self._geometries: dict[tuple[Phase, str], bool] = {}  # those that ran, by name

    def record(
        self, layer: int, call: AttentionCall, result: AttentionResult, geometry: BlockGeometry
    ) -> None:
        """Adds one attention that a block-skipping backend computed on blocks of `geometry`."""
        if _is_recomputation() or result.counts is None:
            return
        self._geometries[call.phase, geometry.name] = True
        key = (call.phase, layer)
        if key in self._counts and len(self._counts[key]) != call.q.shape[1]:
            # Another stack of layers in the same model, such as a vision tower.
            key = (call.phase, -call.q.shape[1])
        with torch.no_grad():
            _add(self._counts, key, result.counts.sum(dim=0))
            if result.dropped_mass is None or result.lse is None or call.q.shape[2] == 0:
                return
            dropped = result.dropped_mass.detach().float()
            # Rows that see no key are padding, not evidence.
            counted = (result.lse.detach() > -torch.inf).to(torch.int64)
            _add(self._sketches, key, _histogram(dropped, counted))
            largest = (dropped * counted).amax()
            if key in self._largest:
                self._largest[key].copy_(torch.maximum(self._largest[key], largest))
            else:
                _add(self._largest, key, largest)

    def record_dense(self, layer: int, call: AttentionCall, reason: str) -> None:
        """Adds one attention that ran dense, and why."""
        if not _is_recomputation():
            _add(self._dense, (call.phase, layer, reason), torch.ones((), dtype=torch.int64))

    def reset(self) -> None:
        """Starts anew from zero; in place, so that a compiled forward need not be recompiled."""
        for table in (self._counts, self._sketches, self._largest, self._dense):
            for counter in table.values():
                counter.zero_()

    @property
    def layers(self) -> list[int]:
        """The layers that recorded anything."""
        return sorted({key[1] for key in self._counts} | {key[1] for key in self._dense})

    def counts(self, phase: Phase) -> dict[int, Tensor]:
        """Visited and skipped blocks, int64 `[Hq, 2]` on the CPU, by layer."""
        return {
            key[1]: x.to("cpu", copy=True)
            for key, x in sorted(self._counts.items())
            if key[0] == phase
        }

    def sparsity(self, phase: Phase | None = None) -> float:
        """The share of visited blocks that was skipped, in `phase` or in both; 0 if none was.

        Raises:
            ValueError: `phase` is no phase.
        """
        if phase is not None and phase not in PHASES:
            raise ValueError(f"phase: expected one of {list(PHASES)} or None, got {phase!r}")
        total = torch.zeros(2, dtype=torch.int64)
        for each in PHASES if phase is None else (phase,):
            for counts in self.counts(each).values():
                total += counts.sum(dim=0)
        return _ratio(total)

    def dropped_mass(self, phase: Phase, layer: int | None = None) -> dict[str, float] | None:
        """The certificate's `{"p50", "p99", "max"}` over rows: bounds on the softmax mass dropped.

        `max` is exact, the others are rounded up by at most 16%. None if nothing was recorded.
        """
        keys = [key for key in self._sketches if key[0] == phase and layer in (None, key[1])]
        if not keys:
            return None
        sketch = torch.stack([self._sketches[key].cpu() for key in keys]).sum(dim=0)
        largest = max(float(self._largest[key]) for key in keys)
        return {
            "p50": min(_quantile(sketch, 0.50), largest),
            "p99": min(_quantile(sketch, 0.99), largest),
            "max": largest,
        }

    def dense(self, phase: Phase | None = None, layer: int | None = None) -> dict[str, int]:
        """How many attentions ran dense, by reason."""
        found: dict[str, int] = {}
        for (each, number, reason), calls in self._dense.items():
            if phase in (None, each) and layer in (None, number):
                found[reason] = found.get(reason, 0) + int(calls)
        return found

    def geometries(self, phase: Phase) -> list[str]:
        """The blocks that ran in `phase`, by name, such as `["64x1"]`."""
        return sorted(name for each, name in self._geometries if each == phase)

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready: by phase, then by layer, with lists over heads."""
        data: dict[str, Any] = {"sparsity": self.sparsity()}
        for phase in PHASES:
            counts = self.counts(phase)
            layers = {}
            for layer in self.layers:
                visited, skipped = counts.get(layer, torch.zeros(0, 2, dtype=torch.int64)).unbind(1)
                layers[str(layer)] = {
                    "visited": visited.tolist(),
                    "skipped": skipped.tolist(),
                    "sparsity": _ratio(torch.stack([visited.sum(), skipped.sum()])),
                    "dropped_mass": self.dropped_mass(phase, layer),
                    "dense": self.dense(phase, layer),
                }
            data[phase] = {
                "sparsity": self.sparsity(phase),
                "geometries": self.geometries(phase),
                "dropped_mass": self.dropped_mass(phase),
                "dense": self.dense(phase),
                "layers": layers,
            }
        return data

    def table(self) -> str:
        """A text table, one line a phase and layer, and the reasons of dense fallbacks below it."""
        head = ("phase", "layer", "blocks", "skipped", "sparsity", "heads", "p50", "p99", "max")
        rows: list[tuple[str, ...]] = [(*head, "dense")]
        data = self.to_dict()
        for phase in PHASES:
            rows += [
                _table_row(phase, layer, entry)
                for layer, entry in data[phase]["layers"].items()
                if entry["visited"] or entry["dense"]
            ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        for phase in PHASES:
            if names := self.geometries(phase):
                lines.append(f"blocks in {phase}: {', '.join(names)}")
            reasons = self.dense(phase).items()
            lines += [f"dense in {phase}, {calls} calls: {reason}" for reason, calls in reasons]
        lines.append(
            "heads: least and most sparse head. p50, p99, max: bound on the mass dropped a row."
        )
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Saves a heat map of the sparsity, layers by heads, one panel a phase.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: nothing was recorded.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "Stats.plot: expected matplotlib, found none; "
                "pip install 'hf-sparse-attention[plots]'"
            ) from error
        maps = {phase: _heat_map(self.counts(phase)) for phase in PHASES if self.counts(phase)}
        if not maps:
            raise ValueError("Stats.plot: expected recorded attentions, got none")
        figure = Figure(figsize=(1 + 4.5 * len(maps), 5), layout="constrained")
        for axis, (phase, values) in zip(
            figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True
        ):
            image = axis.imshow(values.numpy(), vmin=0, vmax=1, aspect="auto", cmap="viridis")
            axis.set(title=f"{phase}: {self.sparsity(phase):.0%}", xlabel="head", ylabel="layer")
            figure.colorbar(image, ax=axis, label="sparsity")
        figure.savefig(path)

    def __repr__(self) -> str:
        phases = ", ".join(f"{p} {self.sparsity(p):.1%}" for p in PHASES if self.counts(p))
        dense = sum(self.dense().values())
        return f"Stats(sparsity: {phases or 'nothing recorded'}; dense calls: {dense})"


def _is_recomputation() -> bool:
    """Whether this forward only repeats one inside a backward, as gradient checkpointing does."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def _add(table: dict[Any, Tensor], key: Any, value: Tensor) -> None:
    if key in table:
        table[key].add_(value)
    else:
        with torch.inference_mode(False):  # else it could only be added to in inference mode
            table[key] = value.clone()


def _histogram(x: Tensor, weight: Tensor) -> Tensor:
    """Sketch of `x` with int64 weights, `[_BINS]`."""
    bins = (x.clamp(1e-30, 1.0).log10() + _DECADES) * _BINS_PER_DECADE + 1
    index = bins.floor().clamp(0, _BINS - 1).to(torch.int64)
    empty = torch.zeros(_BINS, dtype=torch.int64, device=x.device)
    return empty.scatter_add(0, index.flatten(), weight.flatten())


def _quantile(sketch: Tensor, q: float) -> float:
    """The upper edge of the bin that the quantile falls into."""
    below = sketch.cumsum(0)
    index = int((below < q * below[-1]).sum())
    return float(10.0 ** (index / _BINS_PER_DECADE - _DECADES))


def _ratio(counts: Tensor) -> float:
    visited, skipped = counts.tolist()
    return skipped / visited if visited else 0.0


def _table_row(phase: str, layer: str, entry: dict[str, Any]) -> tuple[str, ...]:
    heads = [_ratio(torch.tensor(x)) for x in zip(entry["visited"], entry["skipped"], strict=True)]
    dropped = entry["dropped_mass"]
    return (
        phase,
        layer,
        str(sum(entry["visited"])),
        str(sum(entry["skipped"])),
        f"{entry['sparsity']:.1%}",
        f"{min(heads):.0%}-{max(heads):.0%}" if heads else "-",
        *(f"{dropped[name]:.1e}" if dropped else "-" for name in ("p50", "p99", "max")),
        str(sum(entry["dense"].values())),
    )


def _heat_map(counts: dict[int, Tensor]) -> Tensor:
    """Sparsity, float32 `[layers, heads]`, NaN where nothing was visited."""
    numbered = {layer: x for layer, x in counts.items() if layer >= 0}
    counts = numbered or dict(enumerate(counts.values()))
    heads = max(len(x) for x in counts.values())
    values = torch.full((max(counts) + 1, heads), torch.nan)
    for layer, x in counts.items():
        values[layer, : len(x)] = x[:, 1] / x[:, 0]
    return values
