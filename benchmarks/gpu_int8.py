"""Decode with an int8 copy of K on this device: that it changes no bit, and what it is worth.

    python -m benchmarks.gpu_int8          # keeps SmolLM2's own keys for `make gpu-check`

On a machine with the model that writes `.cache/gpu_keys.safetensors` (about 7 MB): what two of its
layers decode from 8192 keys. `make gpu-check` times them too where the file is; without it, its
synthetic keys alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import gpu_inputs
from benchmarks.gpu_correctness import Case, moved
from benchmarks.gpu_measure import EMULATED, Run, measure
from benchmarks.gpu_timing import HEADS, KV_HEADS, SIZE, Inputs, ours, peers
from benchmarks.table_format import HERE
from hf_sparse_attention.backends import kernel
from hf_sparse_attention.functional import attend
from hf_sparse_attention.int8_keys import Int8Keys
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

KEYS = HERE.parent / ".cache" / "gpu_keys.safetensors"
KEPT_LAYERS, KEPT_LENGTH = (9, 21), 8192
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
    if KEYS.is_file() and not EMULATED:
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
    """SmolLM2's own queries and keys, two layers as a batch, repeated to `kv_len`; head size 64."""
    kept = load_file(KEYS, device=device)
    times = kv_len // KEPT_LENGTH
    q, k = kept["q"], kept["k"].repeat(1, 1, times, 1)
    made = (q, k, torch.randn_like(k))
    runs, sparsity = dict(peers(*made, causal=False)), dict[str, float]()
    for target, log_lambda in zip((0.73, 0.9, 0.95), kept["log_lambda"].tolist(), strict=True):
        add_contestants(runs, sparsity, made, math.exp(log_lambda), f"captured, {target:.0%}")
    size = 2 * k.numel() * 2
    return measure(runs, sparsity, size=size, graphs=device == "cuda")


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
            counts = attend(call, rule, BlockGeometry(), backend).counts.sum((0, 1)).tolist()
            runs[full], sparsity[full] = run, counts[1] / counts[0]
            outs.append(run())
        assert torch.equal(*outs), f"{backend}, {name}: the copy changed the result"


def keep() -> None:
    """Writes `KEYS`: the last query, the keys, and the lambdas that skip 73, 90 and 95% of them."""
    from benchmarks.int8_decode import gaps
    from benchmarks.model_attention import capture

    layers = capture(KEPT_LENGTH, list(KEPT_LAYERS))
    q = torch.cat([layers[i][0][:, :, -1:] for i in KEPT_LAYERS]).bfloat16()
    k = torch.cat([layers[i][1] for i in KEPT_LAYERS]).bfloat16()
    group = q.shape[1] // k.shape[1]
    scaled = q.float() * q.shape[-1] ** -0.5
    found = torch.cat(
        [
            gaps(scaled[b, h * group : (h + 1) * group, 0], k[b, h].float())[0]
            for b in range(len(k))
            for h in range(k.shape[1])
        ]
    ).sort().values  # fmt: skip
    chosen = [min(found[int(s * len(found))].item(), -1e-6) for s in (0.73, 0.9, 0.95)]
    KEYS.parent.mkdir(exist_ok=True)
    save_file({"q": q, "k": k, "log_lambda": torch.tensor(chosen)}, KEYS)
    print(f"written: {KEYS}")


if __name__ == "__main__":
    with torch.inference_mode():
        keep()
