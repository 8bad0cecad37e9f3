"""The command behind the committed results, on the small retrieval model; and their page."""

import json
import re
import sys

import pytest

from benchmarks import evaluation, evaluation_tables
from benchmarks.evaluation_models import RetrievalTask, number_tokenizer, retrieval_tasks
from hf_sparse_attention.evaluation import markdown


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
    assert re.search(r"- `window:0.9`: \w+ at 512 loses most, ", text)
    for name in ("sparsity", "speed", "depth"):
        assert f"images/evaluation_retrieval_{name}.svg" in text
        assert (tmp_path / f"evaluation_retrieval_{name}.svg").stat().st_size > 5000


def test_the_page_is_that_of_the_results():
    """Whoever measures again also runs `python -m benchmarks.evaluation_tables`."""
    files = sorted((evaluation_tables.HERE / "results").glob("evaluation_*.json"))
    if not files:
        pytest.skip("no results are committed yet")
    text = evaluation_tables.PAGE.read_text()
    for file in files:
        result = json.loads(file.read_text())
        for length in result["configuration"]["lengths"]:
            cells = markdown.setting_cells(result, [length])
            assert markdown.table(markdown.SETTING_COLUMNS, cells) in text
