"""What calibrating costs: a pass that observes all geometries against a plain dense one.

    python -m benchmarks.calibration_cost [--lengths 2048 8192] [--dtype bfloat16] [--rounds 3]

SmolLM2-135M-Instruct reads the beginning of the bundled book: with transformers' sdpa, with this
package's kernel that skips nothing, and watched as `calibrate` watches it. They take turns; what
is reported is the median over the rounds of each round's ratio of wall times. The hidden states of
a watched pass, which must be those of a dense one, gate the comparison. Memory is measured in a
process of its own, on one layer's attention: by how much it raises the peak of the resident set.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.cpu_attention import machine
from benchmarks.end_to_end import BOOK, HERE, use
from examples.demo_model import smollm2
from hf_sparse_attention.calibration.api import DEFAULT_LEVELS
from hf_sparse_attention.calibration.attach import attached
from hf_sparse_attention.calibration.observation import DEFAULT_GEOMETRIES, Observations

MEMORY_LENGTHS = [2048, 8192, 32768]
MEMORY_SCRIPT = """
import sys, torch
from benchmarks.memory import added_kib
from hf_sparse_attention.calibration.api import DEFAULT_LEVELS
from hf_sparse_attention.calibration.observation import DEFAULT_GEOMETRIES, Observations
from hf_sparse_attention.types import AttentionCall

name, dtype, length = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])

def call(length):
    q, k, v = (torch.randn(1, heads, length, 64).to(dtype) for heads in (9, 3, 3))
    return AttentionCall(q, k, v, scale=0.125)

told = Observations(DEFAULT_GEOMETRIES, DEFAULT_LEVELS)

def attend(call):
    if name == "sdpa":
        return torch.nn.functional.scaled_dot_product_attention(
            call.q, call.k, call.v, is_causal=True, enable_gqa=True
        )
    return told.observe(0, call)

attend(call(256))
told = Observations(DEFAULT_GEOMETRIES, DEFAULT_LEVELS)
inputs = call(length)
added = added_kib(lambda: attend(inputs))
state = sum(x.nbytes for x in told.state_dict().values()) if name != "sdpa" else 0
print(added, state // 1024)
"""


def passes(model: PreTrainedModel, length: int) -> dict[str, Callable[[], AbstractContextManager]]:
    """What is compared: name to what the model is put under."""

    def dense(name: str) -> AbstractContextManager:
        use(model, name, length)
        return nullcontext()

    return {
        "sdpa": lambda: dense("sdpa"),
        "own": lambda: dense("no skipping"),
        "calibrating": lambda: attached(model, Observations(DEFAULT_GEOMETRIES, DEFAULT_LEVELS)),
    }


def compare(model: PreTrainedModel, ids: torch.Tensor, rounds: int) -> dict[str, Any]:
    """All passes over `ids`, in turns, after one round that warms up and gates."""
    seconds: dict[str, list[float]] = {}
    exact = None
    for i in range(rounds + 1):
        for name, under in passes(model, ids.shape[1]).items():
            with under():
                start = time.perf_counter()
                hidden = model.model(ids, use_cache=False).last_hidden_state
                spent = time.perf_counter() - start
            if i > 0:
                seconds.setdefault(name, []).append(spent)
                continue
            exact = hidden if exact is None else exact
            error = ((hidden - exact).norm() / exact.norm()).item()
            assert error < 0.1, f"{name}: off by {error:.1e}"
    over = {
        base: [a / b for a, b in zip(seconds["calibrating"], seconds[base], strict=True)]
        for base in ("sdpa", "own")
    }
    row = {
        "dtype": str(model.dtype),
        "length": ids.shape[1],
        "seconds": seconds,
        "cost_over": {base: statistics.median(each) for base, each in over.items()},
    }
    print(row, flush=True)
    return row


def memory(dtypes: list[str], lengths: list[int]) -> list[dict[str, Any]]:
    """KiB that one layer's attention adds to the peak, and that its observations keep."""
    rows = []
    for dtype in dtypes:
        for length in lengths:
            for name in ("sdpa", "calibrating"):
                command = [sys.executable, "-c", MEMORY_SCRIPT, name, dtype, str(length)]
                done = subprocess.run(
                    command, capture_output=True, text=True, cwd=HERE.parent, check=True
                )
                peak, kept = map(int, done.stdout.split())
                row = {"dtype": dtype, "name": name, "length": length, "kib": peak}
                rows.append({**row, "kept_kib": kept})
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "calibration_cost.json")
    args = parser.parse_args()
    folder = smollm2()
    tokens = AutoTokenizer.from_pretrained(folder)(BOOK.read_text(), return_tensors="pt").input_ids
    threads = torch.get_num_threads()
    result: dict[str, Any] = {
        "machine": machine(),
        "threads": threads,
        "model": "SmolLM2-135M-Instruct",
        "geometries": [geometry.name for geometry in DEFAULT_GEOMETRIES],
        "levels": list(DEFAULT_LEVELS),
        "rounds": args.rounds,
        "rows": [],
    }
    torch.set_num_threads(threads)
    for name in args.dtype:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, name))
        for length in args.lengths:
            ids = tokens[:, 1000 : 1000 + length]
            result["rows"].append(compare(model, ids, args.rounds))
    result["memory"] = memory(args.dtype, MEMORY_LENGTHS)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {args.output}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
