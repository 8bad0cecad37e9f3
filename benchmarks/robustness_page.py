"""Writes docs/robustness.md and its plots from the JSON of `examples/robustness`.

python -m benchmarks.robustness_page
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from benchmarks.table_format import HERE, table

mpl.use("Agg")
from matplotlib import pyplot as plt

DOCS = HERE.parent / "docs"
MODELS = ("dense-trained", "dense fine-tuned", "sparsity-aware")
CONTROL, OURS = MODELS[1:]
NATS = "cross entropy (nats)"

Runs = list[dict[str, Any]]
Curves = dict[str, np.ndarray]  # by model: [seeds, sparsities]

HEAD = """# Training under sparsity: what it buys

Made by `python -m benchmarks.robustness_page` from `benchmarks/results/robustness_*.json`; don't
edit by hand. `python examples/robustness/NAME.py --out FILE` makes those files again.

A model is fine-tuned twice for each seed, on the same sequences in the same order: dense, which is
the fair control, and with `SparseAttentionCallback`, whose lambda rises over the run. Both, and the
model as it was, then run held-out data under BLASST in blocks of 64 queries x 1 key, at rising
lambda. Curves are read at equal measured sparsity, linear between the measured points; errors are
standard errors over the seeds.

What a model loses against the control run dense is its cost. `ratio` is the control's cost over the
sparsity-aware model's; BLASST's authors' claim, and our goal, is 1.7. "all of it" says that the
sparsity-aware model is no worse than the control run dense.
"""

RETRIEVAL = """
## A small retrieval model, all weights

The model of `examples/retrieval` (four layers, 0.9 million parameters, trained dense at up to 1024
tokens): {steps} steps of {batch} sequences of {length} tokens, lambda up to {full}, {seeds} seeds;
{questions} held-out questions. {minutes:.0f} CPU minutes on {machine}.
"""

SMOLLM2 = """
## SmolLM2-135M-Instruct, with LoRA

Rank 16 on the projections of attention, on the bundled texts: {steps} steps of {batch} sequence of
{length} tokens, lambda up to {full}, {seeds} seeds; {samples} held-out texts.
{minutes:.0f} CPU minutes on {machine}.

**The goal of 1.7 is missed here.** There is little to win: in blocks of single keys the control
loses 0.05 nats at 90% sparsity. What the training under sparsity costs it wins back from 94% on. A
milder end, `--full 0.4` (one seed, not in the tables), costs less and wins earlier: +0.03, +0.05
and +0.10 nats at 89, 92 and 94%, where the control's +0.03, +0.08 and +0.13 stand. Not tried: more
steps, other learning rates, blocks of several keys, where sparsity hurts earlier.
"""


@dataclass(frozen=True)
class Experiment:
    """One of the scripts, and what is shown of it.

    Args:
        name: of the script, and of its JSON.
        text: its description.
        sparsities: where the curves are read.
        measures: what was measured, and its label.
    """

    name: str
    text: str
    sparsities: tuple[float, ...]
    measures: dict[str, str]

    @property
    def results(self) -> Path:
        """Where the JSON lies."""
        return HERE / "results" / f"robustness_{self.name}.json"

    def curves(self, runs: Runs, measure: str) -> Curves:
        """Mean of `measure` over the tasks at `sparsities`; NaN beyond what the model reaches."""

        def curve(points: list[dict[str, Any]]) -> np.ndarray:
            x = [point["sparsity"] for point in points]
            y = [float(np.mean(list(point[measure].values()))) for point in points]
            return np.interp(self.sparsities, x, y, right=np.nan)

        return {
            name: np.stack([curve(r["points"]) for r in runs if r["model"] == name])
            for name in MODELS
        }

    def header(self) -> list[str]:
        """The columns of its tables."""
        return [f"{s:.0%}" for s in self.sparsities]


EXPERIMENTS = (
    Experiment(
        "retrieval",
        RETRIEVAL,
        (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.88),
        {"accuracy": "accuracy", "cross_entropy": NATS},
    ),
    Experiment(
        "smollm2", SMOLLM2, (0.85, 0.88, 0.9, 0.92, 0.94, 0.96, 0.97), {"cross_entropy": NATS}
    ),
)


def dense(runs: Runs, name: str, measure: str) -> np.ndarray:
    """`measure` of each seed's model at lambda 0."""
    return np.array(
        [np.mean(list(r["points"][0][measure].values())) for r in runs if r["model"] == name]
    )


def with_error(values: np.ndarray, digits: int = 3) -> str:
    """Mean and standard error over the seeds."""
    if np.isnan(values).any():
        return "not reached"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    error = values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.{digits}f} ± {error:.{digits}f}"


