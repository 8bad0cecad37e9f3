"""Writes docs/evaluation-results.md and its plots: `python -m benchmarks.evaluation_tables`.

From benchmarks/results/evaluation_*.json, which `python -m benchmarks.evaluation MODEL` measures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.table_format import HERE
from hf_sparse_attention.evaluation import markdown, report_plots, summary

DOCS = HERE.parent / "docs"
PAGE = DOCS / "evaluation-results.md"
FIGURES = {
    "sparsity": (report_plots.accuracy_against_sparsity, "Accuracy against sparsity"),
    "speed": (report_plots.accuracy_against_speed, "Accuracy against time to first token"),
    "length": (report_plots.speed_against_length, "Speed against length"),
    "depth": (report_plots.depth_maps, "Needles by depth"),
}
HEAD = """# Evaluation: results

Made by `python -m benchmarks.evaluation_tables` from `benchmarks/results/evaluation_*.json`, which
`python -m benchmarks.evaluation MODEL` measures; don't edit by hand. What the tasks and settings
are: [evaluation.md](evaluation.md). Other work ran on these machines meanwhile: times are ratios on
one sample, taken in turns, and rough; [results.md](results.md) has those of a quiet machine.
"""


def page(results: dict[str, dict[str, Any]], images: Path) -> str:
    """The page; its plots are written to `images`."""
    parts = [HEAD]
    for key, result in results.items():
        parts += list(_model(key, result, images))
    return "\n".join(parts).rstrip() + "\n"


def _model(key: str, result: dict[str, Any], images: Path) -> Iterator[str]:
    about, machine = result["configuration"], result["machine"]
    samples = about["samples"]
    if isinstance(samples, dict):
        samples = ", ".join(f"{count} at {length}" for length, count in samples.items())
    lengths = " and ".join(map(str, about["lengths"]))
    yield f"## {result['model']['name']}, {lengths} tokens\n"
    yield (
        f"{result['model']['dtype']}; tasks: {', '.join(about['tasks'])}. Samples of each task: "
        f"{samples} tokens; seed {about['seed']}; blocks of {about['geometry']}. "
        f"{machine['device']}, {machine['threads']} thread(s); torch {machine['torch']}, "
        f"transformers {machine['transformers']}; {result['seconds'] / 60:.0f} minutes on the "
        "tasks.\n"
    )
    yield markdown.LEGEND + "\n"
    for length in about["lengths"]:
        yield f"### {length} tokens\n"
        yield markdown.table(markdown.SETTING_COLUMNS, markdown.setting_cells(result, [length]))
        yield ""
    for name, (draw, title) in FIGURES.items():
        svg = draw(result)
        if svg is not None:
            file = images / f"evaluation_{key}_{name}.svg"
            file.write_bytes(svg)
            yield f"![{title}: {result['model']['name']}](images/{file.name})\n"
    yield "### By task\n"
    names = summary.settings_of(result)
    yield markdown.table(["task", "tokens", *names], markdown.task_cells(result))
    yield ""
    yield "### Where it loses\n"
    yield "\n".join(_losses(result))
    yield ""


def _losses(result: dict[str, Any]) -> Iterator[str]:
    """By setting: the task that loses most, and the lengths that are too short to pay."""
    worst: dict[str, tuple[float, str]] = {}
    for row in summary.by_task(result):
        for setting, (change, error) in row["change"].items():
            if change < -2 * (error or 0.0):  # else it may be chance
                told = f"{row['task']} at {row['length']} loses most, "
                told += f"{-100 * change:.0f} ± {100 * (error or 0.0):.0f} points"
                worst[setting] = min(worst.get(setting, (0.0, "")), (change, told))
    own = summary.break_even(result, summary.NEVER)
    for setting, even in summary.break_even(result).items():
        _, told = worst.get(setting, (0.0, "no task loses more than two standard errors"))
        yield f"- `{setting}`: {told}; faster to the first token than dense {_from(even)}" + (
            f", than `never` {_from(own[setting])}." if setting in own else "."
        )


def _from(even: dict[str, int | None]) -> str:
    length = even["first_token_speedup"]
    return "at none of the lengths" if length is None else f"from {length} tokens on"


def main() -> None:
    """Writes the page and the plots."""
    files = sorted((HERE / "results").glob("evaluation_*.json"))
    results = {
        file.stem.removeprefix("evaluation_"): json.loads(file.read_text()) for file in files
    }
    PAGE.write_text(page(results, DOCS / "images"))


if __name__ == "__main__":
    main()
