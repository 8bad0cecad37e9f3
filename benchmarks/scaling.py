"""How the kernel's cost grows: with the length, in memory, with threads; and its share of the peak.

    python -m benchmarks.scaling [--lengths 1024 4096 16384 65536] [--rounds 3] [--parts growth]

Synthetic keys of which 87% of the 64-key blocks lie far below the others; head size 64. Long inputs
have fewer heads (8 up to 8K tokens, 2 at 16K, 1 beyond), so that a run stays within minutes; rates
are per floating-point operation, so the cases compare. Memory is measured in a process of its own:
by how much a call raises the peak of its resident set, its output included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import peak, peers
from benchmarks.cpu_attention import (
    HERE,
    LAMBDA,
    SEED,
    gate,
    machine,
    measure,
    own,
    prefill_inputs,
    ratios,
)
from hf_sparse_attention.types import BlockGeometry, SkipRule

SIZE = 64
SPARSITY = 0.87
LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768, 65536]
PARTS = ["share_of_peak", "two_threads", "memory", "growth"]
MEMORY_LENGTHS = [4096, 16384, 65536]
MEMORY_SCRIPT = """
import sys, torch
from benchmarks import peers
from benchmarks.cpu_attention import own
from benchmarks.memory import added_kib
from hf_sparse_attention.types import BlockGeometry, SkipRule

name, dtype, length = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)

def prepare(length):
    q, k, v = (torch.randn(1, 1, length, 64, dtype=dtype) for _ in range(3))
    if name == "sdpa":
        return peers.sdpa(q, k, v)
    return own(q, k, v, SkipRule.blasst(1e-3), BlockGeometry.from_name(name))

with torch.inference_mode():
    prepare(256)()  # what every first call costs
    print(added_kib(prepare(length)))
"""


def heads_at(length: int) -> int:
    """How many heads keep a call of this length short."""
    return 8 if length <= 8192 else 2 if length <= 16384 else 1


def growth(dtypes: list[str], lengths: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    """SDPA, dense and skipping at each length."""
    for name, length in itertools.product(dtypes, lengths):
        dtype, heads = getattr(torch, name), heads_at(length)
        q, k, v = prefill_inputs(heads, heads, SIZE, length, dtype, SPARSITY)
        contestants = {"sdpa": peers.sdpa(q, k, v)}
        contestants["own"] = own(q, k, v, SkipRule.never(), BlockGeometry())
        for geometry in ("64x64", "64x1"):
            made = own(q, k, v, SkipRule.blasst(LAMBDA), BlockGeometry.from_name(geometry))
            contestants[f"own blasst {geometry}"] = made
        errors = gate(q, k, v, {name: f() for name, f in contestants.items()})
        times = measure(contestants, rounds, 1)
        case = {
            "dtype": str(dtype),
            "length": length,
            "heads": heads,
            "errors": errors,
            "seconds": times,
            "gflops_dense": rate(times["own"], heads, SIZE, length),
            "speedup_over": {base: ratios(times, base) for base in ("sdpa", "own")},
        }
        shown = {n: round(r["median"], 2) for n, r in case["speedup_over"]["sdpa"].items()}
        print(f"{dtype} {length} tokens, {heads} heads: {shown}", flush=True)
        yield case


def _inputs_of(case: dict[str, Any]) -> tuple[str, int]:
    return case["dtype"], case["length"]


def rate(times: list[float], heads: int, size: int, length: int) -> float:
    """GFLOP/s: two products of 2 * D each for every visible pair."""
    return 4 * heads * size * length * (length + 1) / 2 / statistics.median(times) / 1e9


def share_of_peak(rounds: int) -> list[dict[str, Any]]:
    """Dense prefill at 4K against multiply-adds alone, in turns: neither picks its best moment."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for size in (64, 128):
            q, k, v = prefill_inputs(8, 8, size, 4096, dtype, 0.0)
            dense = own(q, k, v, SkipRule.never(), BlockGeometry())
            shares, rates = [], []
            for _ in range(rounds):
                most = peak.peaks(rounds=1)
                if isinstance(most, str) or str(dtype) not in most:
                    return rows
                times = measure({"own": dense}, 1, 1)["own"]
                rates.append(rate(times, 8, size, 4096))
                shares.append(rates[-1] / most[str(dtype)])
            rows.append(
                {
                    "dtype": str(dtype),
                    "head_size": size,
                    "gflops": statistics.median(rates),
                    "share": statistics.median(shares),
                }
            )
            print(f"share of the peak: {rows[-1]}", flush=True)
    return rows


