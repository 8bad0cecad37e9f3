"""Writes docs/findings.md from benchmarks/results: `python -m benchmarks.findings_page`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import findings_text as text
from benchmarks.calibration_tables import kl_at
from benchmarks.table_format import HERE, load, table

PAGE = HERE.parent / "docs" / "findings.md"
Data = dict[str, Any]


def at_error(rows: list[Data], error: float) -> float | None:
    """The sparsity at which the error is reached, between two measured ones, in the error's log."""
    points = sorted((row["error"], row["sparsity"]) for row in rows if row["error"] > 1e-5)
    for (below, low), (above, high) in pairwise(points):
        if below <= error <= above:
            part = math.log(error / below) / math.log(above / below)
            return low + part * (high - low)
    return None


def order(data: Data) -> list[str]:
    head = ["order", *(f"skipped at lambda {lam}" for lam in data["final_max_known"])]
    head += [f"error at {target:.0%} skipped" for target in data["targets"]]
    head += ["its dropped mass, p99"]
    rows = []
    for row in data["rows"]:
        cells = [f"{share:.1%}" for share in row["sparsity_at"].values()]
        cells += [
            f"{told['error']:.4f}" if lam < 1 else "no lambda < 1"
            for told, lam in zip(row["loss"], row["lambda"], strict=True)
        ]
        last = row["loss"][-1]["dropped_p99"]
        rows.append([row["order"], *cells, f"{last:.3f}" if row["lambda"][-1] < 1 else ""])
    known = [f"{share:.1%}" for share in data["final_max_known"].values()]
    rows.append(["final max known beforehand", *known, *[""] * (len(data["targets"]) + 1)])
    return table(head, rows)


def blocks(data: Data) -> list[str]:
    lambdas, errors = (1e-3, 1e-2, 1e-1), (3e-3, 1e-2, 3e-2)
    head = ["block", *(f"skipped at lambda {lam}, error" for lam in lambdas)]
    head += [f"skipped at error {error}" for error in errors]
    rows = []
    for name in dict.fromkeys(row["blocks"] for row in data["rows"]):
        own = [row for row in data["rows"] if row["blocks"] == name]
        by_lambda = {row["lambda"]: row for row in own}
        cells = [
            f"{by_lambda[lam]['sparsity']:.1%}, {by_lambda[lam]['error']:.4f}" for lam in lambdas
        ]
        found = [at_error(own, error) for error in errors]
        rows.append([name, *cells, *(f"{x:.1%}" if x is not None else "" for x in found)])
    return table(head, rows)


def granularity(data: Data) -> list[str]:
    """KL at equal sparsity with thresholds for all, by layer and by head."""
    shown = {"global": "one for all", "layer": "by layer", "head": "by head"}
    shares = (0.5, 0.7)
    head = ["block", "phase", "tokens"]
    head += [f"KL at {share:.0%} skipped, {name}" for share in shares for name in shown.values()]
    rows = []
    for blocks_ in ("64x64", "64x1"):
        for phase in ("prefill", "decode"):
            for tokens in sorted({row["length"] for row in data["runs"]}):
                wanted = {"geometry": blocks_, "phase": phase, "length": tokens}
                found = [
                    kl_at(_points(data["runs"], wanted | {"way": way}), share)
                    for share in shares
                    for way in shown
                ]
                cells = [f"{x:.2g}" if x is not None else "" for x in found]
                rows.append([blocks_, phase, str(tokens), *cells])
    return table(head, rows)


def _points(rows: list[Data], wanted: Data) -> list[tuple[float, float, float]]:
    """Sparsity, KL and perplexity ratio of each setting, the means over the kinds of text."""
    own = [row for row in rows if all(row[name] == x for name, x in wanted.items())]
    names = ("sparsity", "kl", "perplexity_ratio")
    points = []
    for setting in sorted({row["setting"] for row in own}):
        found = [row for row in own if row["setting"] == setting]
        sparsity, kl, ratio = (fmean(row[name] for row in found) for name in names)
        points.append((sparsity, kl, ratio))
    return points


