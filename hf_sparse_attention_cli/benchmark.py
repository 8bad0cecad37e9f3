"""`benchmark`: time to first token and decode rate by length, and from where on skipping pays."""

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
from hf_sparse_attention_cli.values import NUMBERS, integers, print_json

if TYPE_CHECKING:
    from rich.table import Table


@loading.takes_model
def benchmark(
    source: loading.ModelSource,
    lengths: Annotated[
        Any,
        typer.Option(
            parser=integers,
            metavar=NUMBERS,
            help="Of the prompt, in tokens.",
            show_default="512,1024,2048,4096",
        ),
    ] = None,
    settings: Settings = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="How often each runs.", show_default="3")
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Decoded after each prompt.", show_default="16"),
    ] = None,
    thresholds: Thresholds = None,
    geometry: Geometry = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Write the result there, too.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Time a model under several settings, against PyTorch's own attention.

    The settings take turns, and a speedup is the median of the rounds' ratios: above 1 is faster
    than dense. Break-even is the shortest of the lengths from which on a setting is faster.
    """
    if out is not None:
        text_file(out, "--out")
    network, tokenizer = source.load()
    from hf_sparse_attention.evaluation import benchmark as run
    from hf_sparse_attention.evaluation.store import write_json

    result = run(
        network,
        tokenizer,
        config=settings_at(thresholds, network),
        name=source.model,
        progress=not source.quiet,
        **given(
            lengths=lengths,
            settings=settings,
            rounds=rounds,
            new_tokens=new_tokens,
            geometry=geometry,
        ),
    )
    if out is not None:
        write_json(out, result)
    if json:
        print_json(result)
        return
    from rich.console import Console

    console = Console()
    console.print(_speeds(result), _break_even(result))


def _speeds(result: Any) -> Table:
    from statistics import median

    from hf_sparse_attention_cli.summary import plain_table

    table = plain_table(
        "length", "setting", "first token", "x", "tokens/s", "x", "prefill", "decode"
    )
    for row in result["rows"]:
        skipped = ["" if x is None else f"{x:.0%}" for x in row["sparsity"].values()]
        table.add_row(
            str(row["length"]),
            row["setting"],
            f"{median(row['first_token_s']):.3g} s",
            f"{row['first_token_speedup']:.2f}",
            f"{median(row['tokens_per_s']):.3g}",
            f"{row['decode_speedup']:.2f}",
            *skipped,
        )
    return table


def _break_even(result: Any) -> Table:
    from hf_sparse_attention_cli.summary import plain_table

    table = plain_table("break-even", "first token", "decode")
    for setting, found in result["break_even"].items():
        cells = ["none" if x is None else f"{x} tokens" for x in found.values()]
        table.add_row(setting, *cells)
    return table
