"""`evaluate` and `benchmark` on the command line: what they write, print and refuse."""

import json

import pytest
from test_cli import model, run, settings  # noqa: F401 - fixtures

QUICK = ("--tasks", "niah_single_1", "--settings", "never,budget:0.5", "--samples", "2")
PLACE = ("--dtype", "float32", "--device", "cpu", "--quiet")


def evaluate(model, out, *more):  # noqa: F811
    return run("evaluate", model, "--out", out, *QUICK, "--lengths", "1024", *PLACE, *more)


def test_evaluate(model, tmp_path):  # noqa: F811
    out, report = tmp_path / "out", tmp_path / "report.html"
    result = evaluate(model, out, "--report", report, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told == json.loads((out / "evaluation.json").read_text())
    assert told["configuration"]["settings"] == ["dense", "never", "budget:0.5"]
    assert "Evaluation of model" in report.read_text()
    assert str(model) not in report.read_text()
    assert "| budget:0.5 |" in (out / "evaluation.md").read_text()

    again = evaluate(model, out)
    assert again.exit_code == 1
    assert "expected no evaluation there" in again.stderr
    resumed = evaluate(model, out, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert "budget:0.5" in resumed.stdout
    assert json.loads((out / "evaluation.json").read_text())["cells"] == told["cells"]
    other = evaluate(model, out, "--resume", "--seed", "1")
    assert other.exit_code == 1
    assert "seed: expected 1, got 0" in other.stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--settings", "blast:0.5"], "expected one of the forms dense, never"),
        (["--tasks", "niah"], "tasks: expected names among niah_single_1"),
        (["--thresholds", "./no/where/at/all"], "expected it in a local folder"),
        (["--report", "."], "--report: expected the name of a file"),
    ],
    ids=["setting", "task", "thresholds", "report"],
)
def test_refusals(model, tmp_path, more, said):  # noqa: F811
    result = evaluate(model, tmp_path, *more)
    assert result.exit_code == 1
    assert said in result.stderr
    assert not (tmp_path / "evaluation.json").exists()


def test_an_evaluation_goes_into_the_model_card(hub, settings, tmp_path):  # noqa: F811
    (tmp_path / "evaluated").mkdir()
    refused = run("push", settings, "owner/model", "--evaluation", tmp_path / "evaluated")
    assert refused.exit_code == 1
    assert "expected a folder with evaluation.md" in refused.stderr
    table = "## Evaluation\n\n| setting | accuracy |\n| --- | --- |\n| dense | 50.0 |\n"
    (tmp_path / "evaluated" / "evaluation.md").write_text(table)
    result = run("push", settings, "owner/model", "--evaluation", tmp_path / "evaluated")
    assert result.exit_code == 0, result.stderr
    assert table in hub.files("owner/model")["README.md"].decode()
    assert not [name for name in hub.files("owner/model") if "evaluation" in name]


def test_benchmark(model, tmp_path):  # noqa: F811
    file = tmp_path / "speed.json"
    options = ("--lengths", "256,512", "--settings", "budget:0.5", "--rounds", "1")
    result = run("benchmark", model, *options, "--new-tokens", "2", *PLACE, "--out", file)
    assert result.exit_code == 0, result.stderr
    told = json.loads(file.read_text())
    assert [row["length"] for row in told["rows"]] == [256, 256, 512, 512]
    assert "break-even" in result.stdout
    for row in told["rows"]:
        assert f"{row['first_token_speedup']:.2f}" in result.stdout