def length(data: Data) -> list[str]:
    lengths = list(dict.fromkeys(row["length"] for row in data["rows"]))
    head = ["text", "sparsity", *(f"lambda L at {n}" for n in lengths), "slope", "at the end"]
    head += ["slope, free blocks", "at the end"]
    rows = []
    for kind in dict.fromkeys(row["text"] for row in data["rows"]):
        by_length = {row["length"]: row["lambda"] for row in data["rows"] if row["text"] == kind}
        free = {row["length"]: row["free"] for row in data["rows"] if row["text"] == kind}
        for sparsity in by_length[lengths[0]]:
            lams = [by_length[n][sparsity] for n in lengths]
            cells = [f"{lam * n:.3g}" for lam, n in zip(lams, lengths, strict=True)]
            for each in (lams, [free[n][sparsity] for n in lengths]):
                cells += [f"{slope(lengths, each):.2f}", f"{slope(lengths[-2:], each[-2:]):.2f}"]
            rows.append([kind, f"{float(sparsity):.0%}", *cells])
    return table(head, rows)


def slope(lengths: list[int], lambdas: list[float]) -> float:
    """Of ln lambda over ln L, by least squares: -1 where lambda is a / L."""
    xs, ys = [math.log(n) for n in lengths], [math.log(lam) for lam in lambdas]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    top = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
    return top / sum((a - x) ** 2 for a in xs)


def int8(data: Data) -> list[str]:
    names = {
        "norms": "norms: one number a block, K's mean taken off",
        "corners": "smallest and largest value of each channel",
        "int8": "int8 keys and queries, K's mean taken off",
    }
    head = ["bound", *(f"proved at lambda {lam}" for lam in data["lambdas"])]
    rows = [[names[name], *(f"{share:.1%}" for share in data["proved"][name])] for name in names]
    return table(head, rows)


def int8_bytes(row: Data, size: int) -> float:
    """What decode has to read for each key in bfloat16: the copy, K and V."""
    read = row[f"giving_up_{size}"]
    kept = (1 - read["proved"]) + (1 - row["skipped"])
    return float((size + 12) * read["scanned"] + 2 * size * kept)


def int8_half(rows: list[Data], size: int) -> str:
    """The sparsity from which the copy halves what decode has to read, between measured ones."""
    points = [(row["skipped"], int8_bytes(row, size) / (4 * size)) for row in rows]
    for (low, above), (high, below) in pairwise(points):
        if above >= 0.5 >= below:
            return f"{low + (above - 0.5) / (above - below) * (high - low):.1%}"
    return ""


def int8_decode(data: Data) -> list[str]:
    sizes = (64, 128)
    head = ["skipped", "lambda", "proved"]
    for size in sizes:
        head += [f"bytes a key at D={size}, of {4 * size}: skipping", "with the copy", "at most"]
    rows = []
    for row in data["lengths"][-1]["rows"]:
        cells = [f"{row['skipped']:.1%}", f"{row['lambda']:.3g}", f"{row['proved']:.1%}"]
        for size in sizes:
            skipping, copied = 2 * size * (2 - row["skipped"]), int8_bytes(row, size)
            speed = f"{4 * size / skipping:.2f}x, {4 * size / copied:.2f}x"
            cells += [f"{skipping:.0f}", f"{copied:.0f}", speed]
        rows.append(cells)
    halves = [
        [str(found["length"]), *(int8_half(found["rows"], size) for size in sizes)]
        for found in data["lengths"]
    ]
    head_of_halves = ["keys", *(f"reads halved from, D={size}" for size in sizes)]
    return [*table(head, rows), "", *table(head_of_halves, halves)]


