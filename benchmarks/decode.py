"""Decode: one new token against a long cache, with and without an int8 copy of K beside it.

    python -m benchmarks.decode [--rounds 15]

Against torch's SDPA with `enable_gqa`, SDPA with the GQA group folded into the query length, eager,
the kernel that never skips, and a bare read of K and V, which shows what the memory can do. Checked
and timed as in `benchmarks.cpu_attention`, on one thread; that the copy changes no bit is checked
too. The larger cache does not fit into the processor's, and other contestants run between two turns
of one. Then two threads against one, in wall time: for that the machine has to be idle.

What a case needs to read is K and V, or K and the kept share of V, or the copy and the kept share
of both: a lower bound, from which follows the rate that is reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import peers
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
from hf_sparse_attention.backends import cpu
from hf_sparse_attention.int8_keys import Int8Keys
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

SHAPES = [(32, 8, 128, 32768), (9, 3, 64, 8192)]  # query heads, key/value heads, head size, keys
SPARSITIES = (0.0, 0.5, 0.87, 0.95)
GEOMETRIES = ("64x64", "64x1")


def bare_read(k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Reads every byte of K and V and adds them up as 32-bit floats, whatever they mean."""
    x, y = (t.view(torch.float32) for t in (k, v))
    return lambda: x.sum() + y.sum()


def contestants_of(
    q: Tensor, k: Tensor, v: Tensor, copy: Int8Keys
) -> dict[str, Callable[[], Tensor]]:
    """The attentions, by name; those that skip come in pairs, without and with the copy."""
    made = {
        "sdpa": peers.sdpa(q, k, v),
        "sdpa_folded": peers.sdpa_folded(q, k, v),
        "own": own(q, k, v, SkipRule.never(), BlockGeometry()),
    }
    rule = SkipRule.blasst(LAMBDA)
    for geometry in map(BlockGeometry.from_name, GEOMETRIES):
        name = f"own blasst {geometry.name}"
        made[name] = own(q, k, v, rule, geometry)
        made[f"{name} int8 K"] = own(q, k, v, rule, geometry, copy)
    return made


def needed_bytes(name: str, k: Tensor, copy: Int8Keys, kept: dict[str, float]) -> float:
    """What a contestant cannot do without reading."""
    size = k.numel() * k.element_size()
    share = next((kept[g] for g in GEOMETRIES if f"blasst {g}" in name), 1.0)
    if "int8" in name:
        return copy.data.numel() + 2 * share * size
    return (1 + share) * size


def decode_case(
    shape: tuple[int, int, int, int], dtype: torch.dtype, sparsity: float, rounds: int
) -> dict:
    """All contestants on one cache."""
    heads, kv_heads, size, keys = shape
    q, k, v = prefill_inputs(heads, kv_heads, size, keys, dtype, sparsity)
    q = q[:, :, -1:].contiguous()
    copy = Int8Keys.of(k)
    made = contestants_of(q, k, v, copy)
    outputs = {name: f() for name, f in made.items()}
    for name in GEOMETRIES:
        assert torch.equal(outputs[f"own blasst {name}"], outputs[f"own blasst {name} int8 K"])
    call = AttentionCall(q, k, v, scale=size**-0.5)
    kept = {}
    for name in GEOMETRIES:
        counts = cpu.run(call, SkipRule.blasst(LAMBDA), BlockGeometry.from_name(name)).counts
        visited, skipped = counts.sum((0, 1)).tolist()
        kept[name] = 1 - skipped / visited
    case = {
        "name": f"decode {dtype} {heads}/{kv_heads} heads D={size} {keys} keys, "
        f"{1 - kept['64x64']:.0%} skipped",
        "phase": "decode",
        "dtype": str(dtype),
        "query_heads": heads,
        "kv_heads": kv_heads,
        "head_size": size,
        "length": keys,
        "lambda": LAMBDA,
        "low_blocks": sparsity,
        "sparsity": {name: 1 - share for name, share in kept.items()},
        "threads": 1,
        "errors": gate(q, k, v, outputs),
        "bytes": {"k": k.nbytes, "v": v.nbytes, "int8_copy": copy.data.nbytes},
    }
    if not sparsity:
        made["eager"] = peers.eager(q, k, v)
    made["bare read"] = bare_read(k, v)
    times = measure(made, rounds, 1)
    case["seconds"] = times
    case["speedup_over"] = {base: ratios(times, base) for base in ("sdpa", "sdpa_folded", "own")}
    case["needed_gb_per_s"] = {
        name: needed_bytes(name, k, copy, kept) / statistics.median(seconds) / 1e9
        for name, seconds in times.items()
    }
    show(case)
    return case


