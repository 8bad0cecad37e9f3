"""The builder, what it builds, how it is found, and what torch makes of the op."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import kernels
import pytest
import torch
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
from torch._dynamo.testing import CompileCounter

from hf_sparse_attention.backends import cpu, kernel
from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, SkipRule

pytestmark = pytest.mark.usefixtures("cpu_kernel")

ROOT = Path(__file__).parents[1]
BUILDER = ROOT / "kernel_hub" / "build.py"
REPO = ROOT / "kernel_hub" / "block-skip-attention"
LEVELS = ["portable", "avx2", "avx512", "avx512_bf16", "avx512_amx"]


def variant() -> Path:
    (found,) = (REPO / "build").glob("torch-stable-abi211-cpu-*-linux")
    return found


def library() -> Path:
    (found,) = variant().glob("*.abi3.so")
    return found


def build(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BUILDER), *args],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def test_one_name_for_library_namespace_and_metadata() -> None:
    metadata = Metadata.read_from_file(variant() / "metadata.json")
    assert metadata.id == library().name.removesuffix(".abi3.so")
    assert metadata.id.startswith("_block_skip_attention_cpu_")
    assert metadata.name.python_name == "block_skip_attention"
    assert (metadata.version, metadata.license) == (kernel.VERSION, "Apache-2.0")
    assert str(metadata.backend.backend_type) == "cpu"
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant()))
    assert metadata.backend.backend_type in Build.open(REPO).general.backends


def test_abi() -> None:
    abi = pytest.importorskip("kernel_abi_check")
    file = abi.ObjectFile(str(library()))
    assert not file.check_python_abi("3.9")
    assert not file.check_manylinux("manylinux_2_28")


def test_levels_share_no_inline_functions() -> None:
    """A function with AVX-512 in it must never be picked for a machine without."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    listed = subprocess.run(
        ["nm", "-DC", "--defined-only", str(library())], capture_output=True, text=True, check=True
    )
    assert "bsa::" not in listed.stdout  # all hidden


def test_an_unchanged_source_is_not_built_again() -> None:
    before = library().stat().st_mtime_ns
    done = build()
    assert done.returncode == 0
    assert "is current" in done.stdout
    assert library().stat().st_mtime_ns == before
    leftovers = [p.name for p in (REPO / "build").iterdir() if p.name.startswith(".tmp")]
    assert leftovers == []


def test_every_source_is_listed() -> None:
    """kernel-builder compiles only what build.toml names, and the hash covers just that."""
    listed = (REPO / "build.toml").read_text()
    for file in (*REPO.glob("csrc/*"), *REPO.glob("torch-ext/*.*")):
        assert f'"{file.relative_to(REPO)}"' in listed, file


