"""lm-evaluation-harness runs on our attention, by its own command line and from Python."""

import json
import os
import subprocess
import sys

import pytest
import torch
from test_docs import save_tiny_model

from hf_sparse_attention import SparseAttentionConfig

LAUNCH = [sys.executable, "-m", "hf_sparse_attention.evaluation.lm_eval"]
#: Copies of a word, which even a random model may be asked for; and what comes next in a text.
TASKS = {
    "tiny_recall.yaml": """
task: tiny_recall
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "tiny_text.yaml": """
task: tiny_text
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra lm-eval)")
    folder = tmp_path_factory.mktemp("lm_eval")
    torch.manual_seed(0)
    save_tiny_model(folder / "model")
    SparseAttentionConfig(threshold_scale_factor=200.0, geometry="64x1").save_pretrained(
        folder / "model"
    )
    rows = [{"text": "The rain in Spain. " * n, "answer": "The"} for n in (20, 30)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    for name, text in TASKS.items():
        (folder / "tasks" / name).write_text(text.replace("DATA", str(data)).lstrip())
    return folder


def arguments(folder, attention):
    return {"pretrained": str(folder / "model"), "attn_implementation": attention}


def perplexity(results):
    assert set(results) == {"tiny_recall", "tiny_text"}
    return results["tiny_text"]["word_perplexity,none"]


def from_python(folder, attention):
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(folder / "tasks"))
    options = {"model_args": arguments(folder, attention), "task_manager": tasks}
    options |= {"device": "cpu", "batch_size": 2}
    found = lm_eval.simple_evaluate("hf", tasks=["tiny_recall", "tiny_text"], **options)
    return perplexity(found["results"])


def from_the_command_line(folder, attention, out):
    given = ",".join(f"{name}={value}" for name, value in arguments(folder, attention).items())
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [
            *(*LAUNCH, "--model", "hf", "--model_args", given, "--tasks", "tiny_recall,tiny_text"),
            *("--include_path", str(folder / "tasks"), "--output_path", str(out)),
            *("--device", "cpu", "--batch_size", "2"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, **offline},
    )
    assert done.returncode == 0, done.stderr
    (file,) = out.rglob("results_*.json")
    return perplexity(json.loads(file.read_text())["results"])


def test_both_ways_run_sparse(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    dense, sparse = (from_python(folder, name) for name in ("sdpa", "blasst"))
    assert sparse != pytest.approx(dense, rel=1e-3)
    assert from_the_command_line(folder, "blasst", tmp_path) == pytest.approx(sparse, rel=1e-9)


def test_without_it_the_error_says_what_to_install(monkeypatch):
    from hf_sparse_attention.evaluation.lm_eval import main

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-sparse-attention\[lm-eval\]'"):
        main()
