"""The sm_90a kernels on the CPU: their own source, under the emulator of `kernel_hub`."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, SkipRule

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "kernel_hub" / "block-skip-attention" / "csrc_cuda"
EMULATOR = ROOT / "kernel_hub" / "emulator"
ORDERS = {"ascending": 0, "sink_diagonal": 1, "descending": 2}


class Strided(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("batch", "head", "row")
    ]

    @classmethod
    def of(cls, x: Tensor | None) -> Strided:
        """A `[batch, head, row, ...]` tensor; dimensions of size 1 get stride 0."""
        if x is None:
            return cls()
        steps = [0 if n == 1 else step for n, step in zip(x.shape, x.stride(), strict=True)]
        return cls(x.data_ptr(), *steps[:3], *[0] * (3 - x.dim()))


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Params(ctypes.Structure):
    """The struct of params.h."""

    _fields_ = [
        *_fields(Strided, "q k v"),
        *_fields(ctypes.c_int32, "dtype B Hq Hkv group Lq Lk D Dv block_q block_k NQ NK"),
        *_fields(ctypes.c_float, "scale softcap"),
        *_fields(ctypes.c_int32, "causal window order keep_sink"),
        *_fields(Strided, "log_lambda threshold budget"),
        *_fields(ctypes.c_void_p, "sinks valid requests out lse counts skips dropped"),
        *_fields(ctypes.c_int32, "skip_bytes splits split_blocks"),
        *_fields(ctypes.c_void_p, "splits_seen partial_out partial_sums"),
        *_fields(ctypes.c_void_p, "int8_keys"),
        *_fields(ctypes.c_int32, "int8_chunks int8_width"),
        *_fields(ctypes.c_void_p, "open_blocks"),  # which the runner makes room for
    ]


class Rings(ctypes.Structure):
    """Those of sm90/decode.cuh: 2^bits slots for K and for V; of two blocks, how many skipped."""

    _fields_ = [
        ("key_bits", ctypes.c_int32),
        ("value_bits", ctypes.c_int32),
        ("skipped_before", ctypes.c_float),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, compiled with g++ for this process."""
    target = Path(tempfile.mkdtemp(prefix="sm90-")) / "kernel.so"
    flags = "-std=c++20 -O2 -U_FORTIFY_SOURCE -Wall -Wno-unknown-pragmas -Werror -shared -fPIC"
    command = ["g++", *flags.split(), "-DBSA_EMULATE", f"-I{EMULATOR}", f"-I{SOURCES}"]
    runner = Path(__file__).with_name("sm90_runner.cpp")
    subprocess.run([*command, str(runner), "-o", str(target)], check=True)
    found = ctypes.CDLL(str(target))
    found.prefill.argtypes = (ctypes.POINTER(Params), ctypes.c_char_p)
    found.decode.argtypes = (ctypes.POINTER(Params), ctypes.POINTER(Rings))
    found.prefill.restype = found.decode.restype = ctypes.c_char_p
    found.params_bytes.restype = ctypes.c_size_t
    found.version.argtypes = found.skipped_before.argtypes = (
        ctypes.POINTER(Params),
        ctypes.c_float,
    )
    found.skipped_before.restype = ctypes.c_float
    assert found.params_bytes() == ctypes.sizeof(Params), "Params above is not params.h's"
    return found


def requests(call: AttentionCall) -> Tensor | None:
    """First valid key, length, column of query row 0, and nothing: int32 `[B, 4]`."""
    if call.key_valid is None and call.q_offset is None:
        return None
    batch, q_len, kv_len = len(call.q), call.q.shape[2], call.k.shape[2]
    found = torch.zeros(batch, 4, dtype=torch.int32)
    for b in range(batch):
        columns = range(kv_len)
        if call.key_valid is not None:
            columns = call.key_valid[b].nonzero().flatten().tolist()
        first, end = (columns[0], columns[-1] + 1) if len(columns) else (0, 0)
        offset = kv_len - q_len
        if call.q_offset is not None:
            offset = int(call.q_offset.expand(batch)[b])
        found[b] = torch.tensor([first, end - first, offset - first, 0])
    return found


def run(
    call: AttentionCall,
    rule: SkipRule,
    geometry: BlockGeometry,
    version: str,
    seed: int = 0,
    *,
    dropped_mass: bool | None = None,
) -> AttentionResult:
    """Computes a prefill with one `version` of the kernel: dense, always, demand or general."""
    if dropped_mass is None:
        dropped_mass = version == "general"
    problem = _Problem(call, rule, geometry, dropped_mass)
    os.environ["BSA_EMULATOR_SEED"] = str(seed)
    failure = library().prefill(problem.params, version.encode())
    assert failure is None, failure.decode()
    return problem.result


