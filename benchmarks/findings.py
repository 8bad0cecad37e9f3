"""What the papers leave open, measured on a real model's own queries, keys and values.

    python -m benchmarks.findings                  # all, about ten minutes on one thread
    python -m benchmarks.findings --only order     # one of: order, blocks, length, int8,
                                                   # certificate, budget

SmolLM2-135M-Instruct reads 2048 tokens of the bundled book (`length` reads other texts and lengths,
too). `python -m benchmarks.findings_page` writes docs/findings.md from the results.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu_attention import machine
from benchmarks.finding_blocks import (
    ORDERS,
    all_gaps,
    free_gaps,
    gaps,
    gaps_to_the_end,
    lambda_for,
    losses,
    prefill_rows,
    sink_first,
)
from benchmarks.finding_bounds import BOUNDS
from benchmarks.model_attention import capture
from benchmarks.table_format import HERE, load
from hf_sparse_attention.backends import cpu
from hf_sparse_attention.calibration.bundled import bundled
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

OUTPUT = HERE / "results" / "findings.json"
LENGTH = 2048
LAYERS = [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
BLOCKS = ("32x32", "64x32", "64x64", "64x128", "128x128", "64x1")
LAMBDAS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
Layers = dict[int, Sequence[Tensor]]


def order(layers: Layers) -> dict[str, Any]:
    """Four orders of visiting the blocks, at equal sparsity and at equal lambda."""
    geometry = BlockGeometry(64, 64)
    sorted_gaps = {name: all_gaps(layers, geometry, visit) for name, visit in ORDERS.items()}
    limit = torch.cat(
        [
            gaps_to_the_end(blocks)[:, blocks.seen].flatten()
            for layer in layers.values()
            for _, blocks in prefill_rows(layer, geometry)
        ]
    )
    targets = (0.3, 0.4, 0.5)
    rows = []
    for name, visit in ORDERS.items():
        lambdas = [lambda_for(target, sorted_gaps[name]) for target in targets]
        told = losses(layers, geometry, visit, [min(lam, 0.999) for lam in lambdas])
        at = {str(lam): _share(sorted_gaps[name], lam) for lam in (1e-3, 1e-2, 1e-1)}
        rows.append({"order": name, "lambda": lambdas, "loss": told, "sparsity_at": at})
    known = {str(lam): _share(limit, lam) for lam in (1e-3, 1e-2, 1e-1)}
    return {"targets": targets, "rows": rows, "final_max_known": known}


def _share(values: Tensor, lam: float) -> float:
    return (values < math.log(lam)).double().mean().item()


def blocks(layers: Layers) -> dict[str, Any]:
    """Sizes of blocks, each over a range of lambda."""
    rows = []
    for name in BLOCKS:
        geometry = BlockGeometry.from_name(name)
        for lam, told in zip(LAMBDAS, losses(layers, geometry, sink_first, LAMBDAS), strict=True):
            rows.append({"blocks": name, "lambda": lam, **told})
    return {"rows": rows}


def length(_: Layers) -> dict[str, Any]:
    """The lambda that gives a sparsity, over lengths and texts, in prefill.

    Of all blocks; and of those which are `free`, neither the sink nor on the diagonal.
    """
    geometry = BlockGeometry(64, 64)
    rows = []
    for kind in ("prose", "code", "needle"):
        for tokens in (512, 1024, 2048, 4096):
            layers = capture(tokens, LAYERS[1::3], bundled(kind))
            found = all_gaps(layers, geometry, sink_first), free_gaps(layers, geometry)
            lambdas, free = (
                {str(s): lambda_for(s, each) for s in (0.2, 0.3, 0.4, 0.5)} for each in found
            )
            rows.append({"text": kind, "length": tokens, "lambda": lambdas, "free": free})
            print(kind, tokens, lambdas, free, flush=True)
    return {"layers": LAYERS[1::3], "rows": rows}


def int8(layers: Layers) -> dict[str, Any]:
    """The share of the skipped blocks that a bound on the scores proves without the keys."""
    geometry = BlockGeometry(64, 64)
    lambdas = (1e-3, 1e-2, 1e-1)
    skipped = torch.zeros(len(lambdas))
    proved = {name: torch.zeros(len(lambdas)) for name in BOUNDS}
    for q, k, v in layers.values():
        group = q.shape[1] // k.shape[1]
        keys = k[0].repeat_interleave(group, 0)
        bounds = {name: bound(keys, geometry.block_k) for name, bound in BOUNDS.items()}
        for row, cut in prefill_rows((q, k, v), geometry):
            queries = (
                q[0, row.heads, row.start : row.start + geometry.block_q] * q.shape[-1] ** -0.5
            )
            visit = sink_first(cut)
            exact = gaps(cut, visit)
            m = cut.top[..., visit].cummax(-1).values
            m = torch.cat([torch.full_like(m[..., :1], -math.inf), m[..., :-1]], -1)
            for name, bound in bounds.items():
                top = bound(queries)[..., visit]
                gap = (top - m).masked_fill(cut.top[..., visit] == -math.inf, -math.inf).amax(1)
                for i, lam in enumerate(lambdas):
                    skip = exact < math.log(lam)
                    assert not (~skip & (gap < math.log(lam))).any(), f"{name} is no bound"
                    proved[name][i] += int((gap < math.log(lam)).sum())
            skipped += torch.tensor([float((exact < math.log(lam)).sum()) for lam in lambdas])
    share = {name: (count / skipped).tolist() for name, count in proved.items()}
    return {"lambdas": lambdas, "proved": share}


def certificate(layers: Layers) -> dict[str, Any]:
    """The bound on the dropped mass beside the mass that was dropped, in the native kernel."""
    rows = []
    for name in ("64x64", "64x1"):
        for lam in (1e-3, 1e-2, 1e-1):
            told = _run(layers, SkipRule.blasst(lam), name)
            rows.append({"blocks": name, "lambda": lam, **told})
    return {"rows": rows}


def budget(layers: Layers) -> dict[str, Any]:
    """What the budget rule alone skips, and what of its budget it uses."""
    rows = []
    for name in ("64x128", "64x64", "64x1"):
        for eps in (0.01, 0.02, 0.05):
            rule = SkipRule(max_dropped_mass=torch.full((1, 1), eps))
            rows.append({"blocks": name, "eps": eps, **_run(layers, rule, name)})
    return {"rows": rows}


def _run(layers: Layers, rule: SkipRule, blocks: str) -> dict[str, float]:
    """One rule in the native kernel; true masses come from lse, kept against all."""
    geometry = BlockGeometry.from_name(blocks)
    true, bound, errors, counts = [], [], [], torch.zeros(2, dtype=torch.int64)
    for q, k, v in layers.values():
        call = AttentionCall(q, k, v, scale=q.shape[-1] ** -0.5)
        exact = cpu.run(call, SkipRule.never(), geometry)
        got = cpu.run(call, rule, geometry, return_dropped_mass=True)
        counts += got.counts.sum((0, 1))
        true.append((-torch.expm1((got.lse - exact.lse).double())).clamp(min=0).abs().flatten())
        bound.append(got.dropped_mass.double().flatten())
        errors.append(((got.out - exact.out).norm() / exact.out.norm()).item())
    dropped, most = torch.cat(true), torch.cat(bound)
    told = {"sparsity": (counts[1] / counts[0]).item(), "error": sum(errors) / len(errors)}
    for what, values in (("dropped", dropped), ("bound", most)):
        told |= {f"{what}_mean": values.mean().item(), f"{what}_max": values.max().item()}
        told |= {f"{what}_p{p}": values.quantile(p / 100).item() for p in (50, 99)}
    # lse in float32 cannot tell less than about 1e-6.
    seen = dropped > 1e-4
    told["ratio_p50"] = (most[seen] / dropped[seen]).median().item() if seen.any() else math.nan
    return told


EXPERIMENTS: dict[str, Callable[[Layers], dict[str, Any]]] = {
    each.__name__: each for each in (order, blocks, length, int8, certificate, budget)
}


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    args = parser.parse_args()
    result, about = load(OUTPUT.name), {"tokens": LENGTH, "layers": LAYERS, "machine": machine()}
    with torch.inference_mode():
        layers = {} if args.only == ["length"] else capture(LENGTH, LAYERS)
        for name in args.only:
            began = time.perf_counter()
            told = EXPERIMENTS[name](layers)
            result[name] = about | told | {"seconds": time.perf_counter() - began}
            OUTPUT.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name}: {result[name]['seconds']:.0f} s, in {OUTPUT}", flush=True)


if __name__ == "__main__":
    main()
