"""Writes docs/calibration-results.md from the JSON: `python -m benchmarks.calibration_tables`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.table_format import table

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "calibration-results.md"
AT = (0.3, 0.5, 0.7)
NAMES = {
    "global": "BLASST, one lambda",
    "layer": "BLASST, by layer",
    "head": "BLASST, by head",
    "ascending": "BLASST, ascending order",
    "bsfa": "BSFA",
    "budget": "budget rule",
}
HEAD = """# Calibration on a real model

Made by `python -m benchmarks.calibration_tables` from `benchmarks/results/calibration.json`, which
`python -m benchmarks.calibration` measures; don't edit by hand. {model}; calibrated on {samples}
samples of {lengths} tokens, and measured on text of other authors (prose, code) or other needles.

A divergence of about 0.002 is bfloat16's own: so far apart are two kernels that skip nothing and
only add in another order.
"""


def held_out(data: dict[str, Any]) -> list[str]:
    """Sparsity asked for and got, in dense passes over text that was not calibrated."""
    rows = []
    for granularity in ("global", "layer", "head"):
        for geometry in data["fits"]:
            for phase in ("prefill", "decode"):
                cells, worst = [], 0.0
                for target in AT:
                    wanted = {
                        "granularity": granularity,
                        "geometry": geometry,
                        "phase": phase,
                        "target": target,
                    }
                    found = [row["measured"] for row in _where(data["held_out"], wanted)]
                    cells.append(f"{fmean(found):.2f} ({min(found):.2f} to {max(found):.2f})")
                    worst = max(worst, *(abs(x - target) for x in found))
                rows.append([NAMES[granularity], geometry, phase, *cells, f"{worst:.2f}"])
    lengths = sorted({row["length"] for row in data["held_out"] if row["phase"] == "prefill"})
    return [
        "## Target and sparsity on text that was not calibrated",
        "",
        f"Prose, code and needles at {', '.join(map(str, lengths))} tokens, at the activations of",
        "dense passes: the mean, and from the least to the most of all of them.",
        "",
        *table(["thresholds", "blocks", "phase", *map(str, AT), "worst difference"], rows),
    ]


def runs(data: dict[str, Any], phase: str, length: int) -> list[str]:
    """What each way costs at one length, averaged over the kinds of text."""
    here = _where(data["runs"], {"phase": phase, "length": length})
    cases = list(dict.fromkeys((row["geometry"], row["way"]) for row in here))
    lines, equal = [], []
    for geometry, way in sorted(cases, key=lambda case: (case[0], list(NAMES).index(case[1]))):
        mine = _where(here, {"geometry": geometry, "way": way})
        points = []
        for setting in sorted({row["setting"] for row in mine}):
            found = _where(mine, {"setting": setting})
            s, kl, ratio = (
                fmean(row[name] for row in found) for name in ("sparsity", "kl", "perplexity_ratio")
            )
            points.append((s, kl, ratio))
            label = f"k = {setting:g}" if way == "bsfa" else f"target {setting:g}"
            lines.append([NAMES[way], geometry, label, f"{s:.3f}", f"{kl:.2g}", f"{ratio:.4f}"])
        at = [kl_at(points, s) for s in AT]
        equal.append([NAMES[way], geometry, *(f"{x:.2g}" if x else "-" for x in at)])
    kinds = len({row["kind"] for row in here})
    return [
        f"## {phase.capitalize()}, {length} tokens",
        "",
        f"Means over {kinds} kinds of text. KL is the divergence of the next-token distributions",
        "from the dense model's, in nats; the ratio is that of perplexities.",
        "",
        *table(["way", "blocks", "setting", "sparsity", "KL", "perplexity ratio"], lines),
        "",
        "KL at equal sparsity, between the measured points:",
        "",
        *table(["way", "blocks", *(f"at {s:g}" for s in AT)], equal),
    ]


def _where(rows: Sequence[dict[str, Any]], wanted: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[name] == x for name, x in wanted.items())]


def kl_at(points: list[tuple[float, float, float]], sparsity: float) -> float | None:
    """KL at `sparsity`, its logarithm taken as linear; up to 0.05 beyond the points."""
    points = sorted(point for point in points if point[1] > 0)  # not where nothing was skipped
    for (low, kl, _), (high, larger, _) in pairwise(points):
        first, last = low == points[0][0], high == points[-1][0]
        if low - 0.05 * first <= sparsity <= high + 0.05 * last and high > low:
            part = (sparsity - low) / (high - low)
            return math.exp((1 - part) * math.log(kl) + part * math.log(larger))
    return None


def main() -> None:
    """Writes the page."""
    data = json.loads((HERE / "results" / "calibration.json").read_text())
    about = data["calibration"]
    head = HEAD.format(
        model=data["model"],
        samples=about["samples"],
        lengths=", ".join(map(str, about["lengths"])),
    )
    parts = [head, *held_out(data)]
    for length in sorted({row["length"] for row in data["runs"]}):
        for phase in ("prefill", "decode"):
            if _where(data["runs"], {"phase": phase, "length": length}):
                parts += ["", *runs(data, phase, length)]
    PAGE.write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
