"""Whether our backends for GPUs, `triton` and `cuda`, are right on this device.

Small cases against the float64 oracle of the tests; large ones against float64 on the device, for
sampled block rows: every decision of the row, and its numbers over the blocks that it kept.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_inputs
from hf_sparse_attention.backends import BACKENDS
from hf_sparse_attention.functional import attend
from hf_sparse_attention.types import (
    AttentionCall,
    AttentionResult,
    BlockGeometry,
    SkipRule,
    unpack_bits,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the oracle lives with the tests

import gradient_checks
import kernel_checks

Case = tuple[str, Callable[[], dict[str, Any]]]

RULES = {
    "never": SkipRule.never(),
    "blasst": SkipRule.blasst(0.6),
    "bsfa": SkipRule.bsfa(6.0),
    "budget": SkipRule.budget(20.0),
}
#: name: batch, query heads, key/value heads, queries, keys, head size, dtype, geometry, features
SMALL: dict[str, tuple] = {
    "prefill float32": (1, 2, 1, 200, 200, 64, torch.float32, "64x64", {}),
    "prefill bfloat16": (1, 4, 2, 300, 300, 128, torch.bfloat16, "64x128", {}),
    "prefill float16": (1, 4, 2, 300, 300, 64, torch.float16, "64x64", {}),
    "chunk, padded": (2, 2, 2, 150, 333, 80, torch.bfloat16, "64x64", {"padded": True}),
    "window": (1, 2, 1, 300, 300, 64, torch.float32, "64x64", {"window": 90}),
    "softcap, sinks": (1, 2, 1, 200, 200, 96, torch.bfloat16, "64x64", {"with_sinks": True}),
    "head size 256": (1, 1, 1, 130, 130, 256, torch.bfloat16, "64x64", {}),
    "head size 128, float32": (1, 1, 1, 130, 130, 128, torch.float32, "64x128", {}),
    "decode": (2, 8, 2, 1, 700, 128, torch.bfloat16, "64x64", {}),
    "decode of 3, padded": (2, 4, 2, 3, 700, 64, torch.float32, "64x128", {"padded": True}),
}


def small_cases(device: str) -> list[Case]:
    """Every small case under every rule, with gradients."""
    return _small_cases(device, "triton")


def small_cuda_cases(device: str) -> list[Case]:
    """The same of the CUDA kernels: forward only, and in 16 bits."""
    return _small_cases(device, "cuda")


def small_sm80_cases(device: str) -> list[Case]:
    """Those again on Hopper, without the kernels made for it."""

    def without_sm90(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        with gpu_inputs.variables(HF_SPARSE_ATTENTION_CUDA_LEVEL="sm_80"):
            return run()

    cases = [
        (name, run)
        for name, run in _small_cases(device, "cuda")
        if name.endswith(("never", "blasst"))
    ]
    return [(f"sm_80 {name}", lambda run=run: without_sm90(run)) for name, run in cases]


def _small_cases(device: str, backend: str) -> list[Case]:
    return [
        (
            f"{backend}: {name}, {rule}",
            lambda name=name, rule=rule: small(device, name, rule, backend),
        )
        for name in SMALL
        for rule in RULES
    ]


def small(device: str, name: str, rule_name: str, backend: str) -> dict[str, Any]:
    """One small case: forward, decisions, certificate and gradients by the tests' oracle."""
    call, geometry = small_call(SMALL[name], backend)
    there = moved(call, device)
    leaves = {x: getattr(there, x).detach() for x in ("q", "k", "v")}
    if there.sinks is not None:
        leaves["sinks"] = there.sinks.detach()
    if backend == "triton":
        leaves = {x: leaf.requires_grad_() for x, leaf in leaves.items()}
    result = attend(
        AttentionCall(**{**vars(there), **leaves}),
        rule_on(device, rule_name),
        geometry,
        backend,
        return_skips=True,
        return_dropped_mass=True,
    )
    here = on_cpu(result)
    kernel_checks.check(call, RULES[rule_name], geometry, here, weights_dtype=call.q.dtype)
    if backend == "triton":
        dout = torch.randn_like(here.out)
        result.out.backward(dout.to(device))
        gradients = {n: leaf.grad.cpu() for n, leaf in leaves.items() if leaf.grad is not None}
        gradient_checks.check(call, geometry, here, gradients, dout, torch.zeros_like(here.lse))
    visited, skipped = here.counts.sum((0, 1)).tolist()
    return {"visited": visited, "skipped": skipped}


