"""`calibrate`: from a model and some text to settings in a folder, and on the Hub if asked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hf_sparse_attention_cli.values import NUMBERS, floats, integers, print_json

#: The groups that --help shows the options in.
TEXT, FITTED, LOADING = "The text", "What is fitted", "Loading the model"
CHOSEN = "Choosing by cost"


def calibrate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder, a Hub repository such as org/model, or a .gguf file."
        ),
    ],
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
            help="BLASST: what shares one threshold.",
            show_default="global",
        ),
    ] = None,
    geometries: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=FITTED,
            metavar="ROWSxKEYS",
            help="Blocks to calibrate for; may be repeated.",
            show_default="64x128, 64x64 and 64x1",
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            rich_help_panel=CHOSEN,
            help="Run the highest target (BSFA: the smallest level) that diverges by at most so "
            "many nats from the dense model on held-out text, in each phase.",
            show_default=False,
        ),
    ] = None,
    max_ppl_increase: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            rich_help_panel=CHOSEN,
            help="The same for the perplexity: 0.01 allows one per cent more.",
            show_default=False,
        ),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=CHOSEN,
            help="Held-out text: a file, a folder or a .jsonl file. The bundled texts' validation "
            "part if left out.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(
            rich_help_panel=LOADING, help="Of the weights; auto is what the model was saved in."
        ),
    ] = "auto",
    device: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=LOADING,
            help="Such as cpu or cuda:1.",
            show_default="a GPU if there is one",
        ),
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=LOADING,
            help="`auto` spreads the model over all devices (needs accelerate).",
            show_default=False,
        ),
    ] = None,
    gguf_file: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=LOADING,
            help="A GGUF file in the folder or repository.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=LOADING, help="Branch, tag or commit of MODEL.", show_default=False
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            rich_help_panel=LOADING,
            help="Run the repository's own model code.",
        ),
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Start anew; else a run that was killed continues in --out."),
    ] = False,
    with_model: Annotated[
        bool, typer.Option("--with-model", help="Save the model and tokenizer to --out, too.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Calibrate a model on some text, and store the settings.

    One dense pass a sample; both methods and every block geometry come out of it.
    """
    rows = _rows(data, split, samples)
    network, tokenizer = _load(
        *_where(model, gguf_file),
        dtype=dtype,
        device=device,
        device_map=device_map,
        revision=revision,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
    )
    from hf_sparse_attention import calibrate as run
    from hf_sparse_attention.calibration.processes import is_first
    from hf_sparse_attention.calibration.progress import forget
    from hf_sparse_attention_cli.summary import show, summarise

    options = {
        "samples": samples,
        "lengths": lengths,
        "target_sparsity": target_sparsity,
        "levels": levels,
        "keep_sink": keep_sink,
        "granularity": granularity,
        "geometries": geometries,
        "max_kl": max_kl,
        "max_ppl_increase": max_ppl_increase,
        "validation": validation,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if fresh:
        forget(out)
    config = run(
        network,
        rows,
        method=method,
        tokenizer=tokenizer,
        output_dir=out,
        progress=not quiet,
        **given,
    )
    if not is_first():
        return
    if with_model:
        network.save_pretrained(out)
        tokenizer.save_pretrained(out)
        config.save_pretrained(out)
    summary = {"out": str(out), **summarise(type(config).from_pretrained(out))}
    if json:
        print_json(summary)
        return
    from rich.console import Console

    show(summary, f"{model}, calibrated: {out}", Console())


def _where(model: str, gguf_file: str | None) -> tuple[str, str | None]:
    """The folder or repository, and the GGUF file in it."""
    if gguf_file is None and model.endswith(".gguf"):
        return str(Path(model).parent), Path(model).name
    return model, gguf_file


def _rows(data: str | None, split: str, samples: int | None) -> Any:
    """What `calibrate` takes: None, a path, or a streaming dataset."""
    if data is None or Path(data).exists():
        return data
    if data.startswith((".", "/", "~")) or data.endswith((".txt", ".jsonl", ".md")):
        raise FileNotFoundError(f"--data: expected a file or folder at {data}, found none")
    if samples is None:
        raise typer.BadParameter(
            f"{data} is no local file, and a dataset of the Hub may be endless: say how many",
            param_hint="--samples",
        )
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "--data: expected the package datasets for a dataset of the Hub, found none; "
            "pip install datasets"
        ) from error
    return datasets.load_dataset(data, split=split, streaming=True)


def _load(
    source: str,
    gguf_file: str | None,
    *,
    dtype: str,
    device: str | None,
    device_map: str | None,
    revision: str | None,
    trust_remote_code: bool,
    quiet: bool,
) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if quiet:
        logging.disable_progress_bar()
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if gguf_file is not None:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    if device_map is not None:
        options["device_map"] = device_map
    network = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **options
    )
    if device_map is None:
        rank = os.environ.get("LOCAL_RANK", "0")
        network.to(device or (f"cuda:{rank}" if torch.cuda.is_available() else "cpu"))
    return network.eval(), tokenizer
