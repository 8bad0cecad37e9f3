"""The demo's report: one table, the answers, and two sentences in plain words."""

from typing import Any

from demo_measure import Difference, Run, difference
from demo_prompt import Prompt
from rich.console import Console
from rich.table import Table

Row = tuple[str, list[str]]


def print_report(
    console: Console, runs: list[Run], prompt: Prompt, tokenizer: Any, notes: list[str]
) -> None:
    """Print how the sparse runs compare with `runs[0]`, the dense one."""
    dense, sparse = runs[0], runs[1:]
    gaps = [difference(dense.logits, run.logits) for run in sparse]
    table = Table(title="Dense attention against block skipping", title_style="bold")
    table.add_column("")
    for run in runs:
        table.add_column(run.name, justify="right")
    for section in (_speed(runs), _skipping(runs), _logits(gaps)):
        for label, cells in section:
            table.add_row(label, *cells)
        table.add_section()
    console.print()
    console.print(table)
    _print_answers(console, runs, prompt, tokenizer)
    console.print()
    for note in [*notes, *_fallbacks(sparse)]:
        console.print(f"[dim]- {note}[/dim]")


def _speed(runs: list[Run]) -> list[Row]:
    dense = runs[0]
    return [
        ("time to first token", [f"{run.first_token_s:.2f} s" for run in runs]),
        ("  against dense", [f"{dense.first_token_s / run.first_token_s:.2f}x" for run in runs]),
        ("decode, tokens/s", [f"{run.decode_tokens_per_s:.1f}" for run in runs]),
        (
            "  against dense",
            [f"{run.decode_tokens_per_s / dense.decode_tokens_per_s:.2f}x" for run in runs],
        ),
    ]


def _skipping(runs: list[Run]) -> list[Row]:
    rows: list[Row] = [
        (f"sparsity, {phase}", [_percent(_sparsity(run, phase)) for run in runs])
        for phase in ("prefill", "decode")
    ]
    for phase in ("prefill", "decode"):
        masses = [_dropped_mass(run, phase) for run in runs]
        rows.append((f"dropped mass, {phase}", []))
        for key, row in (
            ("p50", "median row"),
            ("p99", "99% of rows"),
            ("max", "any row"),
        ):
            cells = ["-" if mass is None else _percent(mass[key]) for mass in masses]
            rows.append((f"  {row} <=", cells))
    return rows


def _logits(gaps: list[Difference]) -> list[Row]:
    def row(label: str, *cells: str) -> Row:
        return label, ["-", *cells]

    return [
        row("logits, largest gap", *(f"{gap.max_abs:.2f}" for gap in gaps)),
        row("logits, mean gap", *(f"{gap.mean_abs:.3f}" for gap in gaps)),
        row("KL in nats, mean", *(f"{gap.mean_kl:.1e}" for gap in gaps)),
        row("KL in nats, largest", *(f"{gap.max_kl:.1e}" for gap in gaps)),
        row("same top token", *(_percent(gap.top1_agreement) for gap in gaps)),
    ]


def _print_answers(console: Console, runs: list[Run], prompt: Prompt, tokenizer: Any) -> None:
    console.print()
    console.print(f"[bold]Question[/bold]  {prompt.question}")
    for run in runs:
        text = tokenizer.decode(run.tokens, skip_special_tokens=True)
        answer = f"[dim]{prompt.answer_start}[/dim][green]{_first_line(text)}[/green]"
        console.print(f"[bold]{run.name:>7}[/bold]  {answer}")


def _first_line(text: str) -> str:
    return next((line for line in text.split("\n") if line.strip()), "")


def _sparsity(run: Run, phase: str) -> float | None:
    return None if run.stats is None else run.stats.sparsity(phase)


def _dropped_mass(run: Run, phase: str) -> dict[str, float] | None:
    return None if run.stats is None else run.stats.dropped_mass(phase)


def _fallbacks(runs: list[Run]) -> list[str]:
    """Every reason for which a sparse run went dense after all, with its number of calls."""
    return [
        f"{run.name}: {calls} attentions ran dense: {reason}"
        for run in runs
        if run.stats is not None
        for reason, calls in run.stats.dense().items()
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"
