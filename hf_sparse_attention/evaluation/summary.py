"""What a result says: means with standard errors, paired differences, speed, break-even.

All functions take what `results.assembled` returns, or the same read back from JSON.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, median, pstdev, quantiles
from typing import Any

from hf_sparse_attention.evaluation.samples import mean_and_standard_error
from hf_sparse_attention.types import PHASES

DENSE, NEVER = "dense", "never"
#: By name, what is measured in each cell, whether more of it is slower, and in which phase.
SPEEDUPS = {
    "first_token_speedup": ("first_token_s", True, "prefill"),
    "decode_speedup": ("tokens_per_s", False, "decode"),
}
Result = Mapping[str, Any]
Rows = list[dict[str, Any]]


def settings_of(result: Result) -> list[str]:
    """The names of the settings, dense first."""
    names: list[str] = list(result["configuration"]["settings"])
    return names


def by_setting(result: Result, lengths: Sequence[int] | None = None) -> Rows:
    """A row for each setting, over all tasks and `lengths` (None: all).

    Accuracies count every task and length alike; `standard_error` is that of this mean. `change` is
    the mean difference to dense on the same samples, with its own error. Speeds are the medians of
    the samples' ratios to dense. By phase, `sparsity` is the mean over samples, beside its standard
    deviations over `samples`, `layers` and `heads`; `least` and `most` that of the two heads that
    skip least and most; and of the certificate `p50` and `p99` are the medians over samples, and
    `max` the largest.
    """
    wanted = result["configuration"]["lengths"] if lengths is None else lengths
    rows: Rows = []
    for setting in settings_of(result):
        pairs = [pair for pair in _pairs(result, setting, DENSE) if pair[0]["length"] in wanted]
        own = [cell for cell, _ in pairs]
        accuracy, error = _over_cells([cell["scores"] for cell in own])
        change, change_error = _over_cells(
            [_differences(cell["scores"], base["scores"]) for cell, base in pairs]
        )
        rows.append(
            {
                "setting": setting,
                "accuracy": accuracy,
                "standard_error": error,
                "change": change,
                "change_error": change_error,
                "first_token_speedup": _median(
                    _ratios(base["first_token_s"], cell["first_token_s"]) for cell, base in pairs
                ),
                "decode_speedup": _median(
                    _ratios(cell["tokens_per_s"], base["tokens_per_s"]) for cell, base in pairs
                ),
                "first_token_s": _median(cell["first_token_s"] for cell in own),
                "tokens_per_s": _median(cell["tokens_per_s"] for cell in own),
                **{phase: _skipped(own, phase) for phase in PHASES},
                **_costs(result, setting, wanted),
            }
        )
    return rows


def by_task(result: Result) -> Rows:
    """A row for each task and length: `accuracy` and `change` by setting, as (mean, error).

    `change` is the mean difference to dense on the same samples; errors are standard errors.
    """
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for setting in settings_of(result):
        for cell, base in _pairs(result, setting, DENSE):
            key = (cell["task"], cell["length"])
            start = {"task": key[0], "length": key[1], "accuracy": {}, "change": {}}
            row = rows.setdefault(key, start)
            row["samples"] = len(cell["scores"])
            row["accuracy"][setting] = _with_error(cell["scores"])
            row["change"][setting] = _with_error(_differences(cell["scores"], base["scores"]))
    return list(rows.values())


def by_length(result: Result) -> Rows:
    """The rows of `by_setting` for each length by itself, with the `length`."""
    return [
        {"length": length, **row}
        for length in result["configuration"]["lengths"]
        for row in by_setting(result, [length])
    ]


def overview(result: Result) -> dict[str, Any]:
    """What `evaluation.json` says in the end: the rows of `by_length`, and who breaks even where.

    JSON-ready.
    """
    return {"by_length": by_length(result), "break_even": break_even(result)}


def break_even(result: Result, base: str = DENSE) -> dict[str, dict[str, int | None]]:
    """The shortest length from which on a setting is faster than `base`, by setting and speedup.

    Of the lengths measured; faster are three quarters of the samples, and none where all of the
    phase ran dense on purpose. None where the longest of the lengths is too short. Empty if `base`
    was not run.
    """
    if base not in settings_of(result):
        return {}
    return {
        setting: {
            name: shortest_faster(
                {
                    length: _speedup_of_most(result, setting, length, name, base)
                    for length in result["configuration"]["lengths"]
                }
            )
            for name in SPEEDUPS
        }
        for setting in settings_of(result)
        if setting not in (DENSE, base)
    }


def speedup(result: Result, setting: str, length: int, name: str) -> float | None:
    """The median over all tasks' samples of how much faster `setting` is than dense."""
    return _median([_speedups(result, setting, length, name, DENSE)])


