"""Variants by CUDA version: what the builder calls them, and which of them a user's torch gets."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import kernels.variants
import pytest
from kernels.backends import parse_backend

REPO = Path(__file__).parents[1] / "kernel_hub/block-skip-attention"


@pytest.fixture
def nvcc(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPO.parent)
    return importlib.import_module("nvcc")


def fake_nvcc(folder: Path, version: str) -> str:
    """A compiler that says its version, and no more."""
    path = folder / f"nvcc-{version}"
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.61'\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(("version", "name"), [("12.8", "cu128"), ("13.0", "cu130")])
def test_a_variant_is_called_after_its_compiler(
    nvcc: ModuleType, tmp_path: Path, version: str, name: str
) -> None:
    compiler = fake_nvcc(tmp_path, version)
    assert nvcc.refusal(compiler) is None
    variant = importlib.import_module("variant").Variant(REPO, "cuda", [], compiler)
    assert variant.folder_name.startswith(f"torch-stable-abi211-{name}-")
    assert nvcc.link_flags(compiler)[1] == f"-Xlinker=-l:libcudart.so.{version[:2]}"


def test_each_compiler_makes_an_id_of_its_own(nvcc: ModuleType, tmp_path: Path) -> None:
    """Two builds in one namespace of ops would crash."""
    variant = importlib.import_module("variant").Variant
    compilers = [fake_nvcc(tmp_path, version) for version in ("12.8", "12.9", "13.0")]
    assert len({variant(REPO, "cuda", [], compiler).id for compiler in compilers}) == 3


def test_an_old_compiler_is_refused(nvcc: ModuleType, tmp_path: Path) -> None:
    reason = nvcc.refusal(fake_nvcc(tmp_path, "12.4"))
    assert reason == "nvcc: expected version 12.8 or newer, got 12.4"


@pytest.mark.parametrize(
    ("torch_has", "gets"),
    [
        ("cu130", "torch-stable-abi211-cu130-x86_64-linux"),
        ("cu132", "torch-stable-abi211-cu130-x86_64-linux"),
        ("cu128", "torch-universal"),
        ("rocm71", "torch-universal"),
        ("cpu", "torch-stable-abi211-cpu-x86_64-linux"),
    ],
)
def test_what_kernels_takes(monkeypatch: pytest.MonkeyPatch, torch_has: str, gets: str) -> None:
    """Whoever has torch for another CUDA, or another GPU, gets the Triton kernels."""
    backend = parse_backend(torch_has)
    monkeypatch.setattr(kernels.variants, "_select_backend", lambda _: backend)
    monkeypatch.setattr(kernels.variants.platform, "machine", lambda: "x86_64")
    names = ["cpu-x86_64-linux", "cu130-x86_64-linux"]
    uploaded = [f"torch-stable-abi211-{name}" for name in names] + ["torch-universal"]
    found, _ = kernels.variants.resolve_variant(
        [kernels.variants.parse_variant(name) for name in uploaded]
    )
    assert found is not None
    assert found.variant_str == gets
