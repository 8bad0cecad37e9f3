"""The kernel on aarch64: compiled across, its output under emulation checked against float64.

Skips where Debian's g++-aarch64-linux-gnu or qemu-user is not installed.
"""

from __future__ import annotations

import importlib
import math
import shutil
import struct
import subprocess
from pathlib import Path

import kernel_checks
import pytest
import torch
from torch import Tensor

from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, SkipRule

ROOT = Path(__file__).parents[1]
REPO = ROOT / "kernel_hub" / "block-skip-attention"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
# What the builder generates, see kernel_hub/build.py.
REGISTRATION_H = """
#define STABLE_TORCH_LIBRARY_EXPAND(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define STABLE_TORCH_LIBRARY_IMPL_EXPAND(ns, k, m) STABLE_TORCH_LIBRARY_IMPL(ns, k, m)
#define REGISTER_EXTENSION(ns)
"""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}")


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every unit of the kernel, compiled without a warning, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "kernel_hub"))
        variant = importlib.import_module("variant").Variant(REPO, "cpu", ["-Werror"])
    work = tmp_path_factory.mktemp("aarch64")
    (work / "registration.h").write_text(REGISTRATION_H)
    torch_headers = Path(torch.__file__).parent / "include"
    command = [COMPILER, *variant.flags, f"-DTORCH_EXTENSION_NAME={variant.id}", f"-I{work}"]
    command += [*(f"-I{REPO / x}" for x in variant.includes), "-isystem", str(torch_headers)]
    built = {}
    for unit in variant.units:
        built[Path(unit).stem] = str(work / Path(unit).with_suffix(".o").name)
        subprocess.run([*command, "-c", REPO / unit, "-o", built[Path(unit).stem]], check=True)
    return built


@pytest.fixture(scope="module")
def runner(objects: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs one call."""
    if shutil.which(EMULATOR) is None:
        pytest.skip(f"no {EMULATOR}")
    program = tmp_path_factory.mktemp("runner") / "run"
    source = ROOT / "tests" / "aarch64_runner.cpp"
    kernel = [objects[name] for name in ("forward", "observe", "level_portable")]
    command = [COMPILER, "-std=c++20", "-O1", "-static", f"-I{REPO / 'csrc'}", str(source), *kernel]
    subprocess.run([*command, "-o", str(program)], check=True)
    return [EMULATOR, str(program)]


def to_bytes(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def attend(
    runner: list[str], folder: Path, call: AttentionCall, rule: SkipRule, geometry: BlockGeometry
) -> AttentionResult:
    """The call under emulation."""
    (batch, heads, q_len, size), (_, kv_heads, kv_len, v_size) = call.q.shape, call.v.shape
    which = 1 if rule.log_lambda is not None else 2 if rule.max_dropped_mass is not None else 0
    order = ("ascending", "sink_diagonal", "descending").index(geometry.order)
    lam, eps = (0.0 if x is None else x.item() for x in (rule.log_lambda, rule.max_dropped_mass))
    header = struct.pack(
        "15q4f",
        *(batch, heads, kv_heads, q_len, kv_len, size, v_size, DTYPES.index(call.q.dtype)),
        *(call.causal, call.window or 0, geometry.block_q, geometry.block_k, order),
        *(geometry.split_k, which, call.scale, call.softcap or 0.0, lam, eps),
    )
    (folder / "in").write_bytes(header + b"".join(map(to_bytes, (call.q, call.k, call.v))))
    subprocess.run([*runner, str(folder / "in"), str(folder / "out")], check=True)
    left = bytearray((folder / "out").read_bytes())

    def take(dtype: torch.dtype, *shape: int) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        taken = torch.frombuffer(left[:size], dtype=dtype).reshape(shape)
        del left[:size]
        return taken

    decode = call.phase == "decode"
    rows = q_len if decode else -(-q_len // geometry.block_q)
    skip_bytes = (-(-kv_len // geometry.block_k) + 7) // 8
    result = AttentionResult(
        out=take(call.q.dtype, batch, q_len, heads, v_size),
        lse=take(torch.float32, batch, heads, q_len),
        counts=take(torch.int64, batch, heads, 2),
        skips=take(torch.uint8, batch, kv_heads if decode else heads, rows, skip_bytes),
        dropped_mass=take(torch.float32, batch, heads, q_len),
    )
    assert not left
    return result


@pytest.mark.slow
def test_every_unit_compiles(objects: dict[str, str]) -> None:
    assert "level_portable" in objects


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", ["64x64", "64x1"])
@pytest.mark.parametrize("q_len", [150, 3], ids=["prefill", "decode"])
def test_output_under_emulation(runner, tmp_path, q_len, geometry, dtype) -> None:
    geometry = BlockGeometry.from_name(geometry)
    q, k = kernel_checks.structured("sink", 2, 4, 2, q_len, 330, 40)
    v = torch.randn(2, 2, 330, 19)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    skipped = 0
    for options in ({}, {"softcap": 6.0, "window": 240}):
        for rule in (SkipRule.never(), SkipRule.blasst(0.1), SkipRule.budget(0.1)):
            call = AttentionCall(q, k, v, scale=40**-0.5, **options)
            result = attend(runner, tmp_path, call, rule, geometry)
            kernel_checks.check(call, rule, geometry, result)
            skipped += int(result.counts[..., 1].sum())
    assert skipped > 0
