"""The calibration report: one HTML file that shows why to trust the thresholds, or not to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sparse_attention import html_report
from hf_sparse_attention.calibration import report_plots as plots
from hf_sparse_attention.calibration.report_data import GOAL, report_data
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.thresholds import write_atomically

if TYPE_CHECKING:
    from hf_sparse_attention.calibration.observation import Observations

FIGURES = {
    "curves": plots.sparsity_against_lambda,
    "needed": plots.fit_against_length,
    "heads": plots.heat_maps,
    "held_out": plots.target_against_measured,
}


def write_report(
    config: SparseAttentionConfig,
    observations: Observations | None,
    path: str | Path,
    title: str = "",
) -> None:
    """Writes the report to `path`, atomically.

    Args:
        config: what calibration made.
        observations: what it was made from; None leaves out the figures that need it.
        path: of the HTML file.
        title: the model's name.

    Raises:
        ImportError: matplotlib is not installed.
    """
    html = render(report_data(config, observations), title)
    write_atomically(Path(path), html.encode())


def render(data: dict[str, Any], title: str = "") -> str:
    """The HTML of what `report_data` gives."""
    figures = {name: draw(data) for name, draw in FIGURES.items()}
    about = {"title": title, "goal": GOAL}
    return html_report.render(__package__, "report.html.j2", {**data, **about}, figures)
