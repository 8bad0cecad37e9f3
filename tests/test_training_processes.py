"""Training on two processes, under DDP and FSDP2, against the same training on one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import logged, model, ramp, trainer

from hf_sparse_attention import SparseAttentionConfig

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have trained."""
    out = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = [str(TESTS / "training_runs.py"), str(out)]
    done = subprocess.run([*command, *script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, ...]]:
    """What one process logs that takes both processes' samples."""
    run = trainer(tmp_path_factory.mktemp("one"))
    run.train()
    return logged(run, "loss", "sparsity", "threshold_scale_factor")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(two: Path, one: list[Any], kind: str) -> None:
    ranks = [json.loads((two / f"rank{n}.json").read_text())[kind] for n in range(2)]
    assert ranks[0] == ranks[1]
    for mine, alone in zip(ranks[0], one, strict=True):
        # Losses are summed in another order; a decision within rounding of its threshold may fall
        # the other way: one of the 2 layers x 4 heads x 2 rows x about 400 blocks.
        assert mine[0] == pytest.approx(alone[0], rel=1e-4)
        assert mine[1] == pytest.approx(alone[1], abs=1e-3)
        assert mine[2] == alone[2]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_checkpoints_of_two_processes_hold_the_settings(two: Path, kind: str) -> None:
    for name in ("checkpoint-3", "checkpoint-6", "."):
        kept = SparseAttentionConfig.from_pretrained(two / kind / name)
        assert (
            kept.threshold_scale_factor
            == SparseAttentionConfig(threshold_scale_factor=60.0).threshold_scale_factor
        )


def test_recalibration_under_fsdp_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hf_sparse_attention.training.recalibration as recalibration

    monkeypatch.setattr(recalibration, "shares_of", lambda _: ((0, 2),))
    run = trainer(tmp_path, model(), ramp(calibration_data=[torch.arange(3, 90)]))
    with pytest.raises(ValueError, match="calibration_data: expected None under FSDP"):
        run.train()
