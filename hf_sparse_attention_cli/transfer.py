"""`export` and `import`: settings to and from other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hf_sparse_attention_cli.values import BY_PHASE, by_phase, print_json

Source = Annotated[
    str,
    typer.Argument(metavar="PATH_OR_REPO", help="A folder, or a Hub repository such as org/model."),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the repository.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def export(
    path_or_repo: Source,
    to: Annotated[
        Literal["modelopt", "tensorrt-llm", "sglang", "vllm"],
        typer.Option(help="The engine to write for."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write; for modelopt also a checkpoint's folder, whose config.json gets "
            "the key. Without it the text goes to stdout.",
            show_default=False,
        ),
    ] = None,
    target_sparsity: Annotated[
        Any,
        typer.Option(
            parser=by_phase,
            metavar=BY_PHASE,
            help="In place of the calibrated target.",
            show_default=False,
        ),
    ] = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Write calibrated settings for another engine.

    BLASST only: no other engine runs BSFA. On stderr, or under `notes` in JSON: what that engine
    decides otherwise than this package does.
    """
    from hf_sparse_attention.config import SparseAttentionConfig
    from hf_sparse_attention.interop import export as write
    from hf_sparse_attention.interop import write_key, write_text

    config = SparseAttentionConfig.from_pretrained(path_or_repo, revision=revision)
    exported = write(config, to, target_sparsity=target_sparsity)
    written = None
    if out is not None and to == "modelopt":
        written = write_key(exported.content, out)
    elif out is not None:
        written = write_text(exported.text, out)
    if json:
        data = {"engine": to, "content": exported.content, "notes": exported.notes}
        print_json({**data, "file": written and str(written)})
        return
    for note in exported.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(exported.text if written is None else f"wrote {written}")


def import_(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A checkpoint's folder or JSON file with ModelOpt's settings, or a .pt file of "
            "BSFA's authors.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the settings; may be the model's own.")],
    geometry: Annotated[
        str | None,
        typer.Option(
            metavar="ROWSxKEYS",
            help="Run ModelOpt's factors on these blocks, such as 64x64, in place of its own.",
            show_default=False,
        ),
    ] = None,
    keep_sink: Annotated[
        bool, typer.Option("--keep-sink", help="BSFA: never skip block 0, unlike its authors.")
    ] = False,
    json: Json = False,
) -> None:
    """Read settings that another tool has made.

    On stderr, or under `notes` in JSON: what is not as it was there.
    """
    from hf_sparse_attention.interop import import_bsfa, import_modelopt
    from hf_sparse_attention_cli.summary import show, summarise

    if file.suffix in (".pt", ".pth"):
        if geometry is not None:
            raise ValueError(
                "--geometry: expected with ModelOpt's settings only; BSFA's thresholds "
                "run on their own blocks and no others"
            )
        imported = import_bsfa(file, keep_sink=keep_sink)
    else:
        if keep_sink:
            raise ValueError("--keep-sink: expected with BSFA's .pt files only")
        imported = import_modelopt(file, geometry=geometry)
    imported.config.save_pretrained(out)
    summary = {"out": str(out), **summarise(imported.config)}
    if json:
        print_json({**summary, "notes": imported.notes})
        return
    for note in imported.notes:
        typer.echo(f"note: {note}", err=True)
    from rich.console import Console

    show(summary, f"{file}, imported: {out}", Console())
