"""Forward and backward of the native kernel against torch's SDPA, dense and by sparsity.

    python -m benchmarks.training_attention [--lengths 2048 4096] [--rounds 7]

A training step's attention: the output, and from a given gradient of it those of q, k and v. Inputs
and the interleaving are those of `cpu_attention`. No time is taken before the gradients were
compared with float64's: the blocks that are skipped hold less than exp(-10) of the mass, so they
must be as good as SDPA's own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cpu_attention import (
    HERE,
    LAMBDA,
    SEED,
    SPARSITIES,
    machine,
    measure,
    prefill_inputs,
    report,
)
from hf_sparse_attention.functional import attend
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

SHAPES = [(9, 3, 64), (8, 8, 128)]  # query heads, key/value heads, head size
#: A gradient's relative error may be this many times SDPA's.
GATE = 2.0

Gradients = tuple[Tensor, Tensor, Tensor]


def forward_only(inputs: list[Tensor], run: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """The output as a model in training computes it, with all that its backward needs."""
    return lambda: run(*inputs)


def step(inputs: list[Tensor], dout: Tensor, run: Callable[..., Tensor]) -> Callable[[], Gradients]:
    """Forward and backward: `run` gives `[B, Hq, L, D]`."""
    return lambda: torch.autograd.grad(run(*inputs), inputs, dout)


def own(rule: SkipRule, geometry: BlockGeometry) -> Callable[..., Tensor]:
    """The native kernel as a function of q, k, v."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call = AttentionCall(q, k, v, scale=q.shape[-1] ** -0.5)
        return attend(call, rule, geometry, "cpu").out.transpose(1, 2)

    return run


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's SDPA with gradients."""
    return peers.sdpa(q, k, v)()


def gate(exact: Gradients, gradients: dict[str, Gradients]) -> dict[str, list[float]]:
    """Relative errors (Euclidean norm) of dQ, dK and dV.

    Raises:
        AssertionError: an error is more than `GATE` times SDPA's.
    """
    errors = {
        name: [
            ((mine.double() - true).norm() / true.norm()).item()
            for mine, true in zip(made, exact, strict=True)
        ]
        for name, made in gradients.items()
    }
    for name, made in errors.items():
        for which, error, peer in zip("qkv", made, errors["sdpa"], strict=True):
            assert error <= GATE * peer, f"{name}: d{which} is off by {error:.1e}, SDPA {peer:.1e}"
    return errors


def case(
    shape: tuple[int, int, int], length: int, dtype: torch.dtype, sparsity: float, rounds: int
) -> dict:
    """SDPA, the kernel that never skips and the kernel that does, at one sparsity."""
    heads, kv_heads, size = shape
    inputs = prefill_inputs(heads, kv_heads, size, length, dtype, sparsity)
    dout = torch.randn(inputs[0].shape).to(dtype)
    rule, geometry = SkipRule.blasst(LAMBDA), BlockGeometry()
    call = AttentionCall(*inputs, scale=size**-0.5)
    visited, skipped = attend(call, rule, geometry, "cpu").counts.sum((0, 1)).tolist()
    exact_inputs = [x.double().requires_grad_() for x in inputs]
    exact = step(exact_inputs, dout.double(), sdpa)()
    for x in inputs:
        x.requires_grad_()
    runs = {"sdpa": sdpa, "own": own(SkipRule.never(), geometry)}
    for name in ("64x64", "64x1"):
        runs[f"own blasst {name}"] = own(rule, BlockGeometry.from_name(name))
    steps = {name: step(inputs, dout, run) for name, run in runs.items()}
    case = {
        "name": f"forward + backward {dtype} {heads}/{kv_heads} heads D={size} {length} tokens, "
        f"{skipped / visited:.0%} skipped",
        "phase": "training",
        "dtype": str(dtype),
        "query_heads": heads,
        "kv_heads": kv_heads,
        "head_size": size,
        "length": length,
        "lambda": LAMBDA,
        "sparsity_64x64": skipped / visited,
        "threads": torch.get_num_threads(),
        "errors": gate(exact, {name: f() for name, f in steps.items()}),
    }
    forwards = {f"{name}, forward": forward_only(inputs, run) for name, run in runs.items()}
    times = measure(steps | forwards, rounds, case["threads"])
    case["forward_seconds"] = {name: times.pop(f"{name}, forward") for name in runs}
    # Two products forward, five backward, of 2 * D each for every visible pair.
    report(case, times, 14 * heads * size * length * (length + 1) / 2, "GFLOP/s (dense)")
    return case


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "training_attention.json")
    args = parser.parse_args()
    results = {"machine": machine(), "rounds": args.rounds, "seed": SEED, "cases": []}
    for threads in args.threads:
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            for shape in SHAPES:
                for length in args.lengths:
                    for sparsity in (0.0, *SPARSITIES):
                        made = case(shape, length, dtype, sparsity, args.rounds)
                        results["cases"].append(made)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
