"""Prefill on the CPU against torch's SDPA, eager, what else is installed, and our own dense self.

    python -m benchmarks.cpu_attention [--threads 1] [--lengths 4096 8192] [--rounds 7]

Correctness comes first: no time is taken of an output that is not right. Then the contestants of a
case take turns, round by round, and what is reported is the median over the rounds of each round's
ratio, so that a machine which slows down for a while slows all of them down. With one thread the
time is the process's CPU time, with several it is wall time. One JSON file holds inputs, versions,
machine and every single time; cases that a run leaves out stay as they are in it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import peak, peers
from hf_sparse_attention.backends import cpu
from hf_sparse_attention.int8_keys import Int8Keys
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

HERE = Path(__file__).parent
SEED = 0
SPARSITIES = (0.5, 0.87, 0.95)
LAMBDA = 1e-3
#: Dense output may be off by this many times the error that the dtype itself makes.
GATE = 8.0


def prefill_inputs(
    heads: int, kv_heads: int, size: int, length: int, dtype: torch.dtype, sparsity: float
) -> list[Tensor]:
    """Random q, k, v in which about `sparsity` of the 64-key blocks lie far below the others."""
    torch.manual_seed(SEED)
    q, k, v = (torch.randn(1, n, length, size) for n in (heads, kv_heads, kv_heads))
    if sparsity:
        blocks = -(-length // 64)
        strong = torch.arange(blocks) % 100 * 61 % 100 >= 100 * sparsity  # spread evenly
        strong[0] = True
        q[..., 0], k[..., 0] = 8.0, 0.0
        k[..., 0] = 16.0 * strong.repeat_interleave(64)[:length] * (size / 64) ** 0.5
    return [x.to(dtype) for x in (q, k, v)]


def own(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: SkipRule,
    geometry: BlockGeometry,
    copy: Int8Keys | None = None,
) -> Callable[[], Tensor]:
    """The kernel, as `[B, Hq, Lq, D]` like its peers."""
    data = None if copy is None else copy.data
    call = AttentionCall(q, k, v, scale=q.shape[-1] ** -0.5, int8_keys=data)
    return lambda: cpu.run(call, rule, geometry).out.transpose(1, 2)


def gate(q: Tensor, k: Tensor, v: Tensor, outputs: dict[str, Tensor]) -> dict[str, float]:
    """Each output's error at sampled rows against float64, in units of the dtype's own error.

    Raises:
        AssertionError: an output is wrong.
    """
    group = q.shape[1] // k.shape[1]
    offset = k.shape[2] - q.shape[2]
    rows = torch.linspace(0, q.shape[2] - 1, min(q.shape[2], 32)).long()
    keys, values = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q[:, :, rows].double() @ keys.transpose(2, 3) * q.shape[-1] ** -0.5
    hidden = torch.arange(k.shape[2]) > (rows + offset)[:, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    exact = weights @ values
    # What rounding the weights and the output to the dtype, and the scores to float32, does.
    relative = torch.finfo(q.dtype).eps + torch.finfo(torch.float32).eps * scores.abs().max().item()
    unit = relative * (weights @ values.abs()).max().item()
    errors = {
        name: (out[:, :, rows].double() - exact).abs().max().item() / unit
        for name, out in outputs.items()
    }
    # lambda bounds the mass that skipping drops: at most lambda for each key.
    allowed = GATE + LAMBDA * k.shape[2] * exact.abs().max().item() / unit
    for name, error in errors.items():
        limit = allowed if "blasst" in name else GATE
        assert error <= limit, f"{name}: error {error:.1f} units, allowed {limit:.1f}"
    return errors


def measure(
    contestants: dict[str, Callable[[], Tensor]], rounds: int, threads: int
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, each round starting with another one."""
    clock = time.process_time if threads == 1 else time.perf_counter
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = clock()
            contestants[name]()
            times[name].append(clock() - start)
    return times