def show(case: dict) -> None:
    """Prints a case."""
    print(f"\n{case['name']}")
    for name, seconds in case["seconds"].items():
        ratio = "  ".join(
            f"{over[name]['median']:6.2f} x {base}" for base, over in case["speedup_over"].items()
        )
        rate = case["needed_gb_per_s"][name]
        milliseconds = 1e3 * statistics.median(seconds)
        print(f"  {name:24s} {milliseconds:8.2f} ms {rate:6.1f} GB/s  {ratio}", flush=True)


def two_threads(shape: tuple[int, int, int, int], dtype: torch.dtype, rounds: int) -> dict:
    """Wall time on one thread over wall time on two, in turns, at the highest sparsity."""
    q, k, v = prefill_inputs(*shape, dtype, SPARSITIES[-1])
    made = contestants_of(q[:, :, -1:].contiguous(), k, v, Int8Keys.of(k))
    made = {name: f for name, f in made.items() if "own" in name} | {"bare read": bare_read(k, v)}
    seconds: dict[str, dict[int, list[float]]] = {name: {1: [], 2: []} for name in made}
    for i in range(2 * rounds):
        for name, f in made.items():
            for threads in ((1, 2), (2, 1))[i % 2]:
                torch.set_num_threads(threads)
                start = time.perf_counter()
                f()
                seconds[name][threads].append(time.perf_counter() - start)
    speedup = {
        name: statistics.median(a / b for a, b in zip(x[1], x[2], strict=True))
        for name, x in seconds.items()
    }
    print(f"\ntwo threads over one, {dtype}: ", {k: round(x, 2) for k, x in speedup.items()})
    return {"dtype": str(dtype), "shape": shape, "seconds": seconds, "speedup": speedup}


def append_cost(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict:
    """What it takes to enter one token into the copy, and a whole prompt at first. One thread."""
    torch.set_num_threads(1)
    _, k, _ = prefill_inputs(*shape, dtype, 0.0)
    start = time.perf_counter()
    copy = Int8Keys.of(k)
    prompt = time.perf_counter() - start
    new, each = k[:, :, -1:].contiguous(), []
    for _ in range(101):
        start = time.perf_counter()
        copy.append(new, k.shape[2] - 1)
        each.append(time.perf_counter() - start)
    row = {"dtype": str(dtype), "shape": shape, "prompt_seconds": prompt}
    row["token_seconds"] = statistics.median(each)
    print(f"\nentering into the copy, {dtype}: prompt {prompt:.3f} s, token {row['token_seconds']}")
    return row


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "decode.json")
    args = parser.parse_args()
    reason = cpu.available()
    if reason:
        raise SystemExit(reason)
    results = {"machine": machine(), "rounds": args.rounds, "seed": SEED, "cases": []}
    results |= {"two_threads": [], "append": []}
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_num_threads(1)
        for shape in SHAPES:
            for sparsity in SPARSITIES:
                results["cases"].append(decode_case(shape, dtype, sparsity, args.rounds))
        results["two_threads"].append(two_threads(SHAPES[0], dtype, args.rounds))
        results["append"].append(append_cost(SHAPES[0], dtype))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten: {args.output}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