def test_no_compiler_is_a_clear_error(tmp_path: Path) -> None:
    done = build("--output", str(tmp_path), CXX="no-such-compiler")
    assert done.returncode == 2
    assert "no-such-compiler" in done.stderr
    assert "apt-get install g++" in done.stderr
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["torch-universal"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    done = build("--output", str(tmp_path), CXX="false")
    assert done.returncode == 1
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["torch-universal"]


def test_get_local_kernel_loads_it() -> None:
    for path in (REPO, REPO / "build", variant()):
        module = kernels.get_local_kernel(path, backend="cpu")
        assert module.cpu_level() in LEVELS
    x = torch.randn(1, 1, 9, 8)
    assert module.forward(x, x, x, scale=1.0)[0].shape == (1, 9, 1, 8)


def test_the_compatibility_folder_loads_the_same_module() -> None:
    module = kernels.get_local_kernel(REPO, backend="cpu")
    file = variant() / "block_skip_attention" / "__init__.py"
    spec = importlib.util.spec_from_file_location("compat_block_skip_attention", file)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.forward is module.forward


def test_local_kernels_comes_first(tmp_path: Path) -> None:
    copy = shutil.copytree(REPO / "build", tmp_path / "elsewhere" / "build").parent
    code = (
        "from hf_sparse_attention.backends import cpu; m = cpu.load_kernel(); print(m.__file__);"
        "import torch; x = torch.randn(1, 1, 9, 8); print(m.forward(x, x, x, scale=1.0)[0].shape)"
    )
    done = python(code, LOCAL_KERNELS=f"{kernel.REPO_ID}={copy}")
    assert done.returncode == 0, done.stderr
    assert str(copy) in done.stdout


def test_the_repos_own_tests_pass() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(REPO / "tests")]
    environment = {**os.environ, "LOCAL_KERNELS": f"{kernel.REPO_ID}={REPO}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout


def test_import_loads_no_kernel() -> None:
    code = (
        "import sys; import hf_sparse_attention.backends.cpu;"
        "assert 'kernels' not in sys.modules or not __import__('kernels').get_loaded_kernels();"
        "assert not any('block_skip' in m for m in sys.modules)"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_without_a_build_the_reason_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_CHECKOUT", tmp_path / "a")
    monkeypatch.setattr(kernel, "_WHEEL", tmp_path / "b")
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    monkeypatch.delenv("HF_SPARSE_ATTENTION_HUB_KERNELS", raising=False)
    monkeypatch.setattr(kernel, "load", kernel.load.__wrapped__)
    reason = cpu.load_kernel()
    assert isinstance(reason, str)
    assert str(tmp_path / "a") in reason
    assert "python kernel_hub/build.py" in reason


def test_a_wheel_carries_the_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(variant(), tmp_path / "_kernels" / variant().name)
    monkeypatch.setattr(kernel, "_CHECKOUT", tmp_path / "none")
    monkeypatch.setattr(kernel, "_WHEEL", tmp_path / "_kernels")
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    module = kernel.load.__wrapped__("cpu")
    assert str(tmp_path) in module.__file__


def test_a_broken_build_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = shutil.copytree(REPO / "build", tmp_path / "build")
    (metadata,) = broken.glob("*-cpu-*/metadata.json")
    metadata.write_text(json.dumps({"id": "x"}))
    monkeypatch.setattr(kernel, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(kernel, "_WHEEL", tmp_path / "none")
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    reason = kernel.load.__wrapped__("cpu")
    assert isinstance(reason, str)
    assert "does not load" in reason


def op_arguments(q_len: int, dtype: torch.dtype = torch.float32, **options) -> tuple:
    q = torch.randn(2, 4, q_len, 16, dtype=dtype)
    k, v = (torch.randn(2, 2, 100, size, dtype=dtype) for size in (16, 8))
    positional = (
        options.get("key_valid"),
        None,
        torch.randn(4),
        torch.full((1, 1), -1.0),
        torch.randn(2, 4, 1),
        torch.full((2, 1), 0.1),
    )
    flags = (0.25, True, 0, 0.0, 64, 64, 1, 1024, True, options.get("skips", True), True)
    return (q, k, v, *positional, *flags)


@pytest.mark.parametrize("q_len", [70, 2, 0])
def test_opcheck(q_len: int) -> None:
    forward = cpu.load_kernel().ops.forward.default
    for dtype in (torch.float32, torch.bfloat16):
        for skips in (True, False):
            torch.library.opcheck(forward, op_arguments(q_len, dtype, skips=skips))
    valid = torch.rand(2, 100) < 0.5
    torch.library.opcheck(forward, op_arguments(q_len, key_valid=valid))


def test_compile_neither_breaks_nor_recompiles() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()

    def attend(q, k, v, log_lambda, key_valid) -> AttentionResult:
        call = AttentionCall(q, k, v, scale=0.25, key_valid=key_valid)
        rule, geometry = SkipRule(log_lambda=log_lambda), BlockGeometry()
        assert cpu.available() is None
        assert cpu.supports(call, rule, geometry) is None
        return cpu.run(call, rule, geometry, return_dropped_mass=True)

    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for q_len, kv_len, log_lambda in (
        (70, 90, -1.0),
        (70, 90, -3.0),
        (130, 200, -2.0),
        (2, 150, -1.0),
    ):
        q, k, v = torch.randn(1, 4, q_len, 16), *(torch.randn(1, 2, kv_len, 16) for _ in range(2))
        valid = torch.arange(kv_len)[None] >= 5
        arguments = (q, k, v, torch.full((1, 1), log_lambda), valid)
        got, eager = compiled(*arguments), attend(*arguments)
        for name in ("out", "lse", "counts", "dropped_mass"):
            assert torch.equal(getattr(got, name), getattr(eager, name))
        frames.append(counter.frame_count)
    assert frames == [1, 1, 1, 1]


def test_inductor() -> None:
    q, k = torch.randn(1, 4, 70, 16), torch.randn(1, 2, 70, 16)

    def attend(q, k):
        call = AttentionCall(q * 2, k, k, scale=0.25)
        return cpu.run(call, SkipRule.never(), BlockGeometry()).out + 1

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(attend, fullgraph=True)(q, k), attend(q, k))


@pytest.mark.slow
@pytest.mark.timeout(1200)  # it compiles the kernel once more, for all levels
def test_sanitizers() -> None:
    """Address and undefined-behaviour sanitizers over all features, levels, and both directions."""
    output = REPO / ".build" / "sanitized"
    done = build("--variant", "cpu", "--sanitize", "--output", str(output))
    assert done.returncode == 0, done.stderr
    compiler = os.environ.get("CXX", "g++")
    runtime = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    (built,) = output.glob("torch-stable-abi211-cpu-*-linux")
    environment = {
        "LD_PRELOAD": " ".join(x.strip() for x in runtime),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself is not free of leaks
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "sanitized_calls.py"), str(built), *LEVELS],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    here = LEVELS[: LEVELS.index(cpu.load_kernel().cpu_level()) + 1]
    assert done.stdout.splitlines() == [f"{level} ran" for level in here]
    assert "runtime error" not in done.stderr