def two_threads(rounds: int) -> list[dict[str, Any]]:
    """One thread against two, in turns, and what the machine itself wins with its second core.

    A core may be slower when its neighbour works, and the memory may serve one as fast as two: the
    controls are multiply-adds on registers, and summing up a tensor far larger than any cache.
    """
    big = torch.ones(2**26)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for phase, shape, length in (
            ("prefill", (8, 8, 64), 4096),
            ("prefill", (8, 8, 128), 4096),
            ("decode", (32, 8, 128), 32768),
        ):
            q, k, v = prefill_inputs(*shape, length, dtype, 0.0)
            q = q[:, :, -1:].contiguous() if phase == "decode" else q
            attend = own(q, k, v, SkipRule.never(), BlockGeometry())
            each = [
                {
                    "own": _wall(1, attend) / _wall(2, attend),
                    "multiply_adds": _wall(1, lambda: peak.multiply_adds(1))
                    / _wall(2, lambda: peak.multiply_adds(2)),
                    "reading": _wall(1, big.sum) / _wall(2, big.sum),
                    "cpu_time": _cpu(2, attend) / _cpu(1, attend),
                }
                for _ in range(3 * rounds)
            ]
            row: dict[str, Any] = {"dtype": str(dtype), "phase": phase, "head_size": shape[2]}
            row |= {"length": length, "rounds": each}
            row["median"] = {name: statistics.median(x[name] for x in each) for name in each[0]}
            rows.append(row)
            print(f"two threads: {dtype} {phase} D={shape[2]} {row['median']}", flush=True)
    torch.set_num_threads(1)
    return rows


def _wall(threads: int, call: Callable[[], object]) -> float:
    torch.set_num_threads(threads)
    call()  # wakes the threads
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cpu(threads: int, call: Callable[[], object]) -> float:
    torch.set_num_threads(threads)
    call()
    start = time.process_time()
    call()
    return time.process_time() - start


def memory(lengths: list[int]) -> list[dict[str, Any]]:
    """KiB that a call of one head adds to the peak of the resident set, its output included."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        for name in ("sdpa", "64x64", "64x1"):
            for length in lengths:
                command = [sys.executable, "-c", MEMORY_SCRIPT, name, dtype, str(length)]
                done = subprocess.run(
                    command, capture_output=True, text=True, cwd=HERE.parent, check=True
                )
                rows.append(
                    {"dtype": dtype, "name": name, "length": length, "kib": int(done.stdout)}
                )
                print(f"memory: {rows[-1]}", flush=True)
    return rows


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=PARTS, help="the others stay as they are")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="of growth")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "scaling.json")
    args = parser.parse_args()
    result: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    here = machine()
    result |= {"machine": here, "rounds": args.rounds, "seed": SEED}
    made = {part: {"kernel": here["kernel"], "time": here["time"]} for part in args.parts}
    result["parts"] = result.get("parts", {}) | made
    result |= {"head_size": SIZE, "low_blocks": SPARSITY, "lambda": LAMBDA}
    torch.set_num_threads(1)
    if "share_of_peak" in args.parts:
        result["share_of_peak"] = share_of_peak(args.rounds)
    if "two_threads" in args.parts:
        result["two_threads"] = two_threads(args.rounds)
    if "memory" in args.parts:
        result["memory"] = memory([n for n in MEMORY_LENGTHS if n <= max(args.lengths)])
    if "growth" in args.parts:
        for case in growth(args.dtype, args.lengths, args.rounds):
            others = [x for x in result.get("growth", []) if _inputs_of(x) != _inputs_of(case)]
            result["growth"] = sorted([*others, case], key=_inputs_of)
            args.output.write_text(json.dumps(result, indent=1) + "\n")
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {args.output}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
