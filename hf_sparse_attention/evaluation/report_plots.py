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
    return _against(result, "blocks skipped in prefill, %", _sparsity, limits=(-4.0, 104.0))


def accuracy_against_speed(result: Result) -> bytes | None:
    """A panel for each length: accuracy over the time to first token, against dense."""
    return _against(
        result,
        "time to first token, times faster",
        lambda row: row["first_token_speedup"],
        mark=1.0,
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
        _legend(made.figure, axes)
    return made.svg


def depth_maps(result: Result) -> bytes | None:
    """A heat map for each setting: the mean score by needle depth and length.

    With one length only, a column of one map for each setting.
    """
    maps = summary.depths(result)
    if not maps:
        return None
    lengths = sorted({row["length"] for found in maps.values() for row in found})
    if len(lengths) == 1:
        columns = {
            name: {row["depth"]: row["accuracy"] for row in found} for name, found in maps.items()
        }
        with drawing(1.6 + 0.75 * len(maps), 4.6) as made:
            axis = made.figure.subplots()
            image = _depth_map(axis, columns)
            axis.set_xticks(range(len(maps)), list(maps), rotation=30, ha="right")
            axis.set_title(f"{lengths[0]} tokens")
            made.figure.colorbar(image, ax=axis, label="mean score, points")
        return made.svg
    across = min(4, len(maps))
    down = -(-len(maps) // across)
    with drawing(2.4 * across + 0.6, 3.0 * down) as made:
        axes = made.figure.subplots(down, across, squeeze=False)
        for axis, item in zip_longest(axes.flat, maps.items()):
            if item is None:
                axis.set_visible(False)
                continue
            name, found = item
            by_length: dict[str, dict[float, float]] = {str(length): {} for length in lengths}
            for row in found:
                by_length[str(row["length"])][row["depth"]] = row["accuracy"]
            image = _depth_map(axis, by_length)
            axis.set(title=name, xlabel="tokens")
        made.figure.colorbar(image, ax=axes, label="mean score, points")
    return made.svg


def _depth_map(axis: Any, columns: Mapping[str, Mapping[float, float]]) -> Any:
    """The mean score by depth, a column for each name, with the points written into the cells."""
    depths = sorted({depth for scores in columns.values() for depth in scores})
    nothing = float("nan")
    values = [[100 * x.get(depth, nothing) for x in columns.values()] for depth in depths]
    image = axis.imshow(values, vmin=0, vmax=100, aspect="auto", cmap="viridis")
    for row, scores in enumerate(values):
        for column, score in enumerate(scores):
            if score == score:  # where there are samples
                dark = "black" if score > 60 else "white"
                axis.text(column, row, f"{score:.0f}", ha="center", va="center", size=7, color=dark)
    axis.grid(visible=False)
    axis.set_xticks(range(len(columns)), list(columns))
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axis.set_ylabel("depth")
    return image


def _against(
    result: Result,
    label: str,
    x_of: XOf,
    mark: float | None = None,
    limits: tuple[float, float] | None = None,
) -> bytes | None:
    """Accuracy with the error of its difference to dense over `x_of(row)`, by family and length.

    All panels have the same axes; `mark` is an x that has a line, `limits` are those of x.
    """
    lengths = result["configuration"]["lengths"]
    families: dict[str, list[str]] = {}
    for name in summary.settings_of(result)[1:]:
        families.setdefault(Setting.parse(name).family, []).append(name)
    if not families:
        return None
    columns = min(3, len(lengths))
    rows = -(-len(lengths) // columns)
    with drawing(_WIDTH * columns + 0.8 * (columns == 1), _HEIGHT * rows + 0.5) as made:
        axes = made.figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
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
                _line(axis, [found[name] for name in names], x_of, family, colour, mark is None)
            axis.set(title=f"{length} tokens", xlabel=label)
            if limits is not None:
                axis.set_xlim(limits)
            axis.tick_params(labelbottom=True)
        for axis in axes[:, 0]:
            axis.set_ylabel("accuracy, points")
        _legend(made.figure, axes)
    return made.svg


def _line(
    axis: Any,
    rows: Sequence[Mapping[str, Any]],
    x_of: XOf,
    family: str,
    colour: str,
    amounts: bool,
) -> None:
    """One family; with what each setting asks for beside its point, if `amounts` is set."""
    points = sorted(
        (x, 100 * row["accuracy"], 100 * (row["change_error"] or 0.0), _amount(row["setting"]))
        for row in rows
        if (x := x_of(row)) is not None
    )
    if points:
        at, y, error, asked = zip(*points, strict=True)
        axis.errorbar(
            at, y, yerr=error, fmt="o-", color=colour, markersize=5, capsize=2, label=family
        )
        for x, height, amount in zip(at, y, asked if amounts else [], strict=amounts):
            where = {"xytext": (2, 4), "textcoords": "offset points", "size": 7}
            axis.annotate(amount, (x, height), color=colour, **where)


def _amount(name: str) -> str:
    """What a setting asks for: `0.5` of `blasst:0.5:head`, `k=8` of `bsfa:k=8`."""
    return [*name.split(":"), ""][1]


def _sparsity(row: Mapping[str, Any]) -> float | None:
    sparsity: float | None = row["prefill"]["sparsity"]
    return None if sparsity is None else 100 * sparsity


def _paired(names: Any) -> list[tuple[str, str]]:
    """Each name with a colour."""
    return [(name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(names)]


def _legend(figure: Any, axes: Any) -> None:
    """One legend for all panels, below them, with what any of them shows."""
    found = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4)
