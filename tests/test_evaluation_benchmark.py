"""The command behind the committed results, on the small retrieval model; and their page."""

import json
import re
import sys

import pytest

from benchmarks import evaluation, evaluation_tables
from benchmarks.evaluation_models import NAMES, RetrievalTask, number_tokenizer, retrieval_tasks
from benchmarks.evaluation_tables import FIGURES


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluation", *map(str, arguments)])
    evaluation.main()


@pytest.mark.parametrize("name", retrieval_tasks().TASKS)
def test_retrieval_questions_have_their_answer_in_the_context(name):
    tasks, tokenizer = retrieval_tasks(), number_tokenizer(704)
    task = RetrievalTask(name)
    made = task.samples(tokenizer, 256, 5, seed=0)
    assert made == task.samples(tokenizer, 256, 5, seed=0)
    assert made != task.samples(tokenizer, 256, 5, seed=1)
    for sample in made:
        ids = tokenizer(sample.prompt)["input_ids"]
        assert len(ids) == 256 - 1
        assert ids[0] == tasks.BOS
        assert ids[-2] == tasks.ASK
        (answer,) = tokenizer(sample.answers[0])["input_ids"]
        assert answer in ids[:-2]
        assert task.score(tokenizer.decode([answer]), sample.answers) == 1.0
        assert task.score(tokenizer.decode([answer + 1]), sample.answers) == 0.0
    depths = [sample.depth for sample in made]
    if name != "frequent":
        assert depths == sorted(depths)
        assert 0 <= depths[0] < 0.3
        assert 0.7 < depths[-1] <= 1


def test_the_retrieval_model_and_its_page(monkeypatch, tmp_path):
    """Dense it answers, as recorded; keeping next to nothing it does not, and the page says so."""
    out = tmp_path / "evaluation_retrieval.json"
    options = ("--samples", "512=8", "--settings", "blasst:0.3,window:0.9")
    options = (*options, "--work", tmp_path / "work", "--out", out)
    run(monkeypatch, "retrieval", *options)
    result = json.loads(out.read_text())
    scores = {
        name: [x for c in result["cells"] if c["setting"] == name for x in c["scores"]]
        for name in ("dense", "blasst:0.3", "window:0.9")
    }
    mean = {name: sum(x) / len(x) for name, x in scores.items()}
    assert mean["dense"] > 0.8
    assert mean["blasst:0.3"] > 0.7
    assert mean["window:0.9"] < 0.5
    run(monkeypatch, "retrieval", *options)  # resumes: all is there
    assert json.loads(out.read_text())["cells"] == result["cells"]

    text = evaluation_tables.page({"retrieval": result}, tmp_path)
    assert "## the small retrieval model" in text
    assert re.search(r"- `window:0.9`: loses most on \w+ at 512, ", text)
    for name in ("sparsity", "speed", "depth"):
        assert f"images/evaluation_retrieval_{name}.svg" in text
        assert (tmp_path / f"evaluation_retrieval_{name}.svg").stat().st_size > 5000


def test_the_page_is_that_of_the_results(monkeypatch, tmp_path):
    """Whoever measures again also runs `python -m benchmarks.evaluation_tables`."""
    drawn = {name: (lambda _: b"svg", title) for name, (_, title) in FIGURES.items()}
    monkeypatch.setattr(evaluation_tables, "FIGURES", drawn)
    expected = evaluation_tables.page(evaluation_tables.committed(), tmp_path)
    found = evaluation_tables.PAGE.read_text()
    assert without_images(found) == without_images(expected)
    for image in re.findall(r"\]\((images/.+\.svg)\)", found):
        assert (evaluation_tables.DOCS / image).is_file()


def without_images(page):
    return [line for line in page.splitlines() if line and not line.startswith("![")]


@pytest.mark.parametrize("name", evaluation_tables.committed())
def test_committed_results_are_those_of_the_plans(name):
    """The documented command measures what is committed; how many samples, the page says."""
    result, plan = evaluation_tables.committed()[name], evaluation.PLANS[name]
    about = result["configuration"]
    assert about["tasks"] == list(plan.tasks or retrieval_tasks().TASKS)
    assert about["settings"] == list(plan.settings)
    assert about["lengths"] == sorted(plan.samples)
    assert about["max_new_tokens"] == plan.max_new_tokens
    assert about["geometry"] == (plan.geometry or "64x1")
    assert result["model"]["name"] == NAMES[plan.model]


