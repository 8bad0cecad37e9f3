"""Writes docs/robustness.md and its plot from `examples/robustness/retrieval.py`'s JSON.

python -m benchmarks.robustness_page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from benchmarks.table_format import HERE, table

mpl.use("Agg")
from matplotlib import pyplot as plt

DOCS = HERE.parent / "docs"
RESULTS = HERE / "results" / "robustness_retrieval.json"
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.88)
MODELS = ("dense-trained", "dense fine-tuned", "sparsity-aware")
CONTROL, OURS = MODELS[1:]
MEASURES = {"accuracy": "accuracy", "cross_entropy": "cross entropy of the answers (nats)"}

Runs = list[dict[str, Any]]
Curves = dict[str, np.ndarray]  # by model: [seeds, sparsities]

TEXT = """# Training under sparsity: what it buys

Made by `python -m benchmarks.robustness_page` from `benchmarks/results/robustness_retrieval.json`;
don't edit by hand. `python examples/robustness/retrieval.py --out FILE` makes that file again.

The small retrieval model of `examples/retrieval` (four layers, 0.9 million parameters, trained
dense at up to 1024 tokens) is fine-tuned for {steps} steps of {batch} sequences of {length} tokens,
twice for each of {seeds} seeds, on the same sequences in the same order: dense, which is the fair
control, and with `SparseAttentionCallback`, whose lambda rises to {full} over the run. All models
then answer the same {questions} held-out questions under BLASST in blocks of 64 queries x 1 key, at
rising lambda. Curves are read at equal measured sparsity, linear between the measured points;
errors are standard errors over the seeds. {minutes:.0f} CPU minutes on {machine}.

![accuracy and cross entropy against sparsity](images/robustness_retrieval.svg)

## Accuracy (mean of four tasks)

{accuracy}

## Cross entropy of the answers, nats

{cross_entropy}

## What sparsity costs

The cost is what a model loses against the control run dense. `ratio`: the control's cost over the
sparsity-aware model's; BLASST's authors' claim, and our goal, is 1.7. "all of it" says that the
sparsity-aware model is no worse than the control run dense.

{costs}

## What it does not buy

{limits}
"""


def curve(points: list[dict[str, Any]], measure: str) -> np.ndarray:
    """Mean of `measure` over the tasks at `SPARSITIES`; NaN beyond what the model reaches."""
    x = [point["sparsity"] for point in points]
    y = [float(np.mean(list(point[measure].values()))) for point in points]
    return np.interp(SPARSITIES, x, y, right=np.nan)


def curves(runs: Runs, measure: str) -> Curves:
    return {
        name: np.stack([curve(r["points"], measure) for r in runs if r["model"] == name])
        for name in MODELS
    }


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


def measure_table(runs: Runs, measure: str) -> list[str]:
    found = curves(runs, measure)
    rows = [
        [
            name,
            with_error(dense(runs, name, measure)),
            *(with_error(column) for column in found[name].T),
        ]
        for name in MODELS
    ]
    return table(["", "dense", *(f"{s:.0%}" for s in SPARSITIES)], rows)


def cost_table(runs: Runs) -> list[str]:
    rows = []
    for measure, sign in (("accuracy", -1), ("cross_entropy", 1)):
        base = dense(runs, CONTROL, measure).mean()
        found = curves(runs, measure)
        costs = {name: sign * (found[name].mean(0) - base) for name in (CONTROL, OURS)}
        for name in (CONTROL, OURS):
            shown = ["" if np.isnan(x) else f"{x:+.3f}" for x in costs[name]]
            rows.append([f"{measure.replace('_', ' ')}, {name}", *shown])
        rows.append(["ratio", *map(ratio, costs[CONTROL], costs[OURS])])
    return table(["", *(f"{s:.0%}" for s in SPARSITIES)], rows)


def ratio(control: float, ours: float) -> str:
    if np.isnan(control) or np.isnan(ours):
        return ""
    if control <= 0:
        return "no cost"
    return "all of it" if ours <= 0 else f"{control / ours:.1f}"


def limits(runs: Runs) -> str:
    """Where the sparsity-aware model loses."""
    ours, control = (dense(runs, name, "accuracy") for name in (OURS, CONTROL))
    first = curves(runs, "accuracy")
    pairs = zip(SPARSITIES, first[OURS].mean(0), first[CONTROL].mean(0), strict=True)
    worse = [f"{s:.0%}" for s, mine, other in pairs if mine < other]
    return (
        f"Run dense, the sparsity-aware model's accuracy is {with_error(ours)}, the control's "
        f"{with_error(control)}: it has learned to live with the keys that are kept, and "
        "the others disturb it. Run such a model at the sparsity it was trained for. "
        + (f"It is behind the control at {', '.join(worse)} sparsity. " if worse else "")
        + "Beyond what the table shows lambda would have to exceed 1, which BLASST does not allow. "
        "One small model on synthetic tasks, whose contexts are twice as long as those it was "
        "first trained on, is evidence, not proof, for a large one."
    )


def plot(runs: Runs, file: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        for name, color in zip(MODELS, ("tab:gray", "tab:blue", "tab:orange"), strict=True):
            for i, run in enumerate(r for r in runs if r["model"] == name):
                x = [p["sparsity"] for p in run["points"]]
                y = [np.mean(list(p[measure].values())) for p in run["points"]]
                axis.plot(x, y, "o-", ms=3, lw=1, color=color, label=None if i else name)
        axis.set(xlabel="measured sparsity (share of keys x 64-query blocks skipped)", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    file.parent.mkdir(exist_ok=True)
    mpl.rcParams["svg.hashsalt"] = file.stem  # the same file from the same numbers
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    data = json.loads(RESULTS.read_text())
    runs, options, machine = data["runs"], data["options"], data["machine"]
    plot(runs, DOCS / "images" / f"{RESULTS.stem}.svg")
    text = TEXT.format(
        **{name: options[name] for name in ("steps", "batch", "length", "seeds", "full")},
        questions=16 * options["samples"] * len(runs[0]["points"][0]["accuracy"]),
        accuracy="\n".join(measure_table(runs, "accuracy")),
        cross_entropy="\n".join(measure_table(runs, "cross_entropy")),
        minutes=data["cpu_minutes"],
        machine=f"one core of an {machine['cpu'][-1]} machine; torch {machine['torch']}",
        costs="\n".join(cost_table(runs)),
        limits=limits(runs),
    )
    (DOCS / "robustness.md").write_text(text)


if __name__ == "__main__":
    main()
