"""The report's figures, each an SVG as bytes, drawn from a result; None with nothing to show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from hf_sparse_attention.evaluation import summary
from hf_sparse_attention.evaluation.settings import Setting
from hf_sparse_attention.html_report import COLOURS, drawing

Result = Mapping[str, Any]
XOf = Callable[[Mapping[str, Any]], float | None]
_DENSE = "#718096"
_WIDTH, _HEIGHT = 3.8, 3.2
_SPEEDUPS = {"first_token_speedup": "time to first token", "decode_speedup": "decoding"}


def accuracy_against_sparsity(result: Result) -> bytes | None:
    """A panel for each length: accuracy over the sparsity measured in prefill."""
    return _against(result, "share of blocks skipped in prefill", _sparsity, None)


def accuracy_against_speed(result: Result) -> bytes | None:
    """A panel for each length: accuracy over the time to first token, against dense."""
    return _against(
        result, "time to first token, times faster", lambda row: row["first_token_speedup"], 1.0
    )


def speed_against_length(result: Result) -> bytes | None:
    """Speedups over length, a line for each setting; None for a single length."""
    lengths, names = result["configuration"]["lengths"], summary.settings_of(result)[1:]
    found = {
        measure: {
            name: [summary.speedup(result, name, length, measure) for length in lengths]
            for name in names
        }
        for measure in _SPEEDUPS
    }
    shown = [m for m, lines in found.items() if any(x for y in lines.values() for x in y)]
    if len(lengths) < 2 or not shown:
        return None
    with drawing(_WIDTH * len(shown) + 1.2, _HEIGHT + 0.8) as made:
        axes = made.figure.subplots(1, len(shown), squeeze=False)[0]
        for axis, measure in zip(axes, shown, strict=True):
            axis.axhline(1.0, color=_DENSE, linewidth=1)
            for n, (name, colour) in enumerate(_paired(names)):
                y = [float("nan") if x is None else x for x in found[measure][name]]
                line = "o-" if n < len(COLOURS) else "s--"
                axis.plot(lengths, y, line, color=colour, markersize=4, label=name)
            axis.set(xscale="log", title=_SPEEDUPS[measure])
            axis.set(xlabel="tokens", ylabel="times faster than dense")
            axis.set_xticks(lengths, [str(length) for length in lengths])
            axis.minorticks_off()
        _legend(made.figure, axes[0])
    return made.svg


def depth_maps(result: Result) -> bytes | None:
    """A heat map for each setting: the mean score by needle depth and length."""
    maps = summary.depths(result)
    if not maps:
        return None
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    with drawing(2.4 * columns + 0.6, 2.6 * rows) as made:
        axes = made.figure.subplots(rows, columns, squeeze=False)
        for axis, item in zip_longest(axes.flat, maps.items()):
            if item is None:
                axis.set_visible(False)
                continue
            name, found = item
            image = _depth_map(axis, found)
            axis.set_title(name)
        made.figure.colorbar(image, ax=axes, label="mean score")
    return made.svg


def _depth_map(axis: Any, found: Sequence[Mapping[str, Any]]) -> Any:
    depths = sorted({row["depth"] for row in found})
    lengths = sorted({row["length"] for row in found})
    score = {(row["depth"], row["length"]): row["accuracy"] for row in found}
    values = [[score.get((depth, n), float("nan")) for n in lengths] for depth in depths]
    image = axis.imshow(values, vmin=0, vmax=1, aspect="auto", cmap="RdYlGn")
    axis.grid(visible=False)
    axis.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axis.set(xlabel="tokens", ylabel="depth")
    return image


def _against(
    result: Result,
    label: str,
    x_of: XOf,
    mark: float | None,
) -> bytes | None:
    """Accuracy with the error of its difference to dense over `x_of(row)`, by family and length."""
    lengths = result["configuration"]["lengths"]
    families: dict[str, list[str]] = {}
    for name in summary.settings_of(result)[1:]:
        families.setdefault(Setting.parse(name).family, []).append(name)
    if not families:
        return None
    columns = min(3, len(lengths))
    rows = -(-len(lengths) // columns)
    with drawing(_WIDTH * columns, _HEIGHT * rows + 0.5) as made:
        axes = made.figure.subplots(rows, columns, squeeze=False)
        for axis, length in zip_longest(axes.flat, lengths):
            if length is None:
                axis.set_visible(False)
                continue
            found = {row["setting"]: row for row in summary.by_setting(result, [length])}
            axis.axhline(100 * found[summary.DENSE]["accuracy"], color=_DENSE, linewidth=1)
            if mark is not None:
                axis.axvline(mark, color=_DENSE, linewidth=1, linestyle=":")
            for (family, names), (_, colour) in zip(
                families.items(), _paired(families), strict=True
            ):
                _line(axis, [found[name] for name in names], x_of, family, colour)
            axis.set(title=f"{length} tokens", xlabel=label, ylabel="accuracy, points")
        _legend(made.figure, axes.flat[0])
    return made.svg


def _line(
    axis: Any,
    rows: Sequence[Mapping[str, Any]],
    x_of: XOf,
    family: str,
    colour: str,
) -> None:
    points = sorted(
        (x, 100 * row["accuracy"], 100 * (row["change_error"] or 0.0))
        for row in rows
        if (x := x_of(row)) is not None
    )
    if points:
        at, y, error = zip(*points, strict=True)
        axis.errorbar(
            at, y, yerr=error, fmt="o-", color=colour, markersize=5, capsize=2, label=family
        )


def _sparsity(row: Mapping[str, Any]) -> float | None:
    sparsity: float | None = row["prefill"]["sparsity"]
    return sparsity


def _paired(names: Any) -> list[tuple[str, str]]:
    """Each name with a colour."""
    return [(name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(names)]


def _legend(figure: Any, axis: Any) -> None:
    """One legend for all panels, below them."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
