"""Inputs of a real model for `make gpu-check`: what SmolLM2-135M hands to its attention.

    python -m benchmarks.gpu_captured [--length 8192] [--layers 9 16]

writes them, in bfloat16, to build/gpu_check/smollm2.safetensors (31 MB), which no version control
knows: it is made where the model is, and carried to the machine with the GPU, which needs neither
model nor internet. There, each layer is a case: checked like the other large ones, then timed
against the same peers, at head size 64 with 9 query heads on 3.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import gpu_correctness, gpu_timing
from benchmarks.gpu_measure import EMULATED, Run, measure
from hf_sparse_attention.functional import attend
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

ROOT = Path(__file__).resolve().parents[1]
FILE = Path(
    os.environ.get("GPU_CHECK_CAPTURED") or ROOT / "build" / "gpu_check" / "smollm2.safetensors"
)
LAMBDAS = (1e-3, 1e-2, 1e-1)


def layers() -> list[str]:
    """The layers in the file, if there is one."""
    if not FILE.is_file():
        return []
    with safe_open(FILE, "pt") as file:
        names = file.keys()  # no dict
        return sorted({name.partition(".")[0] for name in names}, key=int)


def load(layer: str, device: str) -> gpu_timing.Inputs:
    """Q, k and v of a layer: `[1, heads, length, head size]`."""
    with safe_open(FILE, "pt", device=device) as file:
        q, k, v = (file.get_tensor(f"{layer}.{x}") for x in "qkv")
    if EMULATED:
        q, k, v = (x[:, :, :200].contiguous() for x in (q, k, v))
    return q, k, v


def cases(device: str) -> list[gpu_correctness.Case]:
    """Prefill and the last token's decode, layer by layer."""
    if not layers():
        reason = f"no {FILE.name}: python -m benchmarks.gpu_captured makes it"
        return [("captured", lambda: {"left_out": reason})]
    return [
        (f"captured {phase}, layer {layer}", lambda run=run, layer=layer: run(device, layer))
        for phase, run in (("prefill", prefill), ("decode", decode))
        for layer in layers()
    ]


def prefill(device: str, layer: str) -> dict[str, Any]:
    q, k, v = load(layer, device)
    flops = 2 * q.shape[1] * q.shape[2] ** 2 * q.shape[3] * 2 / 2
    return compare(q, k, v, flops=flops)


def decode(device: str, layer: str) -> dict[str, Any]:
    q, k, v = load(layer, device)
    size = k.nbytes + v.nbytes
    return compare(q[:, :, -1:], k, v, size=size, graphs=device == "cuda")


def compare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **work: Any) -> dict[str, Any]:
    """Ours under each lambda and the peers: times, sparsity, and the error that skipping causes.

    The error is that of the whole output, relative to its length. First, each of our outputs is
    checked in float64: its decisions (in prefill), and its numbers over the blocks it kept.
    """
    causal = q.shape[2] > 1
    call = AttentionCall(q, k, v, scale=q.shape[-1] ** -0.5)
    runs: dict[str, Run] = gpu_timing.peers(q, k, v, causal=causal)
    exact = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).float()
    sparsity, errors = {}, {}
    for backend in gpu_timing.ours():
        for lam in LAMBDAS:
            rule = SkipRule(log_lambda=torch.full((1, 1), lam, device=q.device).log())
            result = attend(call, rule, BlockGeometry(), backend, return_skips=True)
            gpu_correctness.check_rows(call, result, float(rule.log_lambda))
            name = f"{backend} 64x64, lambda {lam:g}"
            runs[name] = gpu_timing.own(q, k, v, BlockGeometry(), backend, rule)
            visited, skipped = result.counts.sum((0, 1)).tolist()
            sparsity[name] = skipped / visited
            out = result.out.transpose(1, 2).float()
            errors[name] = ((out - exact).norm() / exact.norm()).item()
    return {**measure(runs, sparsity, **work), "errors": errors}


def main() -> None:
    """The command line: see the module's docstring."""
    from benchmarks.model_attention import capture

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--layers", type=int, nargs="+", default=[9, 16])
    args = parser.parse_args()
    with torch.inference_mode():
        found = capture(args.length, args.layers)
    tensors = {
        f"{layer}.{name}": x.bfloat16().clone()
        for layer, qkv in found.items()
        for name, x in zip("qkv", qkv, strict=True)
    }
    FILE.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, FILE.with_suffix(".tmp"))
    FILE.with_suffix(".tmp").replace(FILE)
    print(f"written: {FILE}")


if __name__ == "__main__":
    main()