def test_an_unknown_plan_is_refused_by_name(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "smollm3")
    assert "expected plans among smollm2, smollm2_others" in capsys.readouterr().err


def made(tasks, length, settings, scores, depths):
    cells = [
        {
            "task": task,
            "length": length,
            "setting": name,
            "scores": scores[name],
            "first_token_s": [1.0] * len(depths),
            "tokens_per_s": [9.0] * len(depths),
            "depths": depths,
        }
        for task in tasks
        for name in settings
    ]
    about = {"tasks": tasks, "lengths": [length], "settings": settings, "samples": len(depths)}
    about |= {"geometry": "64x64", "thresholds": "calibrated", "seed": 0, "max_new_tokens": 9}
    machine = {"device": "d", "threads": 1, "torch": "2", "transformers": "5"}
    return {
        "model": {"name": "Model", "dtype": "float32"},
        "machine": {**machine, "hf_sparse_attention": "0"},
        "configuration": about,
        "calibration": {},
        "seconds": 60.0,
        "cells": cells,
        "texts": [],
    }


def test_the_stress_test_has_a_heat_map_and_a_table_by_depth(tmp_path):
    settings, depths = ["dense", "bsfa:k=8"], [0.0, 0.5, 1.0, 0.0, 0.5, 1.0]
    scores = {"dense": [1.0] * 6, "bsfa:k=8": [1.0, 0.0, 1.0, 1.0, 1.0, 1.0]}
    result = made(["needle_depths"], 2048, settings, scores, depths)
    text = evaluation_tables.page({"depths": result}, tmp_path)
    assert "## The stress test: Model, 2048 tokens, blocks of 64x64" in text
    assert "![Needles by depth: Model](images/evaluation_depths_depth.svg)" in text
    assert "| setting | 0% | 50% | 100% |" in text
    assert "| bsfa:k=8 | 2/2 | 1/2 | 2/2 |" in text
    svg = (tmp_path / "evaluation_depths_depth.svg").read_text()
    for shown in ("2048 tokens", "bsfa:k=8", "50%", ">50<", ">100<"):
        assert shown in svg
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation_depths_depth.svg"]
    assert "| `python -m benchmarks.evaluation depths` | 6 samples at 2048 tokens | 1 | 1 |" in text


def test_results_of_one_model_at_several_lengths_are_put_together(tmp_path):
    """Only tasks that all have; a setting that one length has not been run under is shown, too."""
    at, of = [None, None], {"dense": [1.0, 1.0], "never": [1.0, 0.0], "bsfa:k=8": [0.0, 0.0]}
    short = made(["a", "b"], 1024, ["dense", "never", "bsfa:k=8"], of, at)
    long = made(["b", "c"], 2048, ["dense", "bsfa:k=8"], of, at)
    merged = evaluation_tables.common([short, long])
    about = merged["configuration"]
    assert about["tasks"] == ["b"]
    assert about["settings"] == ["dense", "bsfa:k=8"]
    assert about["lengths"] == [1024, 2048]
    assert about["samples"] == {"1024": 2, "2048": 2}
    others = made(["d"], 2048, ["dense", "bsfa:k=8"], of, at)  # belongs to no other length
    results = {"short": short, "others": others, "long": long}
    text = evaluation_tables.page(results, tmp_path)
    (part,) = re.findall(r"## Model, by length\n(.+?)\n## ", text, re.DOTALL)
    assert "Tasks: b; 2 samples at 1024 tokens, 2 at 2048." in part
    assert "| 1024 | never | 50.0 ± 50.0 | -50.0 ± 50.0 |" in part
    assert "| 2048 | bsfa:k=8 | 0.0 (all alike) | -100.0 (all alike) |" in part
    assert "evaluation_model_by_length_length.svg" in part