def measure_table(shown: Experiment, runs: Runs, measure: str) -> list[str]:
    found = shown.curves(runs, measure)
    rows = [
        [
            name,
            with_error(dense(runs, name, measure)),
            *(with_error(column) for column in found[name].T),
        ]
        for name in MODELS
    ]
    return table(["", "dense", *shown.header()], rows)


def cost_table(shown: Experiment, runs: Runs) -> list[str]:
    rows = []
    for measure in shown.measures:
        sign = -1 if measure == "accuracy" else 1
        base = dense(runs, CONTROL, measure).mean()
        found = shown.curves(runs, measure)
        costs = {name: sign * (found[name].mean(0) - base) for name in (CONTROL, OURS)}
        for name in (CONTROL, OURS):
            cells = ["" if np.isnan(x) else f"{x:+.3f}" for x in costs[name]]
            rows.append([f"{measure.replace('_', ' ')}, {name}", *cells])
        rows.append(["ratio", *map(ratio, costs[CONTROL], costs[OURS])])
    return table(["", *shown.header()], rows)


def ratio(control: float, ours: float) -> str:
    if np.isnan(control) or np.isnan(ours):
        return ""
    if control <= 0:
        return "no cost"
    return "all of it" if ours <= 0 else f"{control / ours:.1f}"


def limits(shown: Experiment, runs: Runs) -> str:
    """Where the sparsity-aware model loses."""
    measure = next(iter(shown.measures))
    sign = 1 if measure == "accuracy" else -1
    ours, control = (dense(runs, name, measure) for name in (OURS, CONTROL))
    found = shown.curves(runs, measure)
    pairs = zip(shown.header(), found[OURS].mean(0), found[CONTROL].mean(0), strict=True)
    worse = [s for s, mine, other in pairs if sign * mine < sign * other]
    return (
        f"Run dense, the sparsity-aware model's {measure.replace('_', ' ')} is {with_error(ours)}, "
        f"the control's {with_error(control)}: it has learned to live with the keys that are kept. "
        "Run such a model at the sparsity it was trained for. "
        + (f"It is behind the control at {', '.join(worse)} sparsity. " if worse else "")
        + "Beyond what the tables show lambda would have to exceed 1, which BLASST does not allow."
    )


def plot(shown: Experiment, runs: Runs, file: Path) -> None:
    count = len(shown.measures)
    figure, grid = plt.subplots(
        1, count, figsize=(1 + 4.5 * count, 4), layout="constrained", squeeze=False
    )
    for axis, (measure, label) in zip(grid[0], shown.measures.items(), strict=True):
        for name, color in zip(MODELS, ("tab:gray", "tab:blue", "tab:orange"), strict=True):
            for i, run in enumerate(r for r in runs if r["model"] == name):
                x = [p["sparsity"] for p in run["points"]]
                y = [np.mean(list(p[measure].values())) for p in run["points"]]
                axis.plot(x, y, "o-", ms=3, lw=1, color=color, label=None if i else name)
        axis.set(xlabel="measured sparsity (share of keys x 64-query blocks skipped)", ylabel=label)
        axis.grid(alpha=0.3)
    grid[0, 0].legend()
    file.parent.mkdir(exist_ok=True)
    mpl.rcParams["svg.hashsalt"] = file.stem  # the same file from the same numbers
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def section(shown: Experiment) -> list[str]:
    """An experiment's part of the page; draws its plot, too."""
    data = json.loads(shown.results.read_text())
    runs, options, machine = data["runs"], data["options"], data["machine"]
    image = f"images/{shown.results.stem}.svg"
    plot(shown, runs, DOCS / image)
    about = {name: options[name] for name in ("steps", "batch", "length", "full", "samples")}
    lines = [
        shown.text.format(
            **about,
            seeds=sum(run["model"] == OURS for run in runs),
            questions=16 * options["samples"] * len(runs[0]["points"][0].get("accuracy", ())),
            minutes=data["cpu_minutes"],
            machine=f"one core of an {machine['cpu'][-1]} machine; torch {machine['torch']}",
        ),
        f"![against sparsity]({image})",
    ]
    for measure, label in shown.measures.items():
        lines += ["", f"{label.capitalize()}:", "", *measure_table(shown, runs, measure)]
    lines += ["", "What sparsity costs:", "", *cost_table(shown, runs)]
    return [*lines, "", limits(shown, runs)]


def main() -> None:
    parts = [HEAD.rstrip()]
    for shown in EXPERIMENTS:
        if shown.results.exists():
            parts += section(shown)
    (DOCS / "robustness.md").write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
