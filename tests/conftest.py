"""For every test: one torch thread a worker, a fixed seed, no `gpu` tests without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Without a GPU, Triton's kernels run interpreted. It must know before it is first imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

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
