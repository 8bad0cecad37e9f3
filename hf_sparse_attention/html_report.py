"""What our HTML reports share: the page, its figures, and how values are shown.

A report is one file: the figures are inside of it, it loads nothing and needs no JavaScript. It is
well-formed XML, too. A report's own template extends `"page"`, uses `"macros"`, and finds its
figures by name: each is an SVG as bytes, which matplotlib draws without any window.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

from hf_sparse_attention._version import __version__

COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b7791f", "#97266d", "#285e61", "#4a5568")
BAND = "#edf2f7"
_STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: smaller, and sharp at any size
    "svg.hashsalt": "hf-sparse-attention",  # the same figure gives the same file
}


def render(
    package: str, template: str, data: Mapping[str, Any], figures: Mapping[str, bytes | None]
) -> str:
    """The HTML of a report.

    Args:
        package: the Python package that holds the template.
        template: its file name.
        data: the template's variables.
        figures: SVGs by name; None for those that have nothing to show.
    """
    own = files("hf_sparse_attention")
    sources = {
        "page": own / "html_report.html.j2",
        "macros": own / "html_report_macros.html.j2",
        "report": files(package) / template,
    }
    environment = Environment(
        loader=DictLoader({name: file.read_text("utf-8") for name, file in sources.items()}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["number"] = number
    images = {name: None if svg is None else _data_uri(svg) for name, svg in figures.items()}
    return environment.get_template("report").render(**data, figures=images, version=__version__)


def number(value: Any) -> str:
    """For people: four digits at most, a dash for what is not known, a tuple is a range."""
    if value is None or value == []:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {number(x)}" for name, x in value.items()) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " to ".join(dict.fromkeys(map(number, value)))
    if isinstance(value, list):
        return ", ".join(map(number, value))
    return str(value)


def require_matplotlib() -> None:
    """Raises ImportError, with what to install, if matplotlib is missing: before any work."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "report: expected matplotlib, found none; pip install 'hf-sparse-attention[plots]'"
        ) from error


class Drawing:
    """A figure that is being drawn; `svg` once that is done."""

    def __init__(self, figure: Any) -> None:
        self.figure = figure
        self.svg = b""


@contextmanager
def drawing(width: float, height: float) -> Iterator[Drawing]:
    """An empty figure of `width` x `height` inches, which becomes an SVG when the block ends."""
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(h_pad=0.12)
        made = Drawing(Figure(figsize=(width, height), layout=layout))
        yield made
        buffer = io.BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        made.figure.savefig(buffer, format="svg", metadata=nothing)
    # Without the document type, which names a server: the report refers to nothing outside.
    made.svg = re.sub(rb"<!DOCTYPE.*?>\s*", b"", buffer.getvalue(), flags=re.DOTALL)


def shades(count: int) -> list[str]:
    """So many colours from light to dark, for what grows: lengths, say."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.85 * (1 - i / max(1, count - 1)))) for i in range(count)]


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
