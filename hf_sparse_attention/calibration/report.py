"""The calibration report: one HTML file that shows why to trust the thresholds, or not to.

Self-contained: the figures are inside of it, it loads nothing and needs no JavaScript.
"""

from __future__ import annotations

import base64
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined

from hf_sparse_attention._version import __version__
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
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["number"] = _number
    source = files("hf_sparse_attention.calibration") / "report.html.j2"
    images = {name: _data_uri(draw(data)) for name, draw in FIGURES.items()}
    return environment.from_string(source.read_text("utf-8")).render(
        **data, figures=images, title=title, goal=GOAL, version=__version__
    )


def _data_uri(svg: bytes | None) -> str | None:
    return None if svg is None else f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _number(value: Any) -> str:
    """For people: four digits at most, a dash for what is not known, a tuple is a range."""
    if value is None or value == []:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_number(x)}" for name, x in value.items()) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " to ".join(dict.fromkeys(map(_number, value)))
    if isinstance(value, list):
        return ", ".join(map(_number, value))
    return str(value)
