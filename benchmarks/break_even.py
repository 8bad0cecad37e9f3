"""From which length and sparsity on skipping pays, and the native kernel at all.

    python -m benchmarks.break_even [--lengths 16 64 256 1024] [--rounds 7]

Calls as a model makes them, through the package's own dispatch, at short lengths: torch's SDPA
(backend "dense"), the kernel that never skips, and the kernel with a BLASST rule at several shares
of blocks that it can skip. `settings.DEFAULT_MIN_LENGTH` and `functional.KERNEL_MIN_LENGTH` are set
from what this finds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.cpu_attention import HERE, LAMBDA, SEED, gate, machine, prefill_inputs, ratios
from hf_sparse_attention.functional import attend
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

SHAPES = [(9, 3, 64), (32, 8, 128)]  # query heads, key/value heads, head size
SPARSITIES = (0.0, 0.25, 0.5, 0.87)
LENGTHS = [16, 32, 64, 128, 256, 512, 1024, 2048]
#: A timing holds as many calls as fit into this.
SECONDS = 0.004


def calls(
    shape: tuple[int, int, int], phase: str, length: int, dtype: torch.dtype
) -> dict[str, Callable[[], torch.Tensor]]:
    """Every contestant, after its output was checked, by name; and how much each skips."""
    contestants: dict[str, Callable[[], torch.Tensor]] = {}
    for share in SPARSITIES:
        q, k, v = prefill_inputs(*shape, length, dtype, share)
        q = q[:, :, -1:].contiguous() if phase == "decode" else q
        call = AttentionCall(q, k, v, scale=shape[2] ** -0.5)
        made = {}
        if not share:
            made["sdpa"] = (SkipRule.never(), "dense")
            made["own"] = (SkipRule.never(), "cpu")
        made[f"own blasst, {share:.0%} of the blocks low"] = (SkipRule.blasst(LAMBDA), "cpu")
        new = {
            name: lambda call=call, rule=rule, backend=backend: (
                attend(call, rule, BlockGeometry(), backend).out
            )
            for name, (rule, backend) in made.items()
        }
        gate(q, k, v, {name: f().transpose(1, 2) for name, f in new.items()})
        contestants |= new
    return contestants


def seconds_a_call(contestants: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """In turns; as many calls in a row as make a timing long enough to trust."""
    repeats = {}
    for name, f in contestants.items():
        start = time.perf_counter()
        f()
        repeats[name] = max(1, int(SECONDS / (time.perf_counter() - start)))
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, f in contestants.items():
            start = clock()
            for _ in range(repeats[name]):
                f()
            times[name].append((clock() - start) / repeats[name])
    return times


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "break_even.json")
    args = parser.parse_args()
    results = {"machine": machine(), "rounds": args.rounds, "seed": SEED, "cases": []}
    torch.set_num_threads(args.threads)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            for phase in ("prefill", "decode"):
                for length in args.lengths:
                    times = seconds_a_call(calls(shape, phase, length, dtype), args.rounds)
                    case = {
                        "phase": phase,
                        "dtype": str(dtype),
                        "query_heads": shape[0],
                        "kv_heads": shape[1],
                        "head_size": shape[2],
                        "length": length,
                        "lambda": LAMBDA,
                        "threads": args.threads,
                        "seconds": times,
                        "speedup_over": {base: ratios(times, base) for base in ("sdpa", "own")},
                    }
                    results["cases"].append(case)
                    shown = "  ".join(
                        f"{r['median']:5.2f}" for r in case["speedup_over"]["sdpa"].values()
                    )
                    print(f"{phase} {dtype} {shape} {length:5d}  {shown}", flush=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {args.output}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
