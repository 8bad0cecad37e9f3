"""The CUDA kernels, compiled for the CPU from their source: see kernel_hub/emulator."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "kernel_hub/block-skip-attention/.build/emulated"


@functools.cache
def load() -> ModuleType:
    """The emulated variant, built if it is not current; skips where there is no C++ compiler."""
    builder = [sys.executable, str(ROOT / "kernel_hub/build.py"), "--emulate"]
    done = subprocess.run(builder, capture_output=True, text=True)
    if done.returncode == 2:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("emulated_cuda_kernels", BUILT / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["emulated_cuda_kernels"] = module
    spec.loader.exec_module(module)
    return module


class Totals(ctypes.Structure):
    """What the emulator counted since it was loaded: `Totals` in cuda_emulator.h."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("launches", "blocks", "products", "copies", "byte_products", "bank_conflicts")
    ]


def totals() -> Totals:
    load()
    (library,) = BUILT.glob("*.so")
    function = ctypes.CDLL(str(library)).emulator_totals
    function.restype = ctypes.POINTER(Totals)
    found: Totals = function().contents
    return found