def certificate(data: Data) -> list[str]:
    head = ["block", "lambda", "skipped", "error", "dropped mass p50 / p99 / max"]
    head += ["certificate p50 / p99 / max", "certificate over truth, median"]
    rows = [
        [
            row["blocks"],
            f"{row['lambda']:g}",
            f"{row['sparsity']:.1%}",
            f"{row['error']:.4f}",
            " / ".join(f"{row[f'dropped_{p}']:.2g}" for p in ("p50", "p99", "max")),
            " / ".join(f"{row[f'bound_{p}']:.2g}" for p in ("p50", "p99", "max")),
            f"{row['ratio_p50']:.1f}",
        ]
        for row in data["rows"]
    ]
    return table(head, rows)


def budget(data: Data) -> list[str]:
    head = ["block", "eps", "skipped", "error", "dropped mass mean / p99 / max", "allowed"]
    rows = [
        [
            row["blocks"],
            f"{row['eps']:g}",
            f"{row['sparsity']:.1%}",
            f"{row['error']:.4f}",
            " / ".join(f"{row[f'dropped_{p}']:.2g}" for p in ("mean", "p99", "max")),
            f"{row['eps'] / (1 + row['eps']):.4f}",
        ]
        for row in data["rows"]
    ]
    return table(head, rows)


def needles(data: Data) -> list[str]:
    lambdas = data["lambdas"]
    head = ["depth", *(f"question, lambda {lam:g}" for lam in lambdas)]
    head += [f"decode, lambda {lam:g}" for lam in lambdas]
    rows = []
    for depth in sorted({row["depth"] for row in data["rows"]}):
        own = [row for row in data["rows"] if row["depth"] == depth]
        shares = [
            sum(row[phase][i] for row in own) / len(own)
            for phase in ("question", "decode")
            for i in range(len(lambdas))
        ]
        rows.append([f"{depth:.0%}", *(f"{share:.0%}" for share in shares)])
    return table(head, rows)


@dataclass(frozen=True)
class Section:
    """One question: its data, how they are shown, and what they say."""

    title: str
    file: str
    key: str
    show: Callable[[Data], list[str]]
    says: str

    def lines(self) -> list[str]:
        found = load(self.file)
        data = found.get(self.key) if self.key else found
        if not data:
            return []
        module = Path(self.file).stem
        command = f"python -m benchmarks.{module}" + (f" --only {self.key}" if self.key else "")
        return [
            "",
            f"## {self.title}",
            "",
            self.says,
            "",
            *self.show(data),
            "",
            f"`{command}`. {_machine(data)}",
        ]


def _machine(data: Data) -> str:
    """What the numbers were measured on, as far as is known."""
    about = data["machine"]
    names = [
        name for name in about.get("cpu", ()) if not name.isdecimal()
    ]  # not the family's number
    parts = [*names, f"kernel level {about['level']}", f"torch {about['torch']}"]
    return "; ".join([*parts, *([about["time"][:10]] if "time" in about else [])]) + "."


SECTIONS = (
    Section(
        "A threshold for each layer, or each head",
        "calibration.json",
        "",
        granularity,
        text.GRANULARITY,
    ),
    Section("In which order to visit the blocks", "findings.json", "order", order, text.ORDER),
    Section("Blocks of 32, 64 or 128", "findings.json", "blocks", blocks, text.BLOCKS),
    Section("Is lambda a / L?", "findings.json", "length", length, text.LENGTH),
    Section("What a bound proves without the keys", "findings.json", "int8", int8, text.INT8),
    Section(
        "What an int8 copy proves in decode",
        "int8_decode.json",
        "",
        int8_decode,
        text.INT8_DECODE,
    ),
    Section(
        "How tight the certificate is",
        "findings.json",
        "certificate",
        certificate,
        text.CERTIFICATE,
    ),
    Section("What the budget rule keeps", "findings.json", "budget", budget, text.BUDGET),
    Section("The needle's own block", "needle_blocks.json", "", needles, text.NEEDLES),
)


def main() -> None:
    """Writes the page."""
    lines = [text.HEAD, *(line for section in SECTIONS for line in section.lines())]
    PAGE.write_text("\n".join(lines) + "\n")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
