"""For every test: one torch thread a worker, a fixed seed, no `gpu` tests without a GPU."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Without a GPU, Triton's kernels run interpreted. It must know before it is first imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from loopback_hub import LoopbackHub, serve

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cpu_kernel() -> None:
    """The compiled CPU kernel, built from the sources as they are; skips where there is no g++."""
    builder = Path(__file__).parents[1] / "kernel_hub" / "build.py"
    done = subprocess.run([sys.executable, str(builder)], capture_output=True, text=True)
    if done.returncode == 2:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def universal_variant() -> None:
    """The Triton kernels as a variant of the kernel repo; needs no compiler."""
    builder = Path(__file__).parents[1] / "kernel_hub" / "build.py"
    command = [sys.executable, str(builder), "--variant", "universal"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A loopback Hub that `huggingface_hub` and transformers talk to, logged in as "owner"."""
    import transformers.utils.hub
    from huggingface_hub import constants, hf_api

    with serve() as server:
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "hub_cache"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", "hf_owner")
        monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's retries
        yield server