def _speedup_of_most(
    result: Result, setting: str, length: int, name: str, base: str
) -> float | None:
    """What three quarters of the samples reach; None where all of them ran dense."""
    *_, phase = SPEEDUPS[name]
    cells = (x for x in result["cells"] if (x["setting"], x["length"]) == (setting, length))
    if not any(phase in cell for cell in cells):
        return None
    known = _known([_speedups(result, setting, length, name, base)])
    return quantiles(known, n=4, method="inclusive")[0] if len(known) > 1 else _median([known])


def _speedups(
    result: Result, setting: str, length: int, name: str, base: str
) -> list[float | None]:
    """Sample by sample, of all tasks."""
    measure, slower, _ = SPEEDUPS[name]
    found = []
    for own, other in _pairs(result, setting, base):
        if own["length"] == length:
            over, under = (other, own) if slower else (own, other)
            found += _ratios(over[measure], under[measure])
    return found


def _pairs(
    result: Result, setting: str, base: str
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Each cell of `setting`, with that of `base` on the same samples."""
    bases = {(x["task"], x["length"]): x for x in result["cells"] if x["setting"] == base}
    return [
        (cell, bases[cell["task"], cell["length"]])
        for cell in result["cells"]
        if cell["setting"] == setting
    ]


def shortest_faster(speedups: Mapping[int, float | None]) -> int | None:
    """The shortest length from which on every speedup, by length, is above 1."""
    found = None
    for length in sorted(speedups, reverse=True):
        speedup = speedups[length]
        if speedup is None or speedup <= 1.0:
            break
        found = length
    return found


def depths(result: Result) -> dict[str, Rows]:
    """By setting, the mean score at each `depth` and `length`, of the tasks that have a depth."""
    found: dict[str, dict[tuple[float, int], list[float]]] = {}
    for cell in result["cells"]:
        for depth, score in zip(cell.get("depths", []), cell["scores"], strict=False):
            if depth is not None:
                own = found.setdefault(cell["setting"], {})
                own.setdefault((round(depth, 1), cell["length"]), []).append(score)
    return {
        setting: [
            {"depth": depth, "length": length, "accuracy": fmean(scores), "samples": len(scores)}
            for (depth, length), scores in sorted(own.items())
        ]
        for setting, own in found.items()
    }


def _over_cells(cells: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """The mean of the cells' means, and its standard error: the cells are independent."""
    pairs = [mean_and_standard_error(cell) for cell in cells]
    error = math.sqrt(math.fsum(error**2 for _, error in pairs)) / len(pairs)
    return fmean(mean for mean, _ in pairs), None if math.isnan(error) else error


def _with_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, None for a single value."""
    mean, error = mean_and_standard_error(values)
    return mean, None if math.isnan(error) else error


def _differences(scores: Sequence[float], dense: Sequence[float]) -> list[float]:
    return [mine - theirs for mine, theirs in zip(scores, dense, strict=True)]


def _ratios(over: Sequence[float | None], under: Sequence[float | None]) -> list[float | None]:
    return [x / y if x and y else None for x, y in zip(over, under, strict=True)]


def _known(lists: Iterable[Sequence[float | None]]) -> list[float]:
    return [x for each in lists for x in each if x is not None]


def _median(lists: Iterable[Sequence[float | None]]) -> float | None:
    known = _known(lists)
    return median(known) if known else None


def _skipped(cells: Sequence[Mapping[str, Any]], phase: str) -> dict[str, float | None]:
    """Sparsity with its spread, and the certificate; None where nothing ran on blocks."""

    def over(name: str, how: Callable[[list[float]], float]) -> float | None:
        known = _known(cell.get(phase, {}).get(name, []) for cell in cells)
        return how(known) if known else None

    return {
        "sparsity": over("sparsity", fmean),
        "samples": over("sparsity", pstdev),
        "layers": over("layers", fmean),
        "heads": over("heads", fmean),
        "least": over("least", fmean),
        "most": over("most", fmean),
        "p50": over("p50", median),
        "p99": over("p99", median),
        "max": over("max", max),
    }


def _costs(result: Result, setting: str, lengths: Sequence[int]) -> dict[str, Any]:
    """KL to dense by phase as (mean, standard error), and the perplexity; None without texts."""
    found: dict[str, Any] = {}
    for phase in PHASES:
        rows = [
            row
            for row in result["texts"]
            if (row["setting"], row["phase"]) == (setting, phase) and row["length"] in lengths
        ]
        kl, nll = (_known(row[name] for row in rows) for name in ("kl", "nll"))
        found[f"{phase}_kl"] = _with_error(kl) if kl else None
        found[f"{phase}_perplexity"] = math.exp(fmean(nll)) if nll else None
    return found