def small_call(case: tuple, backend: str) -> tuple[AttentionCall, BlockGeometry]:
    """A small case, on the CPU."""
    batch, heads, kv_heads, q_len, kv_len, size, dtype, geometry_name, features = case
    torch.manual_seed(7)
    geometry = BlockGeometry(*map(int, geometry_name.split("x")), split_k=128)
    q, k = kernel_checks.structured("needle", batch, heads, kv_heads, q_len, kv_len, size)
    v = torch.randn(batch, kv_heads, kv_len, size)
    options: dict[str, Any] = {"window": features.get("window")}
    if features.get("padded"):
        options["key_valid"] = torch.ones(batch, kv_len, dtype=torch.bool)
        options["key_valid"][0, : kv_len // 4] = False
        options["key_valid"][-1, -kv_len // 8 :] = False
    if features.get("with_sinks"):
        options |= {"sinks": torch.randn(heads), "softcap": 8.0}
    if backend == "cuda" and dtype == torch.float32:
        dtype = torch.bfloat16
    tensors = (q.to(dtype), k.to(dtype), v.to(dtype))
    return AttentionCall(*tensors, scale=size**-0.5, **options), geometry


def rule_on(device: str, name: str) -> SkipRule:
    found = (None if x is None else x.to(device) for x in conditions(RULES[name]))
    return SkipRule(*found)


def on_cpu(result: AttentionResult) -> AttentionResult:
    tensors = (result.out, result.lse, result.counts, result.skips, result.dropped_mass)
    return AttentionResult(*(None if x is None else x.detach().cpu() for x in tensors))


def conditions(rule: SkipRule) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return rule.log_lambda, rule.block_threshold, rule.max_dropped_mass


def moved(call: AttentionCall, device: str) -> AttentionCall:
    """The call with its tensors on `device`."""
    return AttentionCall(
        **{n: x.to(device) if torch.is_tensor(x) else x for n, x in vars(call).items()}
    )


#: batch, query heads, key/value heads, queries, keys, sparsity
LARGE = {
    "prefill 8K": (1, 32, 8, 8192, 8192, 0.5),
    "prefill 32K": (1, 8, 2, 32768, 32768, 0.75),
    "prefill 128K": (1, 2, 1, 131072, 131072, 0.9),
    "chunk of 2K before 64K": (2, 8, 2, 2048, 65536, 0.75),
    "decode 32K": (8, 32, 8, 1, 32768, 0.75),
    "decode 128K": (2, 32, 8, 1, 131072, 0.75),
}
EMULATED_LARGE = {"prefill": (1, 1, 1, 200, 200, 0.5)}


def large_cases(device: str) -> list[Case]:
    return _large_cases(device, "triton")


def large_cuda_cases(device: str) -> list[Case]:
    return _large_cases(device, "cuda")


def _large_cases(device: str, backend: str) -> list[Case]:
    shapes = EMULATED_LARGE if device == "cpu" else LARGE
    return [
        (f"{backend}: {name}", lambda shape=shape: large(device, backend, *shape))
        for name, shape in shapes.items()
    ]


def large(
    device: str,
    backend: str,
    batch: int,
    heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    sparsity: float,
) -> dict[str, Any]:
    """One large case under BLASST, in bfloat16 at head size 128: some of its rows in float64."""
    q, k, v = gpu_inputs.make(
        batch, heads, kv_heads, q_len, kv_len, 128, sparsity=sparsity, device=device
    )
    call = AttentionCall(q, k, v, scale=128**-0.5)
    geometry = BlockGeometry()
    log_lambda = math.log(gpu_inputs.LAMBDA)
    rule = SkipRule(log_lambda=torch.full((1, 1), log_lambda, device=device))
    result = attend(call, rule, geometry, backend, return_skips=True)
    visited, skipped = result.counts.sum((0, 1)).tolist()
    worst = check_rows(call, result, log_lambda)
    return {"sparsity": skipped / visited, "error_over_allowed": worst}


def check_rows(call: AttentionCall, result: AttentionResult, log_lambda: float) -> float:
    """Some block rows of some heads, under 64x64; returns their worst error over what is allowed.

    Raises:
        AssertionError: a decision or a number is not what it has to be.
    """
    worst = 0.0
    heads, q_len = call.q.shape[1:3]
    decode = call.phase == "decode"
    rows = 1 if decode else 64
    chosen = torch.linspace(0, -(-q_len // rows) - 1, 5).long().unique().tolist()
    for i in chosen:
        for head in {0, heads // 2, heads - 1}:
            error = row_error(call, result, i, head, log_lambda, rows, decode)
            worst = max(worst, error)
    assert worst <= 1.0, f"out is off by {worst:.2f} times what rounding explains"
    return worst


def row_error(
    call: AttentionCall,
    result: AttentionResult,
    i: int,
    head: int,
    log_lambda: float,
    rows: int,
    decode: bool,
) -> float:
    """The largest error of block row `i` of `head` in the last request, over what is allowed.

    Raises:
        AssertionError: a decision is not the exact one, outside of the band of rounding.
    """
    kv_len, size = call.k.shape[2:]
    group = call.group
    voters = slice(head // group * group, (head // group + 1) * group)
    heads = voters if decode else slice(head, head + 1)
    at = slice(i * rows, min((i + 1) * rows, call.q.shape[2]))
    q = call.q[-1, heads, at].double().flatten(0, 1)
    k, v = (x[-1, head // group].double() for x in (call.k, call.v))
    scores = q @ k.T * call.scale
    position = torch.arange(kv_len - call.q.shape[2], kv_len, device=q.device)[at]
    position = position.repeat(len(q) // len(position))
    column = torch.arange(kv_len, device=q.device)
    scores = scores.masked_fill(column > position[:, None], -math.inf)
    blocks = -(-kv_len // 64)
    padded = torch.nn.functional.pad(scores, (0, -kv_len % 64), value=-math.inf)
    block_max = padded.unflatten(1, (blocks, 64)).amax(-1)  # [rows, NK]
    voter = head // group if decode else head
    skipped = unpack_bits(result.skips[-1, voter, i], blocks)
    u = 2.0**-24
    error = (size + 12) * u * abs(call.scale) * (q.abs() @ k.abs().T).amax(1)
    if not decode:
        check_decisions(block_max, skipped, position // 64, log_lambda, 2 * error + 8 * u)
    kept = scores.masked_fill(skipped.repeat_interleave(64)[:kv_len], -math.inf)
    weights = kept.softmax(-1)
    exact = weights @ v
    out = result.out[-1, at, heads].transpose(0, 1).double().flatten(0, 1)
    # As in the tests' oracle: scores, exponentials and sums in float32, weights in the dtype.
    relative = (error + 16 * u + (kv_len + 8) * u)[:, None]
    eps = torch.finfo(call.q.dtype).eps / 2
    allowed = (2 * relative + eps) * (weights @ v.abs()) + eps * exact.abs() + 1e-30
    return ((out - exact).abs() / allowed).max().item()


def check_decisions(
    block_max: Tensor, skipped: Tensor, diagonal: Tensor, log_lambda: float, band: Tensor
) -> None:
    """BLASST in prefill: `m_new - m < log_lambda` for all rows, sink and diagonal first.

    With lambda < 1 the running max is that of all blocks visited so far, kept or not.
    """
    blocks = block_max.shape[1]
    low, high = int(diagonal.min()), int(diagonal.max()) + 1
    order = [0, *range(max(low, 1), high), *range(1, low)]
    visited = block_max[:, order]
    before = visited.cummax(1).values.roll(1, dims=1)
    before[:, 0] = -math.inf
    margin = (visited - before - log_lambda).nan_to_num(nan=math.inf)
    margin = margin.masked_fill(visited == -math.inf, -math.inf)
    decided = skipped[order]
    assert not ((margin < -band[:, None]).all(0) & ~decided).any(), "kept what had to be skipped"
    assert not ((margin > band[:, None]).any(0) & decided).any(), "skipped what had to be kept"
    assert not skipped[high:blocks].any(), "skipped what nobody sees"


def sanitize_cases(device: str) -> list[Case]:
    """What compute-sanitizer watches: each kernel once, with masked edges."""
    names = ("chunk, padded", "decode of 3, padded", "window", "head size 256")
    backends = [name for name in ("triton", "cuda") if BACKENDS[name].available() is None]
    return [
        (
            f"{backend}: {name}, blasst",
            lambda name=name, b=backend: small(device, name, "blasst", b),
        )
        for backend in backends
        for name in names
    ]
