"""`evaluate`: accuracy against sparsity against time, task by task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_sparse_attention_cli import loading
from hf_sparse_attention_cli.options import (
    Geometry,
    Json,
    Settings,
    Thresholds,
    given,
    settings_at,
    text_file,
)
from hf_sparse_attention_cli.push import EVALUATION_NAME
from hf_sparse_attention_cli.values import NUMBERS, integers, names, print_json

if TYPE_CHECKING:
    from rich.table import Table


@loading.takes_model
def evaluate(
    source: loading.ModelSource,
    out: Annotated[
        Path,
        typer.Option(help="Folder for the result, evaluation.json, and all that it is made from."),
    ],
    tasks: Annotated[
        Any,
        typer.Option(
            parser=names,
            metavar="TASK,...",
            help="Such as niah_single_1,vt.",
            show_default="all of RULER's",
        ),
    ] = None,
    lengths: Annotated[
        Any,
        typer.Option(
            parser=integers,
            metavar=NUMBERS,
            help="In tokens, prompt and answer together.",
            show_default="2048,4096",
        ),
    ] = None,
    settings: Settings = None,
    samples: Annotated[
        str,
        typer.Option(
            metavar="N|LENGTH=N,...", help="Of each task at each length; or for each length."
        ),
    ] = "10",
    texts: Annotated[
        bool,
        typer.Option("--texts/--no-texts", help="Perplexity and KL on bundled texts, too."),
    ] = True,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of an answer, where its task would allow more.",
            show_default="as RULER",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    thresholds: Thresholds = None,
    geometry: Geometry = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Ask in the tokenizer's chat template.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Write a report there, one file with plots and tables (needs matplotlib).",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out that was cut off.")
    ] = False,
    json: Json = False,
) -> None:
    """Evaluate a model: RULER-style tasks, texts and times under several settings.

    Every sample runs under every setting in turn, so that differences to dense attention are
    paired. Writes evaluation.json and evaluation.md (for a model card) to --out.
    """
    if report is not None:
        text_file(report, "--report")
    from hf_sparse_attention.evaluation import evaluate as run
    from hf_sparse_attention.evaluation.arguments import chosen_tasks, samples_by_length
    from hf_sparse_attention.evaluation.markdown import markdown
    from hf_sparse_attention.evaluation.report import write_report
    from hf_sparse_attention.evaluation.settings import DEFAULT_SETTINGS, parse_settings
    from hf_sparse_attention.html_report import require_matplotlib
    from hf_sparse_attention.thresholds import write_atomically

    # What can be refused is refused before the model is loaded.
    counts = samples_by_length(samples)
    chosen_tasks(tasks)
    parse_settings(settings or DEFAULT_SETTINGS)
    if report is not None:
        require_matplotlib()
    network, tokenizer = source.load()
    result = run(
        network,
        tokenizer,
        samples=counts,
        texts=texts,
        max_new_tokens=max_new_tokens,
        seed=seed,
        config=settings_at(thresholds, network),
        chat_template=chat_template,
        output_dir=out,
        resume=resume,
        name=source.model,
        progress=not source.quiet,
        **given(tasks=tasks, lengths=lengths, settings=settings, geometry=geometry),
    )
    write_atomically(out / EVALUATION_NAME, markdown(result).encode())
    if report is not None:
        write_report(result, report)
    if json:
        print_json(result)
        return
    from rich.console import Console

    console = Console()
    console.print(f"[bold]{source.model}, evaluated: {out}[/bold]")
    for length in result["configuration"]["lengths"]:
        console.print(f"{length} tokens")
        console.print(_summary(result, length))
    if report is not None:
        console.print(f"The report: {report}", markup=False, highlight=False, soft_wrap=True)


def _summary(result: Any, length: int) -> Table:
    """Narrow enough for 80 columns; evaluation.md has more."""
    from hf_sparse_attention.evaluation import markdown, summary
    from hf_sparse_attention_cli.summary import plain_table

    names = ("setting", "accuracy", "change", "KL", "prefill", "decode", "TTFT", "rate")
    table = plain_table(*names)
    for column in table.columns:
        column.no_wrap = True
    for row in summary.by_setting(result, [length]):
        kl, _ = row["prefill_kl"] or (None, None)
        points = markdown.points(row["accuracy"], row["standard_error"]), markdown.change(row)
        accuracy, change = (text.removesuffix(markdown.ALIKE) for text in points)
        table.add_row(
            row["setting"],
            accuracy,
            "" if row["setting"] == summary.DENSE else change,
            _shown(kl, ".2g"),
            *(_shown(row[phase]["sparsity"], ".0%") for phase in ("prefill", "decode")),
            *(_shown(row[name], ".2f") for name in summary.SPEEDUPS),
        )
    return table


def _shown(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)
