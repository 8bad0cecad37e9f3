"""Prefill at the level avx512_amx on a CPU without AMX: its own source, on emulated tiles."""

from __future__ import annotations

import ctypes
import functools
import math
import subprocess
import tempfile
from pathlib import Path

import torch
from sm90_emulated import EMULATOR, ROOT, Strided, _fields
from torch import Tensor

from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, SkipRule

SOURCES = ROOT / "kernel_hub" / "block-skip-attention" / "csrc"
UNITS = [SOURCES / "level_avx512_amx.cpp", SOURCES / "forward.cpp", ROOT / "tests/amx_runner.cpp"]
ORDERS = ("ascending", "sink_diagonal", "descending")
GUARD = 4096  # elements behind K that no tile may read


class Call(ctypes.Structure):
    """The struct of amx_runner.cpp."""

    _fields_ = [
        *_fields(Strided, "q k v log_lambda threshold budget"),
        *_fields(
            ctypes.c_void_p,
            "valid offset sinks guard_begin guard_end out lse counts skips dropped",
        ),
        *_fields(ctypes.c_int64, "B Hq Hkv Lq Lk D Dv offsets causal window block_q block_k"),
        *_fields(ctypes.c_int64, "order keep_sink"),
        *_fields(ctypes.c_float, "scale softcap"),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The level's source with emulated tiles, compiled for this process."""
    target = Path(tempfile.mkdtemp(prefix="amx-")) / "kernel.so"
    torch_folder = Path(torch.__file__).parent
    # -O1 takes half the time of -O3 to compile.
    command = ["g++", "-std=c++20", "-O1", "-fno-math-errno", "-ffp-contract=fast", "-pthread"]
    command += ["-fPIC", "-shared", "-include", str(EMULATOR / "amx_tiles.h"), f"-I{SOURCES}"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-Wno-psabi"]
    command += ["-Wno-ignored-attributes", "-isystem", str(torch_folder / "include")]
    command += [*map(str, UNITS), f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-o", str(target)]
    subprocess.run(command, check=True)
    found = ctypes.CDLL(str(target))
    found.attend.argtypes = (ctypes.POINTER(Call),)
    found.refusal.argtypes = (*[ctypes.c_uint32] * 3, ctypes.c_uint64, ctypes.c_int)
    for text in (found.attend, found.mistake, found.refusal):
        text.restype = ctypes.c_char_p
    found.products.restype = ctypes.c_long
    return found


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def product(a: Tensor, b: Tensor, c: Tensor) -> None:
    """float32 c `[m, n]` += bfloat16 a `[m, 2 k]` times b `[k, n, 2]`, as one product of tiles."""
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (a, b, c))
    library().product(*pointers, len(a), *b.shape[:2])


def run(
    call: AttentionCall, rule: SkipRule, geometry: BlockGeometry, *, dropped_mass: bool = True
) -> AttentionResult:
    """`backends.cpu.run` for a prefill in bfloat16, with skips.

    Raises:
        AssertionError: the tiles were used in a way that a processor would not allow.
    """
    batch, heads, q_len, head_size = call.q.shape
    kv_heads, kv_len, v_size = call.v.shape[1:]
    n_rows, n_blocks = -(-q_len // geometry.block_q), -(-kv_len // geometry.block_k)
    # Rows of K apart from each other, and NaN between them.
    *rows, apart = *call.k.shape[:3], head_size + 6
    used = math.prod(rows) * apart
    keys = torch.full((used + GUARD,), math.nan, dtype=torch.bfloat16)
    k = keys[:used].view(*rows, apart)[..., :head_size].copy_(call.k)
    # What the kernel does not write stays NaN.
    out = torch.full((batch, q_len, heads, v_size), math.nan, dtype=torch.bfloat16)
    lse = torch.full((batch, heads, q_len), math.nan)
    counts = torch.zeros(batch, heads, 2, dtype=torch.int64)
    skips = torch.zeros(batch, heads, n_rows, -(-n_blocks // 8), dtype=torch.uint8)
    dropped = torch.zeros(batch, heads, q_len)
    valid = None if call.key_valid is None else call.key_valid.contiguous()
    arguments = Call(
        *map(Strided.of, (call.q, k, call.v)),
        *map(Strided.of, (rule.log_lambda, rule.block_threshold, rule.max_dropped_mass)),
        *map(pointer, (valid, call.q_offset, call.sinks)),
        pointer(keys[used:]),
        pointer(keys) + 2 * len(keys),
        *map(pointer, (out, lse, counts, skips)),
        pointer(dropped) if dropped_mass else None,
        *(batch, heads, kv_heads, q_len, kv_len, head_size, v_size),
        0 if call.q_offset is None else len(call.q_offset),
        *(call.causal, call.window or 0, geometry.block_q, geometry.block_k),
        *(ORDERS.index(geometry.order), rule.keep_sink, call.scale, call.softcap or 0.0),
    )
    failure = library().attend(arguments)
    assert failure is None, failure.decode()
    return AttentionResult(out, lse, counts, skips, dropped if dropped_mass else None)
