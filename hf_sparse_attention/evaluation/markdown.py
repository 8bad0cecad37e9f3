"""A result as Markdown, for a model card or a page of docs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_sparse_attention.evaluation import summary
from hf_sparse_attention.types import PHASES

_SHARES = ("sparsity", "least", "most")
_BOUNDS = ("p50", "p99", "max")
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
Accuracy: the mean over the tasks, ± its standard error; change: the difference to dense on the same
samples. Both in points; "all alike": within each task all scores, or all differences, are the same,
which tells no error. KL: of the next-token distribution, in nats, from our kernel's that skips
nothing (dense's own is rounding), and perplexity; both in prefill / in decode, on one bundled text
of prose and one of code. Skipped: the share of the blocks, ± its standard deviation over samples,
layers and heads (in this order). First token, decoding: times faster than dense (PyTorch's SDPA),
the median over the samples; and the time, the tokens a second, with blocks counted and
certified."""
TASK_LEGEND = """\
In points, ± the standard error. 16/16: all of 16 answers were right, 0/16: none. That tells no
error, and adds none to that of a mean: after n answers alike, a share of up to 3/n may still be
otherwise (at 95%)."""
SKIPPED_COLUMNS = ("setting", "phase", "skipped", "least head", "most head", "p50", "p99", "max")
SKIPPED = """\
Skipped by all heads, by the head that skips least (the mean over samples) and by the one that skips
most. The certificate, p50, p99 and max: what bounds the share of its softmax mass that a row lost;
of all rows, the median over samples of p50 and p99, and the largest max. For single keys (64x1)
the bound is the truth."""
ALIKE = " (all alike)"
BREAK_EVEN_COLUMNS = (
    *("setting", "first token", "decoding"),
    *("first token, over never", "decoding, over never"),
)
BREAK_EVEN = """\
The shortest of the lengths from which on a setting is faster than dense in three quarters of the
samples; and than `never`, our kernel without skipping: that much of it is the skipping's. Where a
setting leaves short inputs to dense on purpose, it does not count as faster."""


def markdown(result: Mapping[str, Any]) -> str:
    """The whole result: what was run, the settings, and each task by itself."""
    lengths = result["configuration"]["lengths"]
    parts = ["## Evaluation", head(result), table(SETTING_COLUMNS, setting_cells(result)), LEGEND]
    if len(lengths) > 1:
        for length in lengths:
            cells = setting_cells(result, [length])
            parts += [f"### {length} tokens", table(SETTING_COLUMNS, cells)]
    names = summary.settings_of(result)
    parts += ["### By task", TASK_LEGEND, table(["task", "tokens", *names], task_cells(result))]
    for title, legend, columns, rows in (
        ("### Skipped, and the certificate", SKIPPED, SKIPPED_COLUMNS, skipped_cells(result)),
        ("### Break-even", BREAK_EVEN, BREAK_EVEN_COLUMNS, break_even_cells(result)),
    ):
        if rows:
            parts += [title, legend, table(columns, rows)]
    return "\n\n".join(parts) + "\n"


def head(result: Mapping[str, Any]) -> str:
    """What was run on what, in a sentence or two: without it no number can be judged."""
    about, machine = result["configuration"], result["machine"]
    many = "1 task" if len(about["tasks"]) == 1 else f"{len(about['tasks'])} tasks"
    return (
        f"{result['model']['name']} ({result['model']['dtype']}); {many}, of each "
        f"{counts(result)}; blocks of {about['geometry']}; thresholds "
        f"{thresholds(result)}. {machine['device']}, {machine['threads']} "
        f"thread{'s' if machine['threads'] != 1 else ''}; hf-sparse-attention "
        f"{machine['hf_sparse_attention']}, torch {machine['torch']}."
    )


def counts(result: Mapping[str, Any]) -> str:
    """`16 samples at 2048 tokens, 4 at 4096`."""
    about = result["configuration"]
    given = about["samples"]
    each = [given if isinstance(given, int) else given[str(n)] for n in about["lengths"]]
    first, *rest = zip(each, about["lengths"], strict=True)
    told = [f"{first[0]} sample{'s' if first[0] != 1 else ''} at {first[1]} tokens"]
    return ", ".join([*told, *(f"{count} at {length}" for count, length in rest)])


