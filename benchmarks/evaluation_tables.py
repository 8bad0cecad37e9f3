"""Writes docs/evaluation-results.md and its plots: `python -m benchmarks.evaluation_tables`.

From benchmarks/results/evaluation_*.json, which `python -m benchmarks.evaluation` measures.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import evaluation_text as text
from benchmarks.evaluation import PLANS
from benchmarks.table_format import HERE
from hf_sparse_attention.evaluation import markdown, report_plots, summary
from hf_sparse_attention.evaluation.settings import Setting
from hf_sparse_attention.evaluation.tasks import STRESS_TASKS

DOCS = HERE.parent / "docs"
PAGE = DOCS / "evaluation-results.md"
FIGURES = {
    "sparsity": (report_plots.accuracy_against_sparsity, "Accuracy against sparsity"),
    "speed": (report_plots.accuracy_against_speed, "Accuracy against time to first token"),
    "length": (report_plots.speed_against_length, "Speed against length"),
    "depth": (report_plots.depth_maps, "Needles by depth"),
}
Result = dict[str, Any]


def page(results: dict[str, Result], images: Path) -> str:
    """The page; its plots are written to `images`."""
    parts = [text.HEAD]
    for name in dict.fromkeys(result["model"]["name"] for result in results.values()):
        own = {key: x for key, x in results.items() if x["model"]["name"] == name}
        for key, result in own.items():
            parts += (_stress if _is_stress(result) else _model)(key, result, images)
        parts += _by_length(name, [x for x in own.values() if not _is_stress(x)], images)
    parts += _times(results)
    return "\n".join(parts).rstrip() + "\n"


def _is_stress(result: Result) -> bool:
    return set(result["configuration"]["tasks"]) <= set(STRESS_TASKS)


def _model(key: str, result: Result, images: Path) -> Iterator[str]:
    lengths = " and ".join(map(str, result["configuration"]["lengths"]))
    yield f"## {result['model']['name']}, {lengths} tokens{text.TITLES.get(key, '')}\n"
    yield _facts(result)
    if key in text.NOTES:
        yield text.NOTES[key] + "\n"
    yield from _settings(result)
    yield from _figures(key, result, images, FIGURES)
    yield "### By task\n"
    names = summary.settings_of(result)
    yield markdown.table(["task", "tokens", *names], markdown.task_cells(result)) + "\n"
    yield "### Skipped, and the certificate\n"
    yield markdown.table(markdown.SKIPPED_COLUMNS, markdown.skipped_cells(result)) + "\n"
    yield "### Where it loses\n"
    yield "\n".join(_losses(result)) + "\n"


def _stress(key: str, result: Result, images: Path) -> Iterator[str]:
    about = result["configuration"]
    where = f"{' and '.join(map(str, about['lengths']))} tokens, blocks of {about['geometry']}"
    yield f"## The stress test: {result['model']['name']}, {where}\n"
    yield text.STRESS + "\n"
    yield _facts(result)
    yield from _figures(key, result, images, ["depth"])
    yield from _settings(result)
    yield "Right answers by depth:\n"
    found = summary.depths(result)
    grid = sorted({(row["length"], row["depth"]) for row in found[summary.DENSE]})
    several = len(about["lengths"]) > 1
    heads = [f"{depth:.0%}" + (f" of {n}" if several else "") for n, depth in grid]
    rows = []
    for name, cells in found.items():
        at = {(row["length"], row["depth"]): row for row in cells}
        counts = [at[place] for place in grid]
        shown = [f"{row['accuracy'] * row['samples']:.0f}/{row['samples']}" for row in counts]
        rows.append([name, *shown])
    yield markdown.table(["setting", *heads], rows) + "\n"
    yield "### Where it loses\n"
    yield "\n".join(_losses(result)) + "\n"


def _facts(result: Result) -> str:
    about, machine = result["configuration"], result["machine"]
    least = min(row["samples"] for row in summary.by_task(result))
    return (
        f"{markdown.head(result)} Tasks: {', '.join(about['tasks'])}; one answer more or less of "
        f"a task's {least} is {100 / least:.0f} points. Answers of at most "
        f"{about['max_new_tokens']} tokens; seed {about['seed']}; transformers "
        f"{machine['transformers']}.\n"
    )


def _settings(result: Result) -> Iterator[str]:
    """The table of the settings at each length."""
    lengths = result["configuration"]["lengths"]
    for length in lengths:
        if len(lengths) > 1:
            yield f"### {length} tokens\n"
        cells = markdown.setting_cells(result, [length])
        yield markdown.table(markdown.SETTING_COLUMNS, cells) + "\n"


def _figures(key: str, result: Result, images: Path, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        draw, title = FIGURES[name]
        svg = draw(result)
        if svg is not None:
            file = images / f"evaluation_{key}_{name}.svg"
            file.write_bytes(svg)
            yield f"![{title}: {result['model']['name']}](images/{file.name})\n"


def _losses(result: Result) -> Iterator[str]:
    """By setting: the task that loses most, the flattest head, and the lengths that do not pay."""
    rows = {row["setting"]: row for row in summary.by_setting(result)}
    own = summary.break_even(result, summary.NEVER)
    lengths = result["configuration"]["lengths"]
    for setting, even in summary.break_even(result).items():
        told = [_worst(result, setting)]
        flattest = rows[setting]["prefill"]["least"]
        if flattest is not None and Setting.parse(setting).kind not in ("never", "window"):
            told.append(f"in prefill its flattest head skips {flattest:.0%}")
        told.append(f"faster to the first token than dense {_from(even, lengths)}")
        if setting in own:
            told[-1] += f", than `never` {_from(own[setting], lengths)}"
        yield f"- `{setting}`: {'; '.join(told)}."


def _worst(result: Result, setting: str) -> str:
    """The task that loses most, and whether that may be chance."""
    rows = summary.by_task(result)
    row = min(rows, key=lambda row: row["change"][setting][0])
    change, error = row["change"][setting]
    if change >= 0:
        return "loses on no task"
    where = f"loses most on {row['task']} at {row['length']}, {-100 * change:.0f}"
    if not error:
        return f"{where} points, the same in each of {row['samples']} samples"
    chance = ", which may be chance" if -change < 2 * error else ""
    return f"{where} ± {100 * error:.0f} points{chance}"


def _from(even: dict[str, int | None], lengths: Sequence[int]) -> str:
    length = even["first_token_speedup"]
    if length is None:
        return f"not at {lengths[0]}" if len(lengths) == 1 else "at none of the lengths"
    if length > min(lengths):
        return f"from {length} tokens on"
    return f"at {length} tokens" if len(lengths) == 1 else "at all lengths"


def _by_length(name: str, results: Sequence[Result], images: Path) -> Iterator[str]:
    """What the results of one model have in common, if they are of several lengths."""
    results = _of_several_lengths(results)
    if len(results) < 2:
        return
    merged = common(results)
    tasks = merged["configuration"]["tasks"]
    yield f"## {name}, by length\n"
    yield text.BY_LENGTH + f" Tasks: {', '.join(tasks)}; {markdown.counts(merged)}.\n"
    rows = [
        [str(length), *cells]
        for result in results
        for length in result["configuration"]["lengths"]
        for cells in markdown.setting_cells(_of_tasks(result, tasks), [length])
    ]
    yield markdown.table(["tokens", *markdown.SETTING_COLUMNS], rows) + "\n"
    key = f"{name.lower().split('-')[0].replace(' ', '')}_by_length"
    yield from _figures(key, merged, images, ["length", "depth"])


def _of_several_lengths(results: Sequence[Result]) -> list[Result]:
    """The first, and those after it of other lengths with a task in common."""
    chosen: list[Result] = []
    for result in results:
        about = [each["configuration"] for each in (*chosen, result)]
        lengths = [n for each in about for n in each["lengths"]]
        tasks = set.intersection(*(set(each["tasks"]) for each in about))
        if tasks and len(set(lengths)) == len(lengths):
            chosen.append(result)
    return chosen


def _of_tasks(result: Result, tasks: Sequence[str]) -> Result:
    """`result` as if only `tasks` had been asked; without texts, which belong to none."""
    cells = [cell for cell in result["cells"] if cell["task"] in tasks]
    configuration = {**result["configuration"], "tasks": list(tasks)}
    return {**result, "configuration": configuration, "cells": cells, "texts": []}


def common(results: Sequence[Result]) -> Result:
    """The results of one model at several lengths as one: the tasks and settings that all have."""
    about = [result["configuration"] for result in results]
    tasks, settings = (
        [x for x in about[0][name] if all(x in other[name] for other in about)]
        for name in ("tasks", "settings")
    )
    cells = [
        cell
        for result in results
        for cell in _of_tasks(result, tasks)["cells"]
        if cell["setting"] in settings
    ]
    samples = {str(cell["length"]): len(cell["scores"]) for cell in cells}
    lengths = sorted(map(int, samples))
    configuration = {"tasks": tasks, "settings": settings, "lengths": lengths, "samples": samples}
    merged = _of_tasks(results[0], tasks)
    return {**merged, "configuration": {**about[0], **configuration}, "cells": cells}


def _times(results: dict[str, Result]) -> Iterator[str]:
    """How long each plan takes."""
    yield "## What it takes\n"
    yield text.TIMES + "\n"
    rows = [
        [
            f"`python -m benchmarks.evaluation {key}`",
            markdown.counts(result),
            str(result["machine"]["threads"]),
            f"{result['seconds'] / 60:.0f}",
        ]
        for key, result in results.items()
    ]
    rows.append(["all", "", "", f"{sum(r['seconds'] for r in results.values()) / 60:.0f}"])
    yield markdown.table(["command", "of each task", "threads", "minutes"], rows)


def committed() -> dict[str, Result]:
    """The results of benchmarks/results, in the order of the plans."""
    folder = HERE / "results"
    names = [file.stem.removeprefix("evaluation_") for file in folder.glob("evaluation_*.json")]
    order = sorted(names, key=lambda name: ([*PLANS, name].index(name), name))
    return {name: json.loads((folder / f"evaluation_{name}.json").read_text()) for name in order}


def main() -> None:
    """Writes the page and the plots."""
    for old in (DOCS / "images").glob("evaluation_*.svg"):
        old.unlink()
    PAGE.write_text(page(committed(), DOCS / "images"))


if __name__ == "__main__":
    main()
