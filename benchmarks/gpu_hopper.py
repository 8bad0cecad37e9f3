"""Whether the versions of Hopper's kernels are right that `gpu_correctness` does not reach.

It asks for the certificate, and so for the general version of prefill; models do not, and run the
others. And decode fetches V by what it expects, through rings as deep as there is room for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks import gpu_inputs
from benchmarks.gpu_correctness import (
    RULES,
    Case,
    kernel_checks,
    moved,
    on_cpu,
    rule_on,
    small_call,
)
from hf_sparse_attention.functional import attend

VARIABLE = "HF_SPARSE_ATTENTION_EXPECTED_SPARSITY"

#: As in gpu_correctness: batch, heads, key/value heads, queries, keys, head size, dtype, geometry.
CASES: dict[str, tuple] = {
    "float16": (1, 2, 1, 200, 200, 64, torch.float16, "64x128", {}),
    "six blocks": (1, 4, 2, 700, 700, 128, torch.bfloat16, "64x128", {}),
    "chunk": (1, 2, 2, 256, 484, 128, torch.bfloat16, "64x128", {}),
    "padded": (2, 4, 1, 500, 700, 128, torch.bfloat16, "64x128", {"padded": True}),
    "window": (1, 2, 1, 500, 500, 64, torch.bfloat16, "64x128", {"window": 150}),
    "64x64": (1, 4, 1, 700, 700, 128, torch.bfloat16, "64x64", {}),
    "padded, 64x64": (2, 4, 1, 500, 700, 64, torch.float16, "64x64", {"padded": True}),
    "head size 256": (1, 2, 1, 300, 300, 256, torch.bfloat16, "64x64", {}),
    # By how many thread blocks there are: each has a multiprocessor for itself, or not.
    "decode, few": (1, 8, 2, 1, 3000, 128, torch.bfloat16, "64x64", {}),
    "decode, many": (16, 8, 2, 1, 1500, 128, torch.bfloat16, "64x64", {}),
    "decode of 4, padded": (2, 4, 1, 4, 900, 64, torch.float16, "64x64", {"padded": True}),
    "decode, 64x128": (1, 16, 1, 1, 1500, 128, torch.bfloat16, "64x128", {}),
    "decode, head size 256": (1, 2, 1, 1, 900, 256, torch.bfloat16, "64x64", {}),
}
#: Rule and expected sparsity, by which V is streamed, or fetched on demand.
VERSIONS = (("never", "0"), ("blasst", "0"), ("blasst", "1"), ("bsfa", "0"), ("bsfa", "1"))


def small_cases(device: str) -> list[Case]:
    """Every case in every version."""
    return [
        (
            f"sm_90a: {name}, {rule}, expecting {share}",
            lambda name=name, rule=rule, share=share: small(device, name, rule, share),
        )
        for name in CASES
        for rule, share in VERSIONS
    ]


def small(device: str, name: str, rule_name: str, share: str) -> dict[str, Any]:
    """One case by the tests' oracle.

    Which wants the certificate too: it is that of a second run, if the decisions are the same.
    """
    call, geometry = small_call(CASES[name], "cuda")
    there, rule = moved(call, device), rule_on(device, rule_name)
    with gpu_inputs.variables(**{VARIABLE: share}):
        bare = on_cpu(attend(there, rule, geometry, "cuda", return_skips=True))
    full = on_cpu(
        attend(there, rule, geometry, "cuda", return_skips=True, return_dropped_mass=True)
    )
    assert bare.skips is not None
    assert full.skips is not None
    assert torch.equal(bare.skips, full.skips), "decisions differ with and without certificate"
    bare = replace(bare, dropped_mass=full.dropped_mass)
    kernel_checks.check(call, RULES[rule_name], geometry, bare, weights_dtype=call.q.dtype)
    visited, skipped = bare.counts.sum((0, 1)).tolist()
    row = {"visited": visited, "skipped": skipped, "same_bits": torch.equal(bare.out, full.out)}
    if call.phase == "decode":  # the arithmetic is sm_80's; another compiler run might round apart
        with gpu_inputs.variables(HF_SPARSE_ATTENTION_CUDA_LEVEL="sm_80"):
            other = on_cpu(attend(there, rule, geometry, "cuda", return_skips=True))
        for what in ("out", "skips"):
            same = torch.equal(getattr(other, what), getattr(bare, what))
            row[f"same_{what}_as_sm_80"] = same
    return row