def thresholds(result: Mapping[str, Any]) -> str:
    """Where they are from, in words."""
    if not result["calibration"]:
        return "none needed"
    (about, *_) = result["calibration"].values()
    own = isinstance(result["configuration"]["thresholds"], str)
    told = ["calibrated here" if own else "given, calibrated"]
    if "data" in about:
        told.append(f"on {about['data']}")
    if "lengths" in about:
        told.append(f"at {', '.join(map(str, about['lengths']))} tokens")
    return " ".join(told)


def break_even_cells(result: Mapping[str, Any]) -> list[list[str]]:
    """A row of cells under `BREAK_EVEN_COLUMNS` for each setting but dense."""
    found = {base: summary.break_even(result, base) for base in (summary.DENSE, summary.NEVER)}
    shortest = min(result["configuration"]["lengths"])
    return [
        [
            name,
            *(
                _tokens(found[base][name][measure], shortest) if name in found[base] else ""
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
    """A row of cells under `SETTING_COLUMNS` for each setting, at `lengths` (None: all).

    Without times where there are several lengths: a mean over them says nothing.
    """
    wanted = result["configuration"]["lengths"] if lengths is None else lengths
    return [
        [
            row["setting"],
            points(row["accuracy"], row["standard_error"]),
            "" if row["setting"] == summary.DENSE else change(row),
            _both(row[f"{phase}_kl"] and f"{row[f'{phase}_kl'][0]:.2g}" for phase in PHASES),
            _both(
                row[f"{phase}_perplexity"] and f"{row[f'{phase}_perplexity']:.2f}"
                for phase in PHASES
            ),
            skipped(row["prefill"]),
            skipped(row["decode"]),
            *(
                (
                    _times(row["first_token_speedup"], row["first_token_s"], " s"),
                    _times(row["decode_speedup"], row["tokens_per_s"], "/s"),
                )
                if len(wanted) == 1
                else ("", "")
            ),
        ]
        for row in summary.by_setting(result, lengths)
    ]


def skipped_cells(
    result: Mapping[str, Any], lengths: Sequence[int] | None = None
) -> list[list[str]]:
    """A row of cells under `SKIPPED_COLUMNS` for each setting and phase that ran on blocks."""
    return [
        [
            row["setting"],
            phase,
            *("" if x is None else f"{x:.0%}" for x in (row[phase][s] for s in _SHARES)),
            *("" if x is None else f"{x:.2g}" for x in (row[phase][s] for s in _BOUNDS)),
        ]
        for row in summary.by_setting(result, lengths)
        for phase in PHASES
        if row[phase]["sparsity"] is not None
    ]


def task_cells(result: Mapping[str, Any]) -> list[list[str]]:
    """A row of cells for each task and length: its name, the length, an accuracy a setting."""
    return [
        [
            row["task"],
            str(row["length"]),
            *(
                task_points(mean, error, row["samples"])
                for mean, error in map(row["accuracy"].get, summary.settings_of(result))
            ),
        ]
        for row in summary.by_task(result)
    ]


def points(mean: float, error: float | None) -> str:
    """An accuracy in points, with its standard error."""
    return f"{100 * mean:.1f}{_error(error)}"


def task_points(mean: float, error: float | None, samples: int) -> str:
    """Of one task: whole points, or how many were right where that tells no error."""
    if not error and mean in (0.0, 1.0):
        return f"{mean * samples:.0f}/{samples}"
    return f"{100 * mean:.0f}" if error is None else f"{100 * mean:.0f} ± {100 * error:.0f}"


def change(row: Mapping[str, Any]) -> str:
    """The paired difference to dense, in points."""
    return f"{100 * row['change']:+.1f}{_error(row['change_error'])}"


def _error(error: float | None) -> str:
    """How a standard error is shown; that of scores which are all alike would say too much."""
    if error is None:
        return ""
    return f" ± {100 * error:.1f}" if error else ALIKE


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


def _both(values: Iterable[str | None]) -> str:
    """`prefill / decode`; nothing where neither is known."""
    known = list(values)
    return " / ".join(x or "-" for x in known) if any(known) else ""


def _times(speedup: float | None, value: float | None, unit: str) -> str:
    return "" if speedup is None else f"{speedup:.2f}x ({value:.3g}{unit})"


def _tokens(length: int | None, shortest: int) -> str:
    """A break-even; it may lie below the shortest length that was measured."""
    if length is None:
        return "none"
    return f"at most {length} tokens" if length == shortest else f"{length} tokens"
