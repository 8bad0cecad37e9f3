"""Options that several commands have: which model, how it is loaded, what is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hf_sparse_attention_cli.values import names

#: The group that --help shows them in.
LOADING = "Loading the model"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A folder, a Hub repository such as org/model, or a .gguf file."
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        rich_help_panel=LOADING, help="Of the weights; auto is what the model was saved in."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=LOADING,
        help="Such as cpu or cuda:1.",
        show_default="a GPU if there is one",
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=LOADING,
        help="`auto` spreads the model over all devices (needs accelerate).",
        show_default=False,
    ),
]
GgufFile = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=LOADING,
        help="A GGUF file in the folder or repository.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=LOADING, help="Branch, tag or commit of MODEL.", show_default=False
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        rich_help_panel=LOADING,
        help="Run the repository's own model code.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

# Of `evaluate` and `benchmark`

Settings = Annotated[
    Any,
    typer.Option(
        parser=names,
        metavar="SETTING,...",
        help="What is compared: dense, never, blasst:0.5, blasst:0.5:head, bsfa:k=16, "
        "budget:0.02, window:0.5, window:k=16.",
        show_default=False,
    ),
]
Thresholds = Annotated[
    str | None,
    typer.Option(
        help="Folder or Hub repository with calibrated settings. If left out, the model's own; if "
        "it has none, it is calibrated on bundled text.",
        show_default=False,
    ),
]
Geometry = Annotated[
    str | None,
    typer.Option(
        metavar="ROWSxKEYS",
        help="Blocks that run, such as 64x64.",
        show_default="what suits this machine best",
    ),
]


def given(**options: Any) -> dict[str, Any]:
    """Those of the options that were given: what runs has defaults of its own."""
    return {name: value for name, value in options.items() if value is not None}


def settings_at(thresholds: str | None, model: Any) -> Any:
    """The calibrated settings at `thresholds`, of this very model; None if none were named."""
    if thresholds is None:
        return None
    from hf_sparse_attention.config import SparseAttentionConfig
    from hf_sparse_attention.control import check_same_model

    config = SparseAttentionConfig.from_pretrained(thresholds)
    check_same_model(model, config, thresholds)
    return config


def text_file(path: Path, option: str) -> None:
    """Raises IsADirectoryError if a file cannot be written at `path`, before the work is done."""
    if path.is_dir():
        raise IsADirectoryError(f"{option}: expected the name of a file, got the folder {path}")
