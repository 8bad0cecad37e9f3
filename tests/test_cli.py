"""The command line: what it prints where, how it ends, and the installed command end to end."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_docs import save_tiny_model
from test_interop_import import bsfa_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.thresholds import THRESHOLDS_NAME
from hf_sparse_attention_cli.app import app

#: Blocks of 64 digits; the largest digit of a block differs from block to block.
_RANDOM = random.Random(0)
TEXT = "9" * 64 + "".join(
    str(_RANDOM.randint(0, largest))
    for largest in _RANDOM.choices(range(9), k=40)
    for _ in range(64)
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose scores are the digit that a key stands for, so that blocks may be skipped."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    save_tiny_model(folder)
    (folder.parent / "text.txt").write_text(TEXT)
    network = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        embedding = network.model.embed_tokens.weight
        embedding[:, 0], embedding[:, 1] = 4.0, 0.0
        for digit in range(10):
            embedding[tokenizer(str(digit)).input_ids, 1] = digit / 2
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight *= 0.01
            layer.mlp.down_proj.weight *= 0.01
            for projection, source, strength in (
                (layer.self_attn.q_proj, 0, 0.5),
                (layer.self_attn.k_proj, 1, 1.0),
            ):
                projection.weight.zero_()
                projection.weight[15::32, source] = strength  # RoPE hardly turns that dimension
    network.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tmp_path):
    """A folder with settings for both phases."""
    SparseAttentionConfig(
        threshold_scale_factor={
            "prefill": {"a": 7.93, "b": 8.61},
            "decode": {"a": 0.12, "b": 9.85},
        },
        target_sparsity={"prefill": 0.5, "decode": 0.4},
    ).save_pretrained(tmp_path / "settings")
    return tmp_path / "settings"


def run(*arguments):
    return CliRunner().invoke(app, [str(x) for x in arguments])


def calibrate(model, out, *more):
    text = model.parent / "text.txt"
    return run(
        *("calibrate", model, "--out", out, "--data", text, "--lengths", "512,1024"),
        *("--samples", 1, "--dtype", "float32", "--device", "cpu", "--quiet", *more),
    )


@pytest.mark.parametrize("method", ["blasst", "bsfa"])
def test_calibrate_then_inspect(model, tmp_path, method):
    result = calibrate(model, tmp_path, "--method", method, "--levels", "2", "--json")
    assert result.exit_code == 0, result.stderr
    made = json.loads(result.stdout)
    assert made["method"] == method
    assert made["out"] == str(tmp_path)
    assert made["provenance"]["lengths"] == [512, 1024]
    config = SparseAttentionConfig.from_pretrained(tmp_path)
    assert config.method == method

    result = run("inspect", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    seen = json.loads(result.stdout)
    for name in ("method", "fits", "tables", "fingerprint", "provenance"):
        assert seen[name] == made[name]
    if method == "bsfa":
        assert seen["levels"] == [2]
        assert seen["fingerprint"]["heads"] == 4
        assert seen["files"][THRESHOLDS_NAME] == seen["thresholds_file"]["sha256"]
    people = run("inspect", tmp_path)
    assert people.exit_code == 0
    assert method in people.stdout
    assert people.stdout.count("warning:") == len(seen["warnings"])


def test_calibrate_chooses_by_cost(model, tmp_path):
    text = model.parent / "text.txt"
    options = ("--max-kl", 1e9, "--granularity", "head", "--geometries", "64x1")
    result = calibrate(model, tmp_path, *options, "--validation", text, "--json")
    assert result.exit_code == 0, result.stderr
    made = json.loads(result.stdout)
    assert (made["granularity"], list(made["fits"])) == ("head", ["64x1"])
    for phase in ("prefill", "decode"):
        fit = made["fits"]["64x1"][phase]
        assert fit["target_sparsity"] == pytest.approx(fit["sparsity"][1])
        assert fit["held_out"]
    refused = calibrate(model, tmp_path, "--max-kl", "prefill=-1")
    assert refused.exit_code == 1
    assert "max_kl" in refused.stderr


def test_report(model, tmp_path):
    """It is beside the settings, shows what limits cost, and names no path of this machine."""
    options = ("--geometries", "64x64", "--max-kl", "prefill=10", "--target-sparsity", "0.05,0.1")
    text = model.parent / "text.txt"
    result = calibrate(model, tmp_path, *options, "--validation", text, "--report", "--json")
    assert result.exit_code == 0, result.stderr
    page = Path(json.loads(result.stdout)["report"]).read_text()
    assert "What skipping costs" in page
    assert str(model.parent) not in page


def test_with_model_gives_a_folder_that_runs(model, tmp_path):
    import hf_sparse_attention

    result = calibrate(model, tmp_path, "--with-model")
    assert result.exit_code == 0, result.stderr
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="blasst")
    ids = AutoTokenizer.from_pretrained(tmp_path)(TEXT[:1024], return_tensors="pt").input_ids
    with hf_sparse_attention.collect_stats(loaded) as stats:
        loaded(ids)
    assert stats.sparsity("prefill") > 0


def test_fresh_forgets_a_run_that_was_killed(model, tmp_path):
    state = tmp_path / "calibration_state.safetensors"
    state.write_bytes(b"of another run")
    refused = calibrate(model, tmp_path)
    assert refused.exit_code == 1
    assert state.exists()
    assert calibrate(model, tmp_path, "--fresh").exit_code == 0
    assert not state.exists()


@pytest.mark.parametrize("engine", ["modelopt", "tensorrt-llm", "sglang", "vllm"])
def test_export(settings, engine):
    result = run("export", settings, "--to", engine, "--target-sparsity", "prefill=0.3")
    assert result.exit_code == 0, result.stderr
    assert "note:" not in result.stdout
    assert "note: Calibrated on blocks of 64x64" in result.stderr
    data = json.loads(
        run("export", settings, "--to", engine, "--target-sparsity", "prefill=0.3", "--json").stdout
    )
    assert data["engine"] == engine
    assert data["notes"] == [
        line.removeprefix("note: ") for line in result.stderr.splitlines() if "note: " in line
    ]
    if engine == "sglang":
        assert list(data["content"].values()) == pytest.approx(
            [7.93 * math.exp(8.61 * 0.3), 0.12 * math.exp(9.85 * 0.4)], rel=1e-5
        )
        assert result.stdout.count("export SGLANG_SKIP_SOFTMAX_") == 2


def test_export_to_files(settings, model, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(model, checkpoint)
    assert run("export", settings, "--to", "modelopt", "--out", checkpoint).exit_code == 0
    written = json.loads((checkpoint / "config.json").read_text())
    assert written["model_type"] == "llama"
    assert "config_groups" in written["sparse_attention_config"]
    file = tmp_path / "extra.yml"
    assert run("export", settings, "--to", "tensorrt-llm", "--out", file).exit_code == 0
    assert "algorithm: skip_softmax" in file.read_text()


def test_import(settings, tmp_path):
    exported = tmp_path / "modelopt.json"
    assert run("export", settings, "--to", "modelopt", "--out", exported).exit_code == 0
    result = run("import", exported, "--out", tmp_path / "back", "--geometry", "64x64", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["notes"]
    before, after = map(SparseAttentionConfig.from_pretrained, (settings, tmp_path / "back"))
    assert after.threshold_scale_factor == before.threshold_scale_factor
    assert after.target_sparsity == before.target_sparsity


def test_import_of_bsfa(tmp_path):
    file, _ = bsfa_file(tmp_path)
    result = run("import", file, "--out", tmp_path / "out", "--keep-sink")
    assert result.exit_code == 0, result.stderr
    assert "note: Runs on its own blocks, 128x64" in result.stderr
    assert SparseAttentionConfig.from_pretrained(tmp_path / "out").keep_sink
    refused = run("import", file, "--out", tmp_path / "out", "--geometry", "64x64")
    assert refused.exit_code == 1


def test_push_then_inspect(hub, model, tmp_path):
    """Settings and report first, then the model too: each one commit, and both can be read."""
    result = calibrate(model, tmp_path, "--report", "--push", "owner/model", "--private", "--json")
    assert result.exit_code == 0, result.stderr
    made = json.loads(result.stdout)
    assert hub.repos["owner/model"].private
    assert made["pushed"]["commit"] == hub.repos["owner/model"].branches["main"]
    assert {"config.json", THRESHOLDS_NAME, "README.md"} <= set(hub.files("owner/model"))
    assert b"Calibration report" in hub.files("owner/model")["README.md"]

    seen = json.loads(run("inspect", "owner/model", "--json").stdout)
    assert seen["fits"] == made["fits"]
    assert seen["files"][THRESHOLDS_NAME] == seen["thresholds_file"]["sha256"]

    folder = tmp_path / "whole"
    shutil.copytree(model, folder)
    SparseAttentionConfig.from_pretrained(tmp_path).save_pretrained(folder)
    result = run("push", folder, "owner/model", "--with-model", "--revision", "v2")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip().endswith(hub.repos["owner/model"].branches["v2"])
    loaded = AutoModelForCausalLM.from_pretrained(
        "owner/model", revision="v2", attn_implementation="bsfa"
    )
    loaded(torch.arange(300)[None] % 100)


def test_push_without_a_token_is_refused_before_the_work(hub, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    result = run("calibrate", tmp_path / "no-model", "--out", tmp_path, "--push", "owner/model")
    assert result.exit_code == 1
    assert "token" in result.stderr.lower()


def _damage(folder):
    (folder / "config.json").write_text(json.dumps({"sparse_attention_config": {"a": 1}}))
    return ["inspect", folder]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (lambda folder: ["inspect", folder / "none"], "none"),
        (_damage, "expected the key"),
        (lambda folder: ["export", folder, "--to", "vllm", "--target-sparsity", "1"], "[0, 1)"),
        (
            lambda folder: ["calibrate", folder, "--out", folder, "--data", "./none.txt"],
            "expected a file or folder",
        ),
        (lambda folder: ["calibrate", folder / "none", "--out", folder], "none"),
        (
            lambda folder: ["calibrate", folder, "--out", folder, "--validation", "none.txt"],
            "--validation: expected a file or folder",
        ),
        (lambda folder: ["import", folder / "config.json", "--out", folder], "got our own"),
    ],
    ids=["no-folder", "damaged", "range", "no-text", "no-model", "no-validation", "ours"],
)
def test_refusals_are_one_line_and_exit_code_1(settings, monkeypatch, arguments, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run(*arguments(settings))
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
    assert said in line
    assert "Traceback" not in result.stderr


def test_traceback_on_request(tmp_path):
    result = run("--traceback", "import", tmp_path / "none.json", "--out", tmp_path)
    assert isinstance(result.exception, FileNotFoundError)


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "folder"],
        ["export", "folder", "--to", "onnx"],
        ["export", "folder", "--to", "vllm", "--target-sparsity", "half"],
        ["calibrate", "folder", "--out", "x", "--lengths", "2k"],
        ["calibrate", "folder", "--out", "x", "--data", "org/dataset"],
        ["evaluate-all"],
    ],
    ids=["missing", "choice", "by-phase", "numbers", "endless-dataset", "command"],
)
def test_wrong_usage_is_exit_code_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_every_option_of_calibrate_reaches_it():
    """What the command offers under the same name, `calibrate()` takes."""
    import inspect

    from hf_sparse_attention import calibrate as function
    from hf_sparse_attention_cli.calibrate import calibrate as command

    loading = "out split dtype device device_map gguf_file revision trust_remote_code"
    ours = set(f"{loading} fresh with_model push private quiet json".split())
    offered = set(inspect.signature(command).parameters) - ours
    assert offered <= set(inspect.signature(function).parameters)


def test_help_does_not_import_torch():
    code = (
        "import sys; from hf_sparse_attention_cli.app import app\n"
        "try: app(['calibrate', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'hf_sparse_attention'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--target-sparsity" in done.stdout


def command():
    """The installed console script, or where the package is not installed, its module."""
    script = Path(sys.executable).with_name("hf-sparse-attention")
    return [str(script)] if script.exists() else [sys.executable, "-m", "hf_sparse_attention"]


def test_the_installed_command(model, tmp_path):
    """calibrate, inspect and export as a user runs them, stdout and stderr apart."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}

    def shell(*arguments):
        done = subprocess.run(
            [*command(), *map(str, arguments)], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done

    out, text = tmp_path / "out", model.parent / "text.txt"
    made = json.loads(
        shell(
            *("calibrate", model, "--out", out, "--data", text, "--lengths", "512,1024"),
            *("--samples", 1, "--dtype", "float32", "--device", "cpu", "--json"),
        ).stdout
    )
    seen = json.loads(shell("inspect", out, "--json").stdout)
    assert seen["fits"] == made["fits"] != {}
    exported = json.loads(shell("export", out, "--to", "tensorrt-llm", "--json").stdout)
    factors = exported["content"]["sparse_attention_config"]["threshold_scale_factor"]
    assert set(factors) == {"prefill", "decode"}
    assert all(x > 0 for x in factors.values())
