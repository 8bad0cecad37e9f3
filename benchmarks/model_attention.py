"""Attention on a real model's own queries, keys and values: time against SDPA, beside the error.

    python -m benchmarks.model_attention [--length 8192] [--layers 2 9 16 23] [--rounds 3]

SmolLM2-135M-Instruct reads the bundled book in float32; what its layers hand to their attention
function is kept, and cast to each dtype. The error of an output is its distance from SDPA's in
float32 on the same inputs, relative to the length of that: |out - exact| / |exact| over a layer.
Times are summed over the layers, in each round.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from benchmarks import peers
from benchmarks.cpu_attention import HERE, gate, machine, measure, own, ratios
from benchmarks.end_to_end import BOOK
from examples.demo_model import smollm2
from hf_sparse_attention.backends import cpu
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

LAMBDAS = {"64x64": (1e-3, 1e-2, 3e-2, 1e-1), "64x1": (1e-4, 1e-3, 3e-3, 1e-2)}


def capture(length: int, layers: list[int], text: str = "") -> dict[int, tuple[Tensor, ...]]:
    """q, k, v of `layers` in float32, as the model makes them of `text`, or of the book."""
    found: dict[int, tuple[Tensor, ...]] = {}

    def record(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, _mask: Any, **_: Any):
        if module.layer_idx in layers:
            found[module.layer_idx] = tuple(x.contiguous() for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("record", record)
    folder = smollm2()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="record"
    )
    tokens = AutoTokenizer.from_pretrained(folder)(
        text or BOOK.read_text(), return_tensors="pt", truncation=True, max_length=1000 + length
    ).input_ids
    model(tokens[:, 1000 : 1000 + length], use_cache=False, logits_to_keep=1)
    return found


def compare(
    inputs: dict[int, tuple[Tensor, ...]], dtype: torch.dtype, rounds: int
) -> list[dict[str, Any]]:
    """Every contestant, with sparsity, error and speed over the layers."""
    settings = {"own": (SkipRule.never(), BlockGeometry())} | {
        f"own blasst {name}, lambda {lam}": (SkipRule.blasst(lam), BlockGeometry.from_name(name))
        for name, lams in LAMBDAS.items()
        for lam in lams
    }
    rows: dict[str, dict[str, Any]] = {
        name: {"name": name, "dtype": str(dtype), "errors": {}, "sparsity": {}}
        for name in ("sdpa", *settings)
    }
    total: dict[str, list[float]] = {name: [0.0] * rounds for name in rows}
    for layer, tensors in inputs.items():
        q, k, v = (x.to(dtype) for x in tensors)
        exact = peers.sdpa(q.float(), k.float(), v.float())()
        call = AttentionCall(q, k, v, scale=q.shape[-1] ** -0.5)
        contestants = {"sdpa": peers.sdpa(q, k, v)}
        for name, (rule, geometry) in settings.items():
            contestants[name] = own(q, k, v, rule, geometry)
            visited, skipped = cpu.run(call, rule, geometry).counts.sum((0, 1)).tolist()
            rows[name]["sparsity"][layer] = skipped / visited
        gate(q, k, v, {name: contestants[name]() for name in ("sdpa", "own")})
        for name, attend in contestants.items():
            error = (attend().float() - exact).norm() / exact.norm()
            rows[name]["errors"][layer] = error.item()
        times = measure(contestants, rounds, torch.get_num_threads())
        for name, each in times.items():
            total[name] = [a + b for a, b in zip(total[name], each, strict=True)]
    speed = ratios(total, "sdpa")
    for name, row in rows.items():
        row["seconds"] = total[name]
        row["speedup_over_sdpa"] = speed[name]
        errors = list(row["errors"].values())
        row["mean_error"], row["worst_error"] = sum(errors) / len(errors), max(errors)
        shares = list(row["sparsity"].values()) or [0.0]
        row["mean_sparsity"] = sum(shares) / len(shares)
        print(
            f"{dtype} {name:32s} {speed[name]['median']:6.2f} x sdpa  skipped "
            f"{row['mean_sparsity']:5.1%}  error {row['mean_error']:.4f}, "
            f"worst {row['worst_error']:.4f}",
            flush=True,
        )
    return list(rows.values())


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 9, 16, 23])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "model_attention.json")
    args = parser.parse_args()
    inputs = capture(args.length, args.layers)
    result = {
        "machine": machine(),
        "model": "SmolLM2-135M-Instruct",
        "text": BOOK.name,
        "length": args.length,
        "layers": args.layers,
        "threads": args.threads,
        "rounds": args.rounds,
    }
    torch.set_num_threads(args.threads)
    result["rows"] = [
        row for name in args.dtype for row in compare(inputs, getattr(torch, name), args.rounds)
    ]
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {args.output}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
