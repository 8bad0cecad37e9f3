"""Runs that are killed, continued, or split over processes end with the very same sums."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calibrating_processes import LENGTHS, observed, samples
from safetensors.torch import load_file
from tiny_models import llama

from hf_sparse_attention import SparseAttentionConfig, calibrate
from hf_sparse_attention.calibration import progress
from hf_sparse_attention.calibration.processes import Processes
from hf_sparse_attention.calibration.progress import STATE_NAME, forget
from hf_sparse_attention.types import BlockGeometry

TESTS = Path(__file__).parent


class Killed(BaseException):
    """Ends a run as a signal would."""


def killed_after(count):
    """The samples, until the run is killed while it takes the next one."""
    yield from samples()[:count]
    raise Killed


@pytest.fixture
def model():
    torch.manual_seed(0)
    return llama().eval()


@pytest.fixture
def passes(model):
    """Lengths of the passes through the model."""
    seen = []
    model.model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return seen


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(state[name], x), name


@pytest.mark.parametrize("count", [1, 3, len(LENGTHS)])
def test_a_killed_run_continues(model, passes, tmp_path, monkeypatch, count):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(progress, "SHARE_OF_SAVING", 1e9)
    expected, _ = observed(model)
    with pytest.raises(Killed):
        observed(model, tmp_path, killed_after(count))
    passes.clear()
    state, lengths = observed(model, tmp_path)
    assert_equal(state, expected)
    assert lengths == LENGTHS
    assert passes == LENGTHS[count:], "only what was missing ran again"
    forget(tmp_path)
    assert not list(tmp_path.iterdir())


def test_between_saves_nothing_is_written(model, tmp_path):
    """The first sample is saved at once; the next only after half a minute's worth of tokens."""
    with pytest.raises(Killed):
        observed(model, tmp_path, killed_after(4))
    written = (tmp_path / STATE_NAME).stat().st_mtime_ns
    state, _ = observed(model, tmp_path)
    assert (tmp_path / STATE_NAME).stat().st_mtime_ns > written, "the end is saved"
    assert_equal(state, observed(model)[0])


def test_a_finished_run_is_not_run_again(model, passes, tmp_path):
    expected, _ = observed(model, tmp_path)
    passes.clear()
    state, lengths = observed(model, tmp_path)
    assert_equal(state, expected)
    assert (passes, lengths) == ([], LENGTHS)


def changed_weights(model, monkeypatch):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    return {}


def changed_settings(model, monkeypatch):
    monkeypatch.setattr("calibrating_processes.GEOMETRIES", [BlockGeometry(8, 8)])
    return {}


def changed_data(model, monkeypatch):
    return {"ids": [ids + (i == 0) for i, ids in enumerate(samples())]}


def fewer_samples(model, monkeypatch):
    return {"ids": samples()[:3]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (changed_weights, r"weights: expected \w+, got \w+"),
        (changed_settings, r"geometries: expected .*block_q=8.*, got .*block_q=16"),
        (changed_data, "data: expected these samples, got 5 others"),
        (fewer_samples, "data: expected these samples, got 5 others"),
    ],
)
def test_the_state_of_another_run_is_refused(model, passes, tmp_path, monkeypatch, change, named):
    observed(model, tmp_path)
    before = (tmp_path / STATE_NAME).read_bytes()
    passes.clear()
    settings = change(model, monkeypatch)
    with pytest.raises(
        ValueError, match=rf"{STATE_NAME}: the state of another .*{named}.*; delete"
    ):
        observed(model, tmp_path, **settings)
    assert passes == [], "before any work"
    assert (tmp_path / STATE_NAME).read_bytes() == before


@pytest.mark.parametrize("damage", [lambda x: x[:100], lambda x: b"", lambda x: x[:8] + b"{}"])
def test_a_damaged_state_is_named(model, tmp_path, damage):
    observed(model, tmp_path)
    file = tmp_path / STATE_NAME
    file.write_bytes(damage(file.read_bytes()) or b"?")
    with pytest.raises(ValueError, match=rf"{STATE_NAME}: expected the state of a calibration"):
        observed(model, tmp_path)


def test_logits_are_not_computed(model):
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    observed(model)


def test_a_model_with_adapters(model):
    import peft

    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    adapted.base_model.model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    expected, _ = observed(model)
    assert_equal(observed(adapted)[0], expected)


def test_offloaded_weights(model):
    accelerate = pytest.importorskip("accelerate")
    expected, _ = observed(model)
    offloaded = accelerate.cpu_offload(model, torch.device("cpu"))
    assert {p.device.type for p in offloaded.parameters()} == {"meta"}
    assert_equal(observed(offloaded)[0], expected)


def test_a_killed_calibration_continues_and_leaves_nothing_behind(model, tmp_path):
    settings = {"method": "bsfa", "levels": (1,), "geometries": "16x16", "progress": False}
    expected = calibrate(model, samples(), **settings)
    with pytest.raises(Killed):
        calibrate(model, killed_after(2), output_dir=tmp_path, **settings)
    assert [file.name for file in tmp_path.iterdir()] == [STATE_NAME]
    config = calibrate(model, samples(), output_dir=tmp_path, **settings)
    assert config.tables.tensors.keys() == expected.tables.tensors.keys() != set()
    for name, table in expected.tables.tensors.items():
        assert torch.equal(config.tables.tensors[name], table), name
    assert config.provenance == expected.provenance
    assert STATE_NAME not in {file.name for file in tmp_path.iterdir()}
    assert SparseAttentionConfig.from_pretrained(tmp_path).method == "bsfa"


def test_no_samples(model):
    with pytest.raises(ValueError, match="expected at least one sample, got none"):
        observed(model, ids=iter([]))


def test_samples_are_shared_out_by_their_cost():
    """Every sample falls to one process, and none waits for long ones."""
    lengths = [8192, 1024, 1024, 8192, 2048, 4096, 1024]
    three = [Processes(rank, 3, [0.0] * 3) for rank in range(3)]
    taken = [[one.falls_to_me(n) for one in three] for n in lengths]
    assert all(sum(takers) == 1 for takers in taken)
    assert taken[0].index(True) != taken[3].index(True), "the two long ones apart"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A run of two gloo processes; it takes up what one process alone had begun."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    model = llama().eval()
    model.save_pretrained(folder / "model")
    with pytest.raises(Killed):
        observed(model, folder, killed_after(2))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(TESTS / "calibrating_processes.py"), str(folder / "model"), str(folder)]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return model, [load_file(folder / f"rank{n}.safetensors") for n in range(2)]


def test_two_processes_end_as_one(two_ranks):
    model, ranks = two_ranks
    expected, _ = observed(model)
    shares = [int(rank.pop("passes")) for rank in ranks]
    assert sum(shares) == len(LENGTHS) - 1, "one sample was in the state, the others run once"
    assert min(shares) > 0, "both worked"
    for rank in ranks:
        assert rank.pop("lengths").tolist() == LENGTHS
        assert_equal(rank, expected)
