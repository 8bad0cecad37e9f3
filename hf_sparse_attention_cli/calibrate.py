"""`calibrate`: from a model and some text to settings in a folder, and on the Hub if asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hf_sparse_attention_cli import loading
from hf_sparse_attention_cli.options import (
    Json,
    given,
)
from hf_sparse_attention_cli.push import REPORT_NAME, check_login, push_settings
from hf_sparse_attention_cli.values import (
    BY_PHASE,
    NUMBERS,
    by_phase,
    floats,
    integers,
    names,
    print_json,
)

#: The groups that --help shows the options in.
TEXT, FITTED, LIMITS = "The text", "What is fitted", "Choosing by cost"


@loading.takes_model
def calibrate(
    source: loading.ModelSource,
    out: Annotated[
        Path, typer.Option(help="Folder for the settings; may be the model's own, or a new one.")
    ],
    method: Annotated[
        Literal["blasst", "bsfa"],
        typer.Option(rich_help_panel=FITTED, help="What the settings run until told otherwise."),
    ] = "blasst",
    data: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=TEXT,
            help="A text file, a folder of them, a .jsonl file, or a dataset of the Hub. "
            "The bundled texts (prose, code, needles) if left out.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(rich_help_panel=TEXT, help="Split of a Hub dataset.")
    ] = "train",
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=TEXT,
            help="At most so many samples of each length.",
            show_default=False,
        ),
    ] = None,
    lengths: Annotated[
        Any,
        typer.Option(
            parser=integers,
            metavar=NUMBERS,
            rich_help_panel=TEXT,
            help="Sample lengths in tokens, up to what requests will have.",
            show_default="2048,4096,8192",
        ),
    ] = None,
    target_sparsity: Annotated[
        Any,
        typer.Option(
            parser=floats,
            metavar=NUMBERS,
            rich_help_panel=FITTED,
            help="BLASST: targets to fit; the first one runs. One alone fits lambda = a / L.",
            show_default="0.5,0.3,0.4,0.6,0.7",
        ),
    ] = None,
    levels: Annotated[
        Any,
        typer.Option(
            parser=integers,
            metavar=NUMBERS,
            rich_help_panel=FITTED,
            help="BSFA: numbers of blocks to keep in each block row.",
            show_default="8,16,32,64",
        ),
    ] = None,
    keep_sink: Annotated[
        bool | None,
        typer.Option(
            "--keep-sink/--no-keep-sink",
            rich_help_panel=FITTED,
            help="BSFA: never skip block 0, the attention sink.",
            show_default="keep",
        ),
    ] = None,
    granularity: Annotated[
        Literal["global", "layer", "head"] | None,
        typer.Option(
            rich_help_panel=FITTED,
            help="BLASST: one threshold for all, or one for each layer or head.",
            show_default="head",
        ),
    ] = None,
    geometries: Annotated[
        Any,
        typer.Option(
            parser=names,
            metavar="ROWSxKEYS,...",
            rich_help_panel=FITTED,
            help="Block sizes to calibrate for; each costs time.",
            show_default="64x128,64x64,64x1",
        ),
    ] = None,
    max_kl: Annotated[
        Any,
        typer.Option(
            parser=by_phase,
            metavar=BY_PHASE,
            rich_help_panel=LIMITS,
            help="Run the highest target (BSFA: smallest level) whose divergence from the dense "
            "model stays below this on held-out text, in nats; 0.01 is cautious.",
            show_default=False,
        ),
    ] = None,
    max_ppl_increase: Annotated[
        Any,
        typer.Option(
            parser=by_phase,
            metavar=BY_PHASE,
            rich_help_panel=LIMITS,
            help="The same for the perplexity: 0.01 allows one per cent more.",
            show_default=False,
        ),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=LIMITS,
            help="Held-out text, a local path like --data; the bundled validation texts if left "
            "out.",
            show_default=False,
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Start anew; else a run that was killed continues in --out."),
    ] = False,
    with_model: Annotated[
        bool, typer.Option("--with-model", help="Save the model and tokenizer to --out, too.")
    ] = False,
    report: Annotated[
        bool,
        typer.Option(
            "--report", help=f"Write {REPORT_NAME} to --out: plots and tables (needs matplotlib)."
        ),
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="REPO",
            help="Push what --out gets to this repository of the Hub; made if it is not there.",
            show_default=False,
        ),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="For a repository that --push makes.",
            show_default="as its owner has set",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Calibrate a model on some text, and store the settings.

    One dense pass a sample; both methods and every block geometry come out of it.
    """
    rows = loading.rows(data, split, samples)
    loading.check_local("--validation", validation)
    if push is not None:
        check_login()
    network, tokenizer = source.load()
    from hf_sparse_attention import calibrate as run
    from hf_sparse_attention.calibration.progress import forget
    from hf_sparse_attention.sharding import is_first
    from hf_sparse_attention_cli.summary import show, summarise

    options = given(
        samples=samples,
        lengths=lengths,
        target_sparsity=target_sparsity,
        levels=levels,
        keep_sink=keep_sink,
        granularity=granularity,
        geometries=geometries,
        max_kl=max_kl,
        max_ppl_increase=max_ppl_increase,
        validation=validation,
        report=out / REPORT_NAME if report else None,
    )
    if fresh:
        forget(out)
    config = run(
        network,
        rows,
        method=method,
        tokenizer=tokenizer,
        output_dir=out,
        progress=not source.quiet,
        **options,
    )
    if not is_first():
        return
    model_too = {"model": network, "tokenizer": tokenizer} if with_model else {}
    if with_model:
        tokenizer.save_pretrained(out)
        config.save_pretrained(out, model=network)
    summary = {"out": str(out), **summarise(type(config).from_pretrained(out))}
    if report:
        summary["report"] = str(out / REPORT_NAME)
    if push is not None:
        summary["pushed"] = push_settings(config, push, out, private=private, **model_too)
    if json:
        print_json(summary)
        return
    from rich.console import Console

    console = Console()
    show(summary, f"{source.model}, calibrated: {out}", console)
    console.print(f"To run it: {_use(out, method)}", markup=False, highlight=False, soft_wrap=True)


def _use(out: Path, method: str) -> str:
    """How the settings in `out` are run."""
    if list(out.glob("*.safetensors.index.json")) or (out / "model.safetensors").is_file():
        return f'from_pretrained("{out}", attn_implementation="{method}")'
    return f'hf_sparse_attention.load_thresholds(model, "{out}")'
