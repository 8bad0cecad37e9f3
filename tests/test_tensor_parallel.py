"""Tensor parallelism over two gloo processes: one process's answers, each head's own thresholds."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from parallel_runs import run, tables
from tiny_models import llama
from transformers import AutoModelForCausalLM

from hf_sparse_attention import sharding
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.settings import LayerSettings
from hf_sparse_attention.types import PHASES

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`run`'s results on one process, and those of the two ranks."""
    folder = tmp_path_factory.mktemp("tp")
    torch.manual_seed(0)
    llama().save_pretrained(folder / "model")
    script = [str(TESTS / "parallel_runs.py"), str(folder / "model"), str(folder)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [*launcher, *script], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="blasst")
    ranks = [torch.load(folder / f"rank{i}.pt", weights_only=True) for i in range(2)]
    return run(model), *ranks


@pytest.mark.parametrize("name", ["dense", "blasst", "budget", "bsfa", "blasst-by-head"])
def test_two_ranks_answer_as_one_process(runs, name):
    alone, *ranks = (x[name]["logits"] for x in runs)
    assert torch.equal(*ranks)
    # Sums over two ranks round differently: a few float32 steps of the largest logit.
    torch.testing.assert_close(ranks[0], alone, rtol=0, atol=float(alone.abs().max()) * 2**-18)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", ["blasst", "budget", "bsfa", "blasst-by-head"])
def test_the_ranks_heads_skip_as_on_one_process(runs, name, phase):
    alone, *ranks = (x[name]["counts"][phase] for x in runs)
    assert alone.keys() == ranks[0].keys() == {0, 1}
    for layer, counts in alone.items():
        assert counts[:, 1].any()
        assert torch.equal(torch.cat([rank[layer] for rank in ranks]), counts)


@pytest.mark.parametrize("name", ["bsfa", "blasst-by-head"])
def test_the_heads_differ_so_that_another_ranks_thresholds_would_show(runs, name):
    for counts in runs[0][name]["counts"]["prefill"].values():
        first, second = counts[:2, 1].bool(), counts[2:, 1].bool()
        assert not torch.equal(first, second)


def test_ranks_find_the_thresholds_that_they_saved(runs):
    """By `from_pretrained` alone."""
    _, *ranks = (x["bsfa"] for x in runs)
    for rank in ranks:
        length = rank["reloaded"].shape[1]
        assert torch.equal(rank["reloaded"], rank["logits"][:, :length])


@pytest.mark.parametrize(
    ("shares", "heads", "in_all", "expected"),
    [
        ((), 4, 4, 0),
        (((1, 2),), 4, 4, 0),  # FSDP cuts storage only
        (((1, 2),), 2, 4, 2),
        (((3, 4), (1, 2)), 2, 4, 2),  # two meshes: the one that fits
        (((2, 3),), 2, 4, None),
        ((), 2, 4, None),
        ((), 2, None, 0),
    ],
)
def test_first_head(shares, heads, in_all, expected):
    assert sharding.first_head(shares, heads, in_all) == expected


def test_heads_that_cannot_be_placed_are_refused(runs, monkeypatch):
    model = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, hidden_size=64)
    settings = LayerSettings(
        SparseAttentionConfig(method="bsfa", tables=tables(model)), layer=0, heads=4
    )
    assert settings.first_head(2) == 0  # one process: a layer with fewer heads
    monkeypatch.setattr(sharding, "is_distributed", lambda: True)
    with pytest.raises(
        ValueError, match=r"expected all 4 heads, .* got 2 heads .* call that again"
    ):
        settings.first_head(2)