def decode(
    call: AttentionCall,
    rule: SkipRule,
    geometry: BlockGeometry,
    rings: Rings | None,
    seed: int = 0,
) -> AttentionResult:
    """Computes a decode with `rings`; with None, by the kernel of sm_80.

    With an int8 copy of K there is no certificate, which would need what is not read.
    """
    problem = _Problem(call, rule, geometry, dropped_mass=call.int8_keys is None)
    os.environ["BSA_EMULATOR_SEED"] = str(seed)
    failure = library().decode(problem.params, rings)
    assert failure is None, failure.decode()
    return problem.result


def version(
    call: AttentionCall, rule: SkipRule, geometry: BlockGeometry, expected_sparsity: float
) -> str:
    """The version of prefill that would run, as `run` takes it."""
    problem = _Problem(call, rule, geometry, dropped_mass=False)
    number: int = library().version(problem.params, expected_sparsity)
    return ("dense", "always", "demand", "general")[number]


def skipped_before(
    call: AttentionCall, rule: SkipRule, geometry: BlockGeometry, expected_sparsity: float
) -> float:
    """`Rings.skipped_before` of a decode."""
    problem = _Problem(call, rule, geometry, dropped_mass=False)
    found: float = library().skipped_before(problem.params, expected_sparsity)
    return found


class _Problem:
    """A call as the kernels get it, and the results they write."""

    def __init__(
        self, call: AttentionCall, rule: SkipRule, geometry: BlockGeometry, dropped_mass: bool
    ) -> None:
        batch, heads, q_len, head_size = call.q.shape
        kv_heads, kv_len, v_size = call.v.shape[1:]
        decodes = call.phase == "decode"
        n_rows, voters = (q_len, kv_heads) if decodes else (-(-q_len // 64), heads)
        n_blocks = -(-kv_len // geometry.block_k)
        skip_bytes = -(-n_blocks // 8)
        split_blocks = n_blocks
        if geometry.order == "sink_diagonal":
            split_blocks = min(max(geometry.split_k // geometry.block_k, 1), n_blocks)
        splits = -(-n_blocks // split_blocks) if decodes else 1
        # What the kernels do not write stays NaN.
        out = torch.full((batch, q_len, heads, v_size), math.nan, dtype=call.q.dtype)
        lse = torch.full((batch, heads, q_len), math.nan)
        counts = torch.zeros((batch, heads, 2), dtype=torch.int64)
        skips = torch.zeros(batch * voters * n_rows * skip_bytes + 4, dtype=torch.uint8)
        dropped = torch.full((batch, heads, q_len), math.nan) if dropped_mass else None
        partial = (batch, heads, q_len, splits)
        partial_out, partial_sums = (torch.full((*partial, n), math.nan) for n in (v_size, 4))
        request = requests(call)
        valid = None if call.key_valid is None else call.key_valid.contiguous()
        chunks = 0 if call.int8_keys is None else call.int8_keys.shape[2] - 1
        sinks = None if call.sinks is None else call.sinks.float().contiguous()
        rules = [rule.log_lambda, rule.block_threshold, rule.max_dropped_mass]
        rules = [None if x is None else x.float() for x in rules]

        def pointer(x: Tensor | None) -> int | None:
            return None if x is None else x.data_ptr()

        self.params = Params(
            *map(Strided.of, (call.q, call.k, call.v)),
            {torch.float16: 0, torch.bfloat16: 1}[call.q.dtype],
            *(batch, heads, kv_heads, heads // kv_heads, q_len, kv_len, head_size, v_size),
            *(64, geometry.block_k, n_rows, n_blocks),
            *(call.scale, call.softcap or 0.0),
            *(call.causal, call.window or 0, ORDERS[geometry.order], rule.keep_sink),
            *map(Strided.of, rules),
            *map(pointer, (sinks, valid, request, out, lse, counts, skips, dropped)),
            *(skip_bytes, splits, split_blocks, None),
            *map(pointer, (partial_out, partial_sums)),
            pointer(call.int8_keys),
            *(chunks, -(-head_size // 4) * 4),
        )
        self.held = (call, rules, sinks, valid, request, partial_out, partial_sums)
        bits = skips[:-4].reshape(batch, voters, n_rows, skip_bytes)
        self.result = AttentionResult(out, lse, counts, bits, dropped)