def ratios(times: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """How many times faster than `base` each contestant is: median and quartiles."""
    result = {}
    for name, own_times in times.items():
        each = [b / t for b, t in zip(times[base], own_times, strict=True)]
        low, median, high = statistics.quantiles(each, n=4)
        result[name] = {"median": median, "low": low, "high": high}
    return result


def report(case: dict, times: dict[str, list[float]], work: float, unit: str) -> None:
    """Completes `case` and prints it."""
    bases = [name for name in ("sdpa", "sdpa_folded", "own") if name in times]
    case["seconds"] = times
    case["speedup_over"] = {base: ratios(times, base) for base in bases}
    case["rate"] = {name: work / statistics.median(t) / 1e9 for name, t in times.items()}
    case["rate_unit"] = unit
    print(f"\n{case['name']}, {case['threads']} thread(s)")
    for name in times:
        shown = "  ".join(
            f"{case['speedup_over'][base][name]['median']:6.2f} x {base}" for base in bases
        )
        print(f"  {name:20s} {case['rate'][name]:8.1f} {unit}  {shown}", flush=True)


def prefill_case(size: int, length: int, dtype: torch.dtype, rounds: int) -> list[dict]:
    """Dense causal prefill against its peers, then the kernel at each sparsity against SDPA."""
    heads = kv_heads = 8 if length <= 4096 else 2  # so that a round stays within seconds
    cases = []
    for sparsity in (0.0, *SPARSITIES):
        q, k, v = prefill_inputs(heads, kv_heads, size, length, dtype, sparsity)
        contestants = {"sdpa": peers.sdpa(q, k, v)}
        contestants["own"] = own(q, k, v, SkipRule.never(), BlockGeometry())
        absent = {}
        if length == 4096 and not sparsity:
            for name in ("eager", "flex", "openvino", "onnxruntime"):
                made = peers.PEERS[name](q, k, v)
                if isinstance(made, str):
                    absent[name] = made
                else:
                    contestants[name] = made
        rule = SkipRule.blasst(LAMBDA)
        for geometry in map(BlockGeometry.from_name, ("64x64", "64x128", "64x1")):
            contestants[f"own blasst {geometry.name}"] = own(q, k, v, rule, geometry)
        call = AttentionCall(q, k, v, scale=size**-0.5)
        visited, skipped = cpu.run(call, rule, BlockGeometry()).counts.sum((0, 1)).tolist()
        case = {
            "name": f"prefill {dtype} D={size} {length} tokens, {skipped / visited:.0%} skipped",
            "phase": "prefill",
            "dtype": str(dtype),
            "query_heads": heads,
            "kv_heads": kv_heads,
            "head_size": size,
            "length": length,
            "lambda": LAMBDA,
            "low_blocks": sparsity,
            "sparsity_64x64": skipped / visited,
            "threads": torch.get_num_threads(),
            "absent": absent,
            "errors": gate(q, k, v, {name: f() for name, f in contestants.items()}),
        }
        times = measure(contestants, rounds, case["threads"])
        # Two products of 2 * D each for every visible pair.
        report(case, times, 4 * heads * size * length * (length + 1) / 2, "GFLOP/s (dense)")
        cases.append(case)
    return cases


def machine() -> dict:
    """What the numbers were taken on."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("model name", "cpu family", "model\t"))
    ]
    a = torch.randn(2048, 2048)
    peaks = {}
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        x = a.to(dtype)
        times = measure({"mm": lambda x=x: x @ x}, 5, 1)["mm"]
        peaks[str(dtype)] = 2 * 2048**3 / min(times) / 1e9
    big = torch.randn(2**26)
    times = measure({"sum": big.sum}, 5, 1)["sum"]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False
    )
    kernel = cpu.load_kernel()
    return {
        "cpu": sorted(set(names)),
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "level": kernel.cpu_level(),
        "kernel": kernel.__name__,
        "peak_gflops_one_thread": peak.peaks(),
        "mm_gflops_one_thread": peaks,
        "read_gb_per_s_one_thread": big.numel() * 4 / min(times) / 1e9,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peers": {name: _version(name) for name in ("openvino", "onnxruntime")},
        "commit": commit.stdout.strip(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="of the heads")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "prefill.json")
    args = parser.parse_args()
    reason = cpu.available()
    if reason:
        raise SystemExit(reason)
    path: Path = args.output
    results: dict = json.loads(path.read_text()) if path.exists() else {"cases": []}
    results |= {"machine": machine(), "rounds": args.rounds, "seed": SEED}
    inputs = itertools.product(args.threads, args.dtype, args.sizes, args.lengths)
    for threads, dtype, size, length in inputs:
        torch.set_num_threads(threads)
        cases = prefill_case(size, length, getattr(torch, dtype), args.rounds)
        for case in cases:
            case |= {name: results["machine"][name] for name in ("kernel", "time")}
        fresh = [_inputs_of(case) for case in cases]
        kept = [case for case in results["cases"] if _inputs_of(case) not in fresh]
        results["cases"] = sorted(kept + cases, key=_inputs_of)
        path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten: {path}")


def _inputs_of(case: dict) -> tuple:
    names = ("threads", "dtype", "head_size", "length", "low_blocks")
    return tuple(case[name] for name in names)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
