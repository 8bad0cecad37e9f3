"""The proof's script runs, and its page is what the recorded numbers make."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import robustness_page as page

FOLDER = Path(__file__).parents[1] / "examples" / "robustness"
sys.path.insert(0, str(FOLDER))


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps on short sequences; skipping grows with lambda, and both models were trained."""
    import common
    import retrieval

    file = tmp_path / "found.json"
    small = ["--seeds", "1", "--steps", "2", "--batch", "2", "--length", "192", "--samples", "1"]
    monkeypatch.setattr(sys, "argv", ["retrieval", "--out", str(file), *small])
    monkeypatch.setattr(common, "LAMBDAS", (0.0, 0.5, 0.999))
    retrieval.main()
    runs = json.loads(file.read_text())["runs"]
    assert [run["model"] for run in runs] == list(page.MODELS)
    for run in runs:
        sparsities = [point["sparsity"] for point in run["points"]]
        assert sparsities[0] == 0.0 < sparsities[1] < sparsities[2]
    dense = [run["points"][0]["cross_entropy"] for run in runs]
    assert dense[0] != dense[1] != dense[2] != dense[0]


def test_the_page_is_what_the_numbers_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = (page.DOCS / "robustness.md").read_text()
    monkeypatch.setattr(page, "DOCS", tmp_path)
    page.main()
    assert (tmp_path / "robustness.md").read_text() == committed
    for shown in page.EXPERIMENTS:
        assert (tmp_path / "images" / f"robustness_{shown.name}.svg").stat().st_size > 10_000


def run(name: str, seed: int, accuracy: list[float]) -> dict:
    sparsities = [0.0, 0.5, 1.0]
    points = [
        {"sparsity": s, "accuracy": {"t": a}, "cross_entropy": {"t": 1 - a}}
        for s, a in zip(sparsities, accuracy, strict=True)
    ]
    return {"model": name, "seed": seed, "points": points}


def test_costs_are_over_the_dense_control() -> None:
    runs = [
        run("dense-trained", 0, [0.5, 0.5, 0.5]),
        run("dense fine-tuned", 0, [1.0, 0.8, 0.6]),
        run("sparsity-aware", 0, [0.7, 0.9, 0.8]),
    ]
    shown = page.EXPERIMENTS[0]
    control = shown.curves(runs, "accuracy")["dense fine-tuned"]
    assert control.tolist() == [pytest.approx([1 - 0.4 * s for s in shown.sparsities])]
    at = shown.sparsities.index(0.5)
    lines = page.cost_table(shown, runs)
    cells = [line.split(" | ")[1 + at] for line in lines[2:5]]
    assert cells == ["+0.200", "+0.100", "2.0"]


def test_what_a_model_does_not_reach_is_not_made_up() -> None:
    shown = page.EXPERIMENTS[0]
    runs = [run(name, 0, [0.7, 0.9, 0.8]) for name in page.MODELS]
    runs[2]["points"] = runs[2]["points"][:2]
    (found,) = shown.curves(runs, "accuracy")["sparsity-aware"]
    reached = np.array(shown.sparsities) <= 0.5
    assert not np.isnan(found[reached]).any()
    assert np.isnan(found[~reached]).all()
    assert page.with_error(found[-1:]) == "not reached"


@pytest.mark.parametrize(
    ("control", "ours", "said"),
    [(0.2, 0.1, "2.0"), (0.2, -0.1, "all of it"), (-0.1, 0.1, "no cost"), (np.nan, 0.1, "")],
)
def test_ratios(control: float, ours: float, said: str) -> None:
    assert page.ratio(control, ours) == said
