"""A rehearsal of `make gpu-check` on the CPU, and what it makes of children that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_check, gpu_children

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parents[1]


def test_rehearsal(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/gpu_check.py"), "--emulate"]
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHONWARNINGS": "ignore"}
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
    skipped = [x.get("sparsity", 0) for x in result["timing"][0]["contestants"].values()]
    assert max(skipped) > 0, "something was skipped"
    assert "ms" in done.stdout


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
