"""The report's figures, each an SVG as bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from hf_sparse_attention.calibration.report_data import GOAL
from hf_sparse_attention.html_report import BAND, COLOURS, drawing, shades
from hf_sparse_attention.types import PHASES

_Rows = Sequence[dict[str, Any]]


def sparsity_against_lambda(data: dict[str, Any]) -> bytes | None:
    """A panel for each phase and geometry, a line for each length."""

    def draw(axis: Any, rows: _Rows) -> None:
        for row, colour in zip(rows, shades(len(rows)), strict=True):
            axis.plot(row["lambda"], row["sparsity"], color=colour, label=f"{row['length']} keys")
        axis.set(xscale="log", ylim=(0, 1), xlabel="lambda", ylabel="sparsity")
        axis.legend()

    return _panels(data["curves"], draw)


def fit_against_length(data: dict[str, Any]) -> bytes | None:
    """The scale factor that each target takes at each length; the fit as horizontal lines."""

    def draw(axis: Any, rows: _Rows) -> None:
        targets = sorted({row["target"] for row in rows})
        for target, colour in zip(targets, COLOURS, strict=False):
            own = [row for row in rows if row["target"] == target]
            lengths = [row["length"] for row in own]
            factors = [row["scale_factor"] for row in own]
            axis.plot(lengths, factors, "o", color=colour, label=f"target {target:.0%}")
            axis.axhline(own[0]["fitted"], color=colour, linestyle="--", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="keys", ylabel="scale factor")
        ticks = sorted({row["length"] for row in rows})
        axis.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45)
        axis.minorticks_off()
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=len(targets))

    return _panels(data["needed"], draw)


def heat_maps(data: dict[str, Any]) -> bytes | None:
    """Sparsity of each layer and head."""

    def draw(axis: Any, rows: _Rows) -> None:
        (row,) = rows
        values = [[float("nan") if x is None else x for x in line] for line in row["sparsity"]]
        image = axis.imshow(values, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axis.grid(visible=False)
        about = f"{row['length']} keys, target {row['target']:.0%}"
        axis.set(xlabel=f"{row['voters']} ({about})", ylabel="layer")
        axis.locator_params(integer=True)
        axis.figure.colorbar(image, ax=axis, label="sparsity")

    return _panels(data["heads"], draw)


def target_against_measured(data: dict[str, Any]) -> bytes | None:
    """What was asked for against what was measured on held-out text, and the goal as a band."""

    def draw(axis: Any, rows: _Rows) -> None:
        axis.axline((0, 0), slope=1, color="#a0aec0", linewidth=1)
        axis.fill_between([0, 1], [-GOAL, 1 - GOAL], [GOAL, 1 + GOAL], color=BAND)
        lengths = sorted({row["length"] for row in rows})
        for length, colour in zip(lengths, shades(len(lengths)), strict=True):
            own = [row for row in rows if row["length"] == length]
            x, y = [row["target"] for row in own], [row["measured"] for row in own]
            axis.plot(x, y, "o", color=colour, markersize=5, label=f"{length} keys")
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="target", ylabel="measured", aspect="equal")
        axis.legend(loc="upper left")

    return _panels(data["held_out"], draw)


def _panels(rows: _Rows, draw: Callable[[Any, _Rows], None]) -> bytes | None:
    """A row of panels for each phase, a column for each geometry; None without rows.

    A single geometry has its phases beside each other.
    """
    if not rows:
        return None
    names = list(dict.fromkeys(row["geometry"] for row in rows))
    phases = [phase for phase in PHASES if any(row["phase"] == phase for row in rows)]
    shape = (1, len(phases)) if len(names) == 1 else (len(phases), len(names))
    with drawing(3.6 * shape[1], 3.1 * shape[0]) as made:
        axes = made.figure.subplots(*shape, squeeze=False).flat
        for axis, (phase, name) in zip(axes, product(phases, names), strict=True):
            own = [row for row in rows if (row["geometry"], row["phase"]) == (name, phase)]
            if own:
                draw(axis, own)
                axis.set_title(f"{phase}, {name}")
            else:
                axis.set_visible(False)
    return made.svg
