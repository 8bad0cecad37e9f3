"""A real model on a long text: dense attention against BLASST against BSFA, on this machine's CPU.

    make demo                                            # SmolLM2-135M on a book, about 6000 tokens
    python examples/demo.py --max-tokens 3000            # shorter
    python examples/demo.py --model org/name --text notes.txt --question "Who pays?"

Each way is timed twice, in turns, with the counters off, and the better time stands; one more run
collects the stats.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from demo_measure import COMPARED, Run, decoder_layers, measure, per_layer
from demo_model import load
from demo_prompt import Prompt, book_prompt, calibration_ids, own_prompt
from demo_report import print_report
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from hf_sparse_attention import (
    SparseAttentionConfig,
    available_backends,
    calibrate,
    collect_stats,
    set_sparse_attention,
)

# BLASST's lambda is factor / kv_len. Decoding has one row a block, so it needs a far smaller one.
BLASST_FACTOR = {"prefill": 200.0, "decode": 3.0}
# BSFA keeps one block in this many, of the longest block row, besides the sink and the diagonal.
BSFA_SHARE = 4

ROUNDS = 2
WARM_UP_TOKENS = 600

#: {name: its settings, None for dense}.
Ways = dict[str, SparseAttentionConfig | None]

console = Console()


def main(
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id; SmolLM2-135M-Instruct if left out.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A text file; else a book.")
    ] = None,
    question: Annotated[
        str, typer.Option(help="Asked at the end of --text.")
    ] = "What is this text about?",
    answer_start: Annotated[
        str, typer.Option(help="How the answer to --question begins; helps small models.")
    ] = "",
    max_tokens: Annotated[
        int | None, typer.Option(min=700, help="Longest prompt; 6000, on the reference 2000.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 24,
    backend: Annotated[str, typer.Option(help="One of available_backends(), or auto.")] = "auto",
    dtype: Annotated[Literal["bfloat16", "float32", "float16"], typer.Option()] = "bfloat16",
) -> None:
    """Compare dense attention, BLASST and BSFA on one prompt."""
    if backend not in ("auto", *available_backends()):
        valid = ", ".join(["auto", *available_backends()])
        raise typer.BadParameter(
            f"expected one of {valid}, got {backend!r}", param_hint="--backend"
        )
    native = backend != "reference" and available_backends()["cpu"] is None
    if max_tokens is None:
        max_tokens = 6000 if native else 2000
    with console.status("Loading the model (the first time: downloads and converts it)"):
        network, tokenizer, name = load(model, getattr(torch, dtype))
    if text is None:
        prompt = book_prompt(tokenizer, max_tokens)
    else:
        prompt = own_prompt(tokenizer, text, question, answer_start, max_tokens)
    _introduce(name, dtype, prompt, backend)
    with _progress() as bar:
        bsfa, calibrated = _calibrate_bsfa(network, tokenizer, prompt, bar)
        ways: Ways = {"dense": None}
        if native:
            ways["no skip"] = SparseAttentionConfig("blasst", threshold_scale_factor=0)
        ways["blasst"] = SparseAttentionConfig("blasst", threshold_scale_factor=BLASST_FACTOR)
        ways["bsfa"] = bsfa
        ways = {name: way and replace(way, backend=backend) for name, way in ways.items()}
        runs = _time(network, ways, prompt.input_ids, new_tokens, bar)
        stats = _count(network, ways, prompt.input_ids, new_tokens, bar)

    notes = [*_notes(prompt, text is None, native), calibrated]
    print_report(
        console, [replace(run, stats=stats.get(run.name)) for run in runs], prompt, tokenizer, notes
    )


def _introduce(name: str, dtype: str, prompt: Prompt, backend: str) -> None:
    tokens = prompt.input_ids.shape[1]
    threads = torch.get_num_threads()
    console.print(f"[bold]{name}[/bold], {dtype}, {threads} CPU threads")
    console.print(f"{prompt.title}: [bold]{tokens}[/bold] tokens")
    for candidate, reason in available_backends().items():
        console.print(f"  backend {candidate}: {reason or 'available'}", style="dim")
    console.print(f"  asked for: {backend}", style="dim")
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        console.print(f"  this machine is busy (load {load:.1f} on {cores} cores): times are rough")


def _switch(network: Any, way: SparseAttentionConfig | None) -> None:
    """Let `network` run dense (None), or with the settings `way`."""
    if way is None:
        network.set_attn_implementation("sdpa")
    else:
        set_sparse_attention(network, way)


def _time(
    network: Any, ways: Ways, input_ids: torch.Tensor, new_tokens: int, bar: Progress
) -> list[Run]:
    """One run for each way, with the better times of the rounds."""
    best: dict[str, Run] = {}
    for number in range(ROUNDS):
        total = len(ways) * len(decoder_layers(network))
        with _step(bar, f"timing, round {number + 1} of {ROUNDS}", total) as advance:
            for name, way in ways.items():
                _switch(network, way)
                measure(network, name, input_ids[:, :WARM_UP_TOKENS], 2)  # kernels and memory
                run = measure(network, name, input_ids, new_tokens, advance)
                best[name] = run.with_times_of(best.get(name, run))
    return list(best.values())


def _count(
    network: Any, ways: Ways, input_ids: torch.Tensor, new_tokens: int, bar: Progress
) -> dict[str, Any]:
    """The stats of each way that skips; counting costs time, so it is not done in a timed run."""
    skipping = {name: way for name, way in ways.items() if name not in ("dense", "no skip")}
    found = {}
    with _step(bar, "counting", len(skipping) * len(decoder_layers(network))) as advance:
        for name, way in skipping.items():
            _switch(network, way)
            with collect_stats(network) as found[name]:
                measure(network, name, input_ids, new_tokens, advance)
    return found


def _calibrate_bsfa(
    network: Any, tokenizer: Any, prompt: Prompt, bar: Progress
) -> tuple[SparseAttentionConfig, str]:
    """Calibrate on other pages than the prompt's; the settings, and a line for the report."""
    tokens = prompt.input_ids.shape[1]
    ids = calibration_ids(tokenizer, tokens)
    level = max(1, tokens // 64 // BSFA_SHARE)
    lengths = [WARM_UP_TOKENS, ids.shape[1]]  # those that will run
    passes = len(lengths) * len(decoder_layers(network))
    start = time.perf_counter()
    with (
        _step(bar, "calibrating bsfa on other pages", passes) as advance,
        per_layer(network, advance),
    ):
        config = calibrate(
            network,
            [ids[0]],
            method="bsfa",
            levels=[level],
            geometries="64x64",
            lengths=lengths,
            progress=False,
        )
    seconds = time.perf_counter() - start
    return config, (
        f"BSFA was calibrated in memory, to keep about {level} blocks a block row, "
        f"on {ids.shape[1]} tokens from the end of the book: {seconds:.0f} s."
    )


def _notes(prompt: Prompt, planted: bool, native: bool) -> list[str]:
    factors, kv_len = BLASST_FACTOR, prompt.input_ids.shape[1]
    at_the_end = factors["prefill"] / kv_len
    return [
        *(["The sentence that answers the question was planted in the book."] if planted else []),
        "Dense is PyTorch's scaled_dot_product_attention. Each time is the better of two.",
        f"Logits are compared with dense ones over the last {COMPARED} tokens; KL(dense || run).",
        "Dropped mass is the certificate: a bound on the share of softmax mass that a row lost.",
        *(
            ["No skip is our kernel with lambda = 0, to tell the kernel from the skipping."]
            if native
            else []
        ),
        (
            f"BLASST ran uncalibrated: lambda = {factors['prefill']:.0f} / kv_len in prefill "
            f"({at_the_end:.3f} here) and {factors['decode']:.0f} / kv_len in decode."
        ),
    ]


def _progress() -> Progress:
    columns = (TextColumn("{task.description:<36}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


@contextmanager
def _step(bar: Progress, title: str, total: int | None) -> Iterator[Callable[[], None]]:
    """A line of the progress bar; yields what to call after each part of `total`."""
    task = bar.add_task(title, total=total)
    yield lambda: bar.advance(task)
    bar.update(task, total=total or 1, completed=total or 1)
    bar.stop_task(task)


if __name__ == "__main__":
    typer.run(main)
