"""A result as Markdown, for a model card or a page of docs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_sparse_attention.evaluation import summary

SETTING_COLUMNS = (
    "setting",
    "accuracy",
    "change",
    "KL",
    "perplexity",
    "prefill skipped",
    "decode skipped",
    "first token",
    "decoding",
)
LEGEND = """\
Accuracy: the mean over tasks and lengths, ± its standard error; change: the difference to dense on
the same samples, in points. KL: of the next-token distribution on bundled texts from dense's, in
nats, in prefill. Skipped: the share of the blocks, ± its standard deviation over samples, layers
and heads (in this order). First token, decoding: times faster than dense (PyTorch's SDPA), the
median over the samples."""


BREAK_EVEN_COLUMNS = (
    *("setting", "first token", "decoding"),
    *("first token, over never", "decoding, over never"),
)
BREAK_EVEN = """\
The shortest of the lengths from which on a setting is faster than dense; and than `never`, our
kernel without skipping: that much of it is the skipping's."""


def markdown(result: Mapping[str, Any]) -> str:
    """The whole result: what was run, the settings, and each task by itself."""
    about, machine = result["configuration"], result["machine"]
    lengths = ", ".join(map(str, about["lengths"]))
    head = (
        f"{result['model']['name']} ({result['model']['dtype']}), {len(about['tasks'])} tasks at "
        f"{lengths} tokens, {about['samples']} samples of each; blocks of {about['geometry']}; "
        f"{machine['device']}, {machine['threads']} threads; "
        f"hf-sparse-attention {machine['hf_sparse_attention']}, torch {machine['torch']}."
    )
    parts = ["## Evaluation", head, table(SETTING_COLUMNS, setting_cells(result)), LEGEND]
    names = summary.settings_of(result)
    parts += ["### By task", table(["task", "tokens", *names], task_cells(result))]
    rows = break_even_cells(result)
    if rows:
        parts += ["### Break-even", BREAK_EVEN, table(BREAK_EVEN_COLUMNS, rows)]
    return "\n\n".join(parts) + "\n"


def break_even_cells(result: Mapping[str, Any]) -> list[list[str]]:
    """A row of cells under `BREAK_EVEN_COLUMNS` for each setting but dense."""
    found = {base: summary.break_even(result, base) for base in (summary.DENSE, summary.NEVER)}
    return [
        [
            name,
            *(
                _tokens(found[base][name][measure]) if name in found[base] else ""
                for base in (summary.DENSE, summary.NEVER)
                for measure in summary.SPEEDUPS
            ),
        ]
        for name in summary.settings_of(result)
        if name != summary.DENSE
    ]


def setting_cells(
    result: Mapping[str, Any], lengths: Sequence[int] | None = None
) -> list[list[str]]:
    """A row of cells under `SETTING_COLUMNS` for each setting, at `lengths` (None: all)."""
    return [
        [
            row["setting"],
            points(row["accuracy"], row["standard_error"]),
            "" if row["setting"] == summary.DENSE else change(row),
            "" if row["prefill_kl"] is None else f"{row['prefill_kl'][0]:.2g}",
            "" if row["prefill_perplexity"] is None else f"{row['prefill_perplexity']:.2f}",
            skipped(row["prefill"]),
            skipped(row["decode"]),
            _times(row["first_token_speedup"]),
            _times(row["decode_speedup"]),
        ]
        for row in summary.by_setting(result, lengths)
    ]


def task_cells(result: Mapping[str, Any]) -> list[list[str]]:
    """A row of cells for each task and length: its name, the length, an accuracy a setting."""
    return [
        [
            row["task"],
            str(row["length"]),
            *(points(*row["accuracy"][name]) for name in summary.settings_of(result)),
        ]
        for row in summary.by_task(result)
    ]


def points(mean: float, error: float | None) -> str:
    """An accuracy in points, with its standard error."""
    return f"{100 * mean:.1f}" if error is None else f"{100 * mean:.1f} ± {100 * error:.1f}"


def change(row: Mapping[str, Any]) -> str:
    """The paired difference to dense, in points."""
    error = row["change_error"]
    return f"{100 * row['change']:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def skipped(found: Mapping[str, float | None]) -> str:
    """The sparsity, and its spread over samples, layers and heads."""
    if found["sparsity"] is None:
        return ""
    spread = [100 * (found[name] or 0.0) for name in ("samples", "layers", "heads")]
    return f"{100 * found['sparsity']:.0f}% ± {'/'.join(f'{x:.0f}' for x in spread)}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, without columns that are empty in every row."""
    columns, rows = without_empty(columns, list(rows))
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def without_empty(
    columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """The columns in which some row has something, and the rows under them."""
    kept = [n for n in range(len(columns)) if any(row[n] for row in rows)]
    return [columns[n] for n in kept], [[row[n] for n in kept] for row in rows]


def _times(speedup: float | None) -> str:
    return "" if speedup is None else f"{speedup:.2f}x"


def _tokens(length: int | None) -> str:
    """A break-even."""
    return "none" if length is None else f"{length} tokens"
