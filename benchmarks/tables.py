"""Writes docs/results.md from the JSON in benchmarks/results: `python -m benchmarks.tables`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results.md"
HEAD = """# Results

Made by `python -m benchmarks.tables` from `benchmarks/results/`; don't edit by hand. Every number
is a ratio of times taken in one run, in turns, on one machine, over PyTorch's SDPA: the median over
the rounds. Larger is faster, and below 1 is slower than SDPA.
"""

LEGEND = """\
`own` is the native kernel that never skips; `own blasst` runs lambda 1e-3 on synthetic keys of
which the named share of 64-key blocks lies far below the others. SDPA in decode uses `enable_gqa`;
`sdpa_folded` has the GQA group folded into the query length."""


def _load(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((HERE / "results" / name).read_text())
    return data


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _machine(data: dict[str, Any]) -> str:
    m = data["machine"]
    return (
        f"{', '.join(m['cpu'])}; {m['cores']} cores; kernel level {m['level']}; "
        f"torch {m['torch']}; Python {m['python']}; {m['time']}."
    )


def attention() -> list[str]:
    """The attention call alone."""
    data = _load("cpu_attention.json")
    lines = ["", "## Attention alone", "", _machine(data)]
    for phase in ("prefill", "decode"):
        cases = [case for case in data["cases"] if case["phase"] == phase]
        names = list(dict.fromkeys(n for c in cases for n in c["seconds"] if n != "sdpa"))
        rows = []
        for case in cases:
            over = case["speedup_over"]["sdpa"]
            cells = [f"{over[n]['median']:.2f}" if n in over else "" for n in names]
            threads = f"{case['threads']} thread" + "s" * (case["threads"] > 1)
            rows.append([f"{case['name'].removeprefix(phase + ' torch.')}, {threads}", *cells])
        lines += ["", f"### {phase.capitalize()}", "", *_table([phase, *names], rows)]
    return [*lines, "", LEGEND]


def end_to_end() -> list[str]:
    """The whole model."""
    data = _load("end_to_end.json")
    rows = [
        [
            row["dtype"].removeprefix("torch."),
            row["name"],
            f"{statistics.median(row['seconds']):.2f} s",
            f"{row['speedup_over_sdpa']:.2f}",
            f"{row['sparsity']:.1%}",
            f"{row['perplexity_ratio']:.4f}",
        ]
        for row in data["rows"]
    ]
    head = ["dtype", "attention", "first token", "over sdpa", "sparsity", "perplexity ratio"]
    length = data["rows"][0]["length"]
    title = f"## {data['model']}, {length} tokens of prose, {data['threads']} threads"
    return ["", title, "", _machine(data), "", *_table(head, rows)]


def main() -> None:
    """Writes the page."""
    PAGE.write_text("\n".join([HEAD.rstrip(), *end_to_end(), *attention()]) + "\n")


if __name__ == "__main__":
    main()
