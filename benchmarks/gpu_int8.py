"""Decode with an int8 copy of K on this device: that it changes no bit, and what it is worth.

Groups of `make gpu-check`, on synthetic keys and, where they were carried along, on SmolLM2's own
(gpu_captured.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_captured, gpu_inputs
from benchmarks.gpu_correctness import Case, moved
from benchmarks.gpu_measure import EMULATED, Run, measure
from benchmarks.gpu_timing import HEADS, KV_HEADS, SIZE, Inputs, ours, peers
from hf_sparse_attention.backends import kernel
from hf_sparse_attention.functional import attend
from hf_sparse_attention.int8_keys import Int8Keys
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

SPARSITIES = (0.9,) if EMULATED else (0.73, 0.9, 0.95)
LENGTHS = (200,) if EMULATED else (65536, 131072)

#: batch, query heads, key/value heads, queries, keys, head size, dtype, geometry, features
SMALL: dict[str, tuple] = {
    "bfloat16": (1, 32, 8, 1, 16384, 128, torch.bfloat16, "64x64", {}),
    "odd length, float16": (2, 12, 4, 1, 33333, 64, torch.float16, "64x64", {}),
    "64x128": (1, 32, 8, 1, 16385, 128, torch.bfloat16, "64x128", {}),
    "float32, head size 80": (1, 8, 8, 1, 16384, 80, torch.float32, "64x64", {}),
    "4 positions, padded": (2, 16, 8, 4, 16384, 64, torch.bfloat16, "64x64", {"padded": True}),
    "window, sinks": (1, 16, 8, 1, 20000, 64, torch.bfloat16, "64x64", {"window": 9000}),
    "static cache": (1, 16, 8, 2, 20000, 64, torch.bfloat16, "64x64", {"offset": 15000}),
    "head size 256": (1, 8, 4, 1, 16384, 256, torch.bfloat16, "64x64", {}),
}
EMULATED_SMALL = {"bfloat16": (1, 4, 2, 1, 200, 16, torch.bfloat16, "64x64", {})}


def small_cases(device: str) -> list[Case]:
    """Every case in every backend: the same bits with the copy, and K unread where it may be."""
    cases = EMULATED_SMALL if device == "cpu" else SMALL
    return [
        (f"int8 K, {backend}: {name}", lambda name=name, b=backend: small(device, cases[name], b))
        for backend in ours()
        for name in cases
    ]


def small(device: str, case: tuple, backend: str) -> dict[str, Any]:
    """The same bits with and without; and with NaN in the keys that need not be read."""
    if device == "cpu":  # emulated: there no cache is too small for a copy
        kernel.load("universal").triton_kernels.prove.LEAST_KEY_BYTES = 0
    batch, heads, kv_heads, q_len, kv_len, size, dtype, geometry_name, features = case
    geometry = BlockGeometry.from_name(geometry_name)
    shape = (batch, heads, kv_heads, q_len, kv_len, size)
    tensors = gpu_inputs.make(
        *shape, sparsity=0.8, dtype=dtype, device=device, block=geometry.block_k
    )
    call = AttentionCall(*tensors, scale=size**-0.5, window=features.get("window"))
    if features.get("padded"):
        valid = torch.ones(batch, kv_len, dtype=torch.bool)
        valid[0, : kv_len // 4 + 3] = False
        call = moved(AttentionCall(**{**vars(call), "key_valid": valid}), device)
    if "offset" in features:
        offset = torch.tensor([features["offset"]], device=device)
        call = AttentionCall(**{**vars(call), "q_offset": offset})
        call.k[:, :, features["offset"] + q_len :] = math.nan
    if "window" in features:
        call = AttentionCall(**{**vars(call), "sinks": torch.randn(heads, device=device)})
    rule = SkipRule(log_lambda=torch.full((1, 1), math.log(gpu_inputs.LAMBDA), device=device))
    copied = AttentionCall(**{**vars(call), "int8_keys": Int8Keys.of(call.k).data})
    want, got = (attend(x, rule, geometry, backend, return_skips=True) for x in (call, copied))
    for name in ("out", "lse", "counts", "skips"):
        assert torch.equal(getattr(want, name), getattr(got, name)), f"{name} differs"
    assert got.out.isfinite().all()
    visited, skipped = got.counts.sum((0, 1)).tolist()
    return {
        "sparsity": skipped / visited,
        "unread": unread(copied, rule, geometry, backend, want.out),
    }


def unread(
    call: AttentionCall, rule: SkipRule, geometry: BlockGeometry, backend: str, want: Tensor
) -> bool:
    """Whether the result is the same with NaN in every low key but those of the newest blocks.

    False is no error: a kernel may give up the copy where that does not pay.
    """
    low = call.k[..., 0] < -1
    low[:, :, : geometry.block_k] = False
    last = int(call.q_offset[0]) if call.q_offset is not None else call.k.shape[2]
    low[:, :, last - 2 * geometry.block_k :] = False
    call.k[low] = math.nan
    return torch.equal(attend(call, rule, geometry, backend).out, want)


def decode_cases(device: str) -> list[Case]:
    """Synthetic keys at 64K and 128K, and captured ones repeated to as many."""
    cases: list[Case] = [
        (f"decode with int8 K, 1 x {n}", lambda n=n: synthetic(device, n)) for n in LENGTHS
    ]
    if gpu_captured.layers():
        cases += [
            (f"decode with int8 K, captured, 1 x {n}", lambda n=n: captured(device, n))
            for n in LENGTHS
        ]
    return cases


def synthetic(device: str, kv_len: int) -> dict[str, Any]:
    """Batch 1, bfloat16, head size 128; each backend with and without the copy."""
    runs: dict[str, Run] = {}
    sparsity: dict[str, float] = {}
    for s in (0.0, *SPARSITIES):
        made = gpu_inputs.make(1, HEADS, KV_HEADS, 1, kv_len, SIZE, sparsity=s, device=device)
        if not s:
            runs |= peers(*made, causal=False)
            continue
        add_contestants(runs, sparsity, made, gpu_inputs.LAMBDA, f"{s:.0%} low")
    size = 2 * KV_HEADS * kv_len * SIZE * 2
    return measure(runs, sparsity, size=size, graphs=device == "cuda")


def captured(device: str, kv_len: int) -> dict[str, Any]:
    """SmolLM2's own last query, keys and values, layers as a batch, repeated to `kv_len` keys."""
    layers = [gpu_captured.load(layer, device) for layer in gpu_captured.layers()]
    q, k, v = (torch.cat(x) for x in zip(*layers, strict=True))
    times = max(1, kv_len // k.shape[2])
    made = (q[:, :, -1:], k.repeat(1, 1, times, 1), v.repeat(1, 1, times, 1))
    runs, sparsity = dict(peers(*made, causal=False)), dict[str, float]()
    for share in SPARSITIES:
        add_contestants(runs, sparsity, made, lambda_for(share, made), f"captured, {share:.0%}")
    size = made[1].nbytes + made[2].nbytes
    return measure(runs, sparsity, size=size, graphs=device == "cuda")


def lambda_for(share: float, made: Inputs) -> float:
    """The smallest lambda below 1 that skips `share` of the blocks, as far as any does."""
    low, high = -40.0, 0.0
    for _ in range(20):
        middle = (low + high) / 2
        if skipped_share(made, middle, ours()[0]) < share:
            low = middle
        else:
            high = middle
    return math.exp(min(high, -1e-6))


def skipped_share(made: Inputs, log_lambda: float, backend: str) -> float:
    """Of the blocks that the last position visits."""
    q, k, v = made
    rule = SkipRule(log_lambda=torch.full((1, 1), log_lambda, device=q.device))
    call = AttentionCall(q, k, v, scale=q.shape[-1] ** -0.5)
    visited, skipped = attend(call, rule, BlockGeometry(), backend).counts.sum((0, 1)).tolist()
    return skipped / visited


def add_contestants(
    runs: dict[str, Run], sparsity: dict[str, float], made: Inputs, lam: float, name: str
) -> None:
    """Ours without the copy and with it, whose results must be the same."""
    q, k, v = made
    rule = SkipRule(log_lambda=torch.full((1, 1), math.log(lam), device=q.device))
    copy = Int8Keys.of(k).data
    for backend in ours():
        outs = []
        for data, more in ((None, ""), (copy, ", int8 K")):
            call = AttentionCall(q, k, v, scale=q.shape[-1] ** -0.5, int8_keys=data)

            def run(call: AttentionCall = call, backend: str = backend) -> Tensor:
                return attend(call, rule, BlockGeometry(), backend).out.transpose(1, 2)

            full = f"{backend} 64x64, {name}{more}"
            runs[full], sparsity[full] = run, skipped_share(made, math.log(lam), backend)
            outs.append(run())
        assert torch.equal(*outs), f"{backend}, {name}: the copy changed the result"
