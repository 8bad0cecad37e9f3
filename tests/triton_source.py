"""The Triton kernels, loaded from their source; conftest.py has Triton interpret them."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = (
    Path(__file__).parents[1]
    / "kernel_hub/block-skip-attention/torch-ext/block_skip_attention/triton_kernels"
)


@functools.cache
def load() -> ModuleType:
    """The package of kernels, under a name of its own."""
    pytest.importorskip("triton", reason="Triton is not installed")
    spec = importlib.util.spec_from_file_location(
        "triton_source_kernels", SOURCE / "__init__.py", submodule_search_locations=[str(SOURCE)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["triton_source_kernels"] = module
    spec.loader.exec_module(module)
    return module
