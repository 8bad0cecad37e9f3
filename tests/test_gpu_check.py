"""A rehearsal of `make gpu-check` on the CPU, and what it makes of children that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import gpu_check, gpu_children, gpu_goals

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parents[1]


def test_rehearsal(tmp_path: Path) -> None:
    shapes = {"q": (1, 3, 250, 64), "k": (1, 1, 250, 64), "v": (1, 1, 250, 64)}
    captured = {f"9.{name}": torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    save_file(captured, tmp_path / "captured.safetensors")
    command = [sys.executable, str(ROOT / "benchmarks/gpu_check.py"), "--emulate"]
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    environment["GPU_CHECK_CAPTURED"] = str(tmp_path / "captured.safetensors")
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    assert result["emulated"]
    assert result["right"]
    assert result["kernel"].startswith("_block_skip_attention_universal_")
    assert result["cuda"].startswith("_block_skip_attention_emulated_")
    names = [row["name"] for row in result["correctness"]]
    assert [name.partition(":")[0] for name in names] == [
        *("cuda", "sm_90a", "sm_80 cuda", "cuda", "triton", "int8 K, triton", "triton")
    ]
    for large in (row for row in result["correctness"] if row["name"].endswith(": prefill")):
        assert large["sparsity"] > 0
        assert large["error_over_allowed"] <= 1
    (copied,) = (row for row in result["correctness"] if row["name"].startswith("int8 K"))
    assert copied["unread"], "what the copy proves is not read"
    for row in result["timing"]:
        names = list(row["contestants"])
        assert names[0] == "sdpa"
        assert any(name.startswith("triton") for name in names)
        assert row["group"] == "training" or any(name.startswith("cuda") for name in names)
        assert row["unable"] == {}
    (layer,) = [row for row in result["timing"] if row["group"] == "captured"]
    assert layer["name"] == "captured prefill, layer 9"
    assert set(layer["errors"]) == {
        f"{backend} 64x64, lambda {lam}"
        for backend in ("cuda", "triton")
        for lam in ("0.001", "0.01", "0.1")
    }
    assert all(0 <= error < 0.2 for error in layer["errors"].values())
    assert {goal["met"] for goal in result["goals"]} == {None}, "nothing was timed at 64K"
    skipped = [x.get("sparsity", 0) for x in result["timing"][0]["contestants"].values()]
    assert max(skipped) > 0, "something was skipped"
    assert "ms" in done.stdout


def test_goals_are_named_with_their_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    def contestant(seconds: float) -> dict[str, float]:
        return {"seconds": seconds, "speedup_over_best_peer": 10.0 / seconds}

    prefill = {
        "sdpa cudnn": contestant(10.0),
        "cuda 64x64, no rule": contestant(10.5),
        "cuda 64x64, 0% low": contestant(10.2),
        "cuda 64x128, 0% low": contestant(10.6),
        "cuda 64x64, 75% low": contestant(6.0),
        "cuda of sm_80 64x64, 75% low": contestant(1.0),
        "triton 64x64, 10% low": contestant(11.0),
    }
    backward = {"triton 64x64, 0% low": contestant(9.0), "triton 64x64, 75% low": contestant(4.5)}
    rows = [
        {"name": "prefill 65536", "contestants": prefill},
        {"name": "backward 32768", "contestants": backward},
        {"name": "decode 1 x 65536", "left_out": "no time"},
    ]
    found = {row["goal"]: row for row in gpu_goals.goals(rows)}
    measured = {goal: row["measured"] for goal, row in found.items() if row["measured"]}
    assert measured == {
        "prefill 64K, 0% sparse, over the fastest dense peer": pytest.approx(10 / 10.2),
        "prefill 64K, 75% sparse, over the fastest dense peer": pytest.approx(10 / 6),
        "prefill 64K, 75% sparse, over itself without a rule": pytest.approx(10.5 / 6),
        "backward, 75% sparse, over itself at 0%": pytest.approx(2.0),
    }
    met = [row["met"] for row in found.values()]
    assert met == [True, True, True, None, None, None, None, False]
    gpu_goals.print_goals(list(found.values()))
    assert capsys.readouterr().out.count("not timed") == 4


def test_failing_children_cost_their_case_only() -> None:
    deadline = time.monotonic() + 200
    told: list[str] = []
    rows = gpu_children.run_cases(
        ["faulty"],
        ["--device", "cpu"],
        case_limit=1.0,
        deadline=deadline,
        tell=lambda row: told.append(row["name"]),
    )
    assert told == [row["name"] for row in rows], "each is told of, so that none is lost"
    assert [row["name"] for row in rows] == ["raises", "crashes", "hangs", "works"]
    assert [row["ok"] for row in rows] == [False, False, False, True]
    assert "ZeroDivisionError" in rows[0]["error"]
    assert "ended with status -6" in rows[1]["error"]
    assert "no answer within 1 s: killed" in rows[2]["error"]
    assert len(gpu_check.wrong({"x": rows})) == 3


def test_the_deadline_holds() -> None:
    start = time.monotonic()
    rows = gpu_children.run_cases(["faulty"], ["--device", "cpu"], case_limit=1.0, deadline=start)
    assert time.monotonic() - start < 8
    assert rows == [{"name": "the rest", "left_out": "no time left, for this and the rest"}]


def test_a_build_has_a_deadline_too(tmp_path: Path) -> None:
    """And the compilers that it started end with it."""
    alive = tmp_path / "alive"
    code = f"import subprocess; subprocess.run(['sh', '-c', 'sleep 3; touch {alive}'])"
    start = time.monotonic()
    assert gpu_children.run_build([sys.executable, "-c", code], 0.5)[0] == 124
    assert time.monotonic() - start < 3
    time.sleep(3.2)
    assert not alive.exists()
    assert gpu_children.run_build([sys.executable, "-c", "print(7)"], 20) == (0, "7\n")


def test_every_part_ends_before_the_next() -> None:
    assert sorted(gpu_check.PARTS.values()) == list(gpu_check.PARTS.values())
    assert max(gpu_check.PARTS.values()) < 1


def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/gpu_check.py")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "expected a CUDA device" in done.stderr
