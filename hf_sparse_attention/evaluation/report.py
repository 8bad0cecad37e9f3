"""The evaluation report: one HTML file with what is lost, what is skipped, and what is won."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_sparse_attention import html_report
from hf_sparse_attention.evaluation import markdown, summary
from hf_sparse_attention.evaluation import report_plots as plots
from hf_sparse_attention.thresholds import write_atomically

FIGURES = {
    "sparsity": plots.accuracy_against_sparsity,
    "speed": plots.accuracy_against_speed,
    "length": plots.speed_against_length,
    "depth": plots.depth_maps,
}


def write_report(result: Mapping[str, Any], path: str | Path) -> None:
    """Writes the report of what `evaluate` returned to `path`, atomically.

    Raises:
        ImportError: matplotlib is not installed.
    """
    write_atomically(Path(path), render(result).encode())


def render(result: Mapping[str, Any]) -> str:
    """The HTML of the report."""
    names = summary.settings_of(result)
    about = {**result["configuration"], "samples": markdown.counts(result)}
    lengths = about["lengths"]
    data = {
        "title": result["model"]["name"],
        "head": markdown.head(result),
        "facts": {
            "model": f"{result['model']['class']}, {result['model']['parameters']:,} parameters, "
            f"{result['model']['dtype']}, weights {result['model']['weights']}",
            **{name.replace("_", " "): value for name, value in about.items()},
            "thresholds": _thresholds(result),
            **{name.replace("_", " "): value for name, value in result["machine"].items()},
            "minutes of measuring": round(result["seconds"] / 60, 1),
        },
        "legend": markdown.LEGEND,
        "settings": _table(markdown.SETTING_COLUMNS, markdown.setting_cells(result)),
        "lengths": {
            length: _table(markdown.SETTING_COLUMNS, markdown.setting_cells(result, [length]))
            for length in (lengths if len(lengths) > 1 else ())
        },
        "skipped": _table(markdown.SKIPPED_COLUMNS, markdown.skipped_cells(result)),
        "skipped_note": markdown.SKIPPED,
        "tasks": _table(["task", "tokens", *names], markdown.task_cells(result)),
        "tasks_note": markdown.TASK_LEGEND,
        "break_even": _table(markdown.BREAK_EVEN_COLUMNS, markdown.break_even_cells(result)),
        "break_even_note": markdown.BREAK_EVEN.replace("`", ""),
    }
    figures = {name: draw(result) for name, draw in FIGURES.items()}
    return html_report.render(__package__, "report.html.j2", data, figures)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, Any]:
    """A table for the template, without empty columns."""
    shown, cells = markdown.without_empty(columns, rows)
    return {"columns": shown, "rows": cells}


def _thresholds(result: Mapping[str, Any]) -> str:
    """Where they are from, with all that is known: settings of the user's would fill pages."""
    if not result["calibration"]:
        return markdown.thresholds(result)
    (about, *_) = result["calibration"].values()
    told = [
        f"{name.replace('_', ' ')}: {html_report.number(value)}" for name, value in about.items()
    ]
    return "; ".join([markdown.thresholds(result), *told])
