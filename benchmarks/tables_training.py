"""The parts of docs/results.md on training and on calibrating."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.table_format import load, machine_line, table


def training() -> list[str]:
    """Forward and backward over SDPA's, by sparsity."""
    data = load("training_attention.json")
    names = [n for n in data["cases"][0]["seconds"] if n != "sdpa"]
    rows = [
        [
            case["name"].removeprefix("forward + backward torch."),
            *(f"{case['speedup_over']['sdpa'][name]['median']:.2f}" for name in names),
        ]
        for case in data["cases"]
    ]
    return [
        "",
        "## Forward and backward, one thread",
        "",
        machine_line(data),
        "",
        *table(["call", *names], rows),
    ]


def calibration_cost() -> list[str]:
    """A pass that calibrates against one that does not, and its memory."""
    data = load("calibration_cost.json")
    rows = [
        [
            row["dtype"].removeprefix("torch."),
            str(row["length"]),
            *(f"{statistics.median(each):.2f} s" for each in row["seconds"].values()),
            *(f"{over:.2f}" for over in row["cost_over"].values()),
        ]
        for row in data["rows"]
    ]
    timed = data["rows"][0]
    bases = [f"cost over {base}" for base in timed["cost_over"]]
    by_name: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in data["memory"]:
        by_name.setdefault((row["dtype"], row["length"]), {})[row["name"]] = row
    memory = [
        [
            dtype,
            str(length),
            *(f"{each[name]['kib'] / 1024:.1f}" for name in ("sdpa", "calibrating")),
            f"{each['calibrating']['kept_kib'] / 1024:.1f}",
        ]
        for (dtype, length), each in by_name.items()
    ]
    return [
        "",
        f"## Calibrating {data['model']}, {data['threads']} threads",
        "",
        f"One pass that observes {', '.join(data['geometries'])} and BSFA's thresholds, against "
        "dense ones. Here a ratio is a cost: smaller is better. " + machine_line(data),
        "",
        *table(["dtype", "tokens", *timed["seconds"], *bases], rows),
        "",
        "### MiB that one layer's attention adds to the peak, output included, and what is kept",
        "",
        *table(["dtype", "tokens", "sdpa", "calibrating", "kept"], memory),
    ]
