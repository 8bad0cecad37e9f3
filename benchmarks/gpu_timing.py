"""What is timed on this device: our backends for GPUs, and their peers, on the same inputs."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import gpu_inputs
from benchmarks.gpu_correctness import Case
from benchmarks.gpu_measure import EMULATED, OURS, Run, measure
from hf_sparse_attention.backends import BACKENDS
from hf_sparse_attention.functional import attend
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

HEADS, KV_HEADS, SIZE = (2, 1, 16) if EMULATED else (32, 8, 128)
SPARSITIES = (0.0, 0.9) if EMULATED else (0.0, 0.1, 0.5, 0.75, 0.9)
Inputs = tuple[Tensor, Tensor, Tensor]


def headline_cases(device: str) -> list[Case]:
    """What the goals are about, if there is time for nothing else: 64K in both phases."""
    return [*prefill_cases(device)[:1], *decode_cases(device)[:2]]


def prefill_cases(device: str) -> list[Case]:
    lengths = [70] if EMULATED else [65536, 8192, 16384, 32768, 131072]
    return [(f"prefill {n}", lambda n=n: prefill(device, n)) for n in lengths]


def decode_cases(device: str) -> list[Case]:
    shapes = [(1, 65536), (8, 65536), (1, 8192), (32, 8192), (64, 8192), (32, 32768), (1, 131072)]
    if EMULATED:
        shapes = [(1, 200)]
    return [(f"decode {b} x {n}", lambda b=b, n=n: decode(device, b, n)) for b, n in shapes]


def training_cases(device: str) -> list[Case]:
    lengths = [70] if EMULATED else [32768, 8192]
    return [
        (f"{name} {n}", lambda n=n, how=how: training(device, n, how))
        for n in lengths
        for name, how in (("backward", backward_alone), ("training", with_backward))
    ]


def prefill(device: str, length: int) -> dict[str, Any]:
    """Causal, batch 1, bfloat16: seconds and TFLOP/s (of dense attention) by contestant."""
    made = {s: inputs(device, 1, length, length, s) for s in SPARSITIES}
    runs: dict[str, Run] = peers(*made[0.0], causal=True)
    sparsity = {}
    for s, qkv in made.items():
        for geometry in (BlockGeometry(64, 64), BlockGeometry(64, 128)):
            for backend in ours():
                name = f"{backend} {geometry.name}, {s:.0%} low"
                runs[name] = own(*qkv, geometry, backend, rule_for(qkv[0], s))
                sparsity[name] = measured_sparsity(*qkv, geometry, backend)
    for backend in ours():
        runs[f"{backend} 64x64, no rule"] = own(
            *made[0.0], BlockGeometry(), backend, SkipRule.never()
        )
    flops = 2 * HEADS * length**2 * SIZE * 2 / 2
    return measure(runs, sparsity, flops=flops)


def decode(device: str, batch: int, kv_len: int) -> dict[str, Any]:
    """One query a request, each contestant as a replayed CUDA graph: seconds and GB/s of dense."""
    needed = len(SPARSITIES) * 2 * batch * KV_HEADS * kv_len * SIZE * 2
    if device == "cuda" and needed > 0.8 * torch.cuda.mem_get_info()[0]:
        return {"left_out": f"needs {needed / 2**30:.0f} GiB of memory"}
    made = {s: inputs(device, batch, 1, kv_len, s) for s in SPARSITIES}
    runs: dict[str, Run] = peers(*made[0.0], causal=False)
    sparsity: dict[str, float] = {}
    for s, qkv in made.items():
        for backend in ours():
            name = f"{backend} 64x64, {s:.0%} low"
            runs[name] = own(*qkv, BlockGeometry(), backend, rule_for(qkv[0], s))
            sparsity[name] = measured_sparsity(*qkv, BlockGeometry(), backend)
            if backend == "cuda" and is_hopper(device):  # which has a kernel of its own
                other = f"cuda of sm_80 64x64, {s:.0%} low"
                runs[other] = on_sm80(runs[name])
                sparsity[other] = sparsity[name]
    size = 2 * batch * KV_HEADS * kv_len * SIZE * 2
    return measure(runs, sparsity, size=size, graphs=device == "cuda")


def training(device: str, length: int, how: Callable[[Run, Inputs], Run]) -> dict[str, Any]:
    """Forward and backward, or the latter alone, causal, batch 1."""
    made = {s: inputs(device, 1, length, length, s) for s in (0.0, 0.75)}
    runs: dict[str, Run] = {}
    for name, run in peers(*made[0.0], causal=True, leaves=True).items():
        runs[name] = how(run, made[0.0])
    sparsity = {}
    for s, qkv in made.items():
        name = f"triton 64x64, {s:.0%} low"
        leaves = tuple(x.detach().requires_grad_() for x in qkv)
        runs[name] = how(own(*leaves, BlockGeometry(), "triton"), leaves)
        sparsity[name] = measured_sparsity(*qkv, BlockGeometry(), "triton")
    flops = (2.5 if how is backward_alone else 3.5) * 2 * HEADS * length**2 * SIZE * 2 / 2
    return measure(runs, sparsity, flops=flops)


def inputs(device: str, batch: int, q_len: int, kv_len: int, sparsity: float) -> Inputs:
    return gpu_inputs.make(
        batch, HEADS, KV_HEADS, q_len, kv_len, SIZE, sparsity=sparsity, device=device
    )


def rule_for(q: Tensor, expected_sparsity: float | None = None) -> SkipRule:
    log_lambda = torch.full((1, 1), math.log(gpu_inputs.LAMBDA), device=q.device)
    return SkipRule(log_lambda=log_lambda, expected_sparsity=expected_sparsity)


def ours() -> list[str]:
    """Our backends that can be timed here."""
    return [name for name in OURS if BACKENDS[name].available() is None]


def own(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: BlockGeometry,
    backend: str,
    rule: SkipRule | None = None,
) -> Run:
    call = AttentionCall(q, k, v, scale=q.shape[-1] ** -0.5)
    rule = rule_for(q) if rule is None else rule
    return lambda: attend(call, rule, geometry, backend).out.transpose(1, 2)


def is_hopper(device: str) -> bool:
    return device == "cuda" and torch.cuda.get_device_capability() == (9, 0)


def on_sm80(run: Run) -> Run:
    """The run without the kernels made for Hopper."""

    def run_there() -> Tensor:
        with gpu_inputs.variables(HF_SPARSE_ATTENTION_CUDA_LEVEL="sm_80"):
            return run()

    return run_there


def measured_sparsity(
    q: Tensor, k: Tensor, v: Tensor, geometry: BlockGeometry, backend: str
) -> float:
    with torch.no_grad():
        call = AttentionCall(q, k, v, scale=q.shape[-1] ** -0.5)
        result = attend(call, rule_for(q), geometry, backend)
    visited, skipped = result.counts.sum((0, 1)).tolist()
    return skipped / visited


def peers(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, leaves: bool = False) -> dict[str, Run]:
    """Dense attention as others compute it; one that cannot is left out when it is warmed up."""
    if leaves:
        q, k, v = (x.requires_grad_() for x in (q, k, v))

    def sdpa(backend: SDPBackend) -> Run:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

        return run

    if q.device.type == "cpu":
        return {"sdpa": sdpa(SDPBackend.MATH)}
    found = {
        "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    }
    if not causal:
        folded = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])

        def run_folded() -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                out = scaled_dot_product_attention(folded, k, v)
            return out.reshape(q.shape)

        found["sdpa flash, group folded"] = run_folded
    found["flex"] = flex(q, k, v, causal)
    for package, name in (("flash_attn", "flash-attn 2"), ("flash_attn_interface", "flash-attn 3")):
        if importlib.util.find_spec(package) is not None:
            found[name] = flash_attn(package, q, k, v, causal)
    return found


def flash_attn(package: str, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Run:
    """FlashAttention's own package, which has heads behind positions."""

    def run() -> Tensor:
        function = importlib.import_module(package).flash_attn_func
        out = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


def flex(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Run:
    """FlexAttention, compiled; causality as a block mask."""
    made: list[Any] = []

    def run() -> Tensor:
        if not made:  # so that a failure here leaves out this contestant alone
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            mask = None
            if causal:
                mask = create_block_mask(
                    lambda _b, _h, i, j: i >= j, None, None, q.shape[2], k.shape[2], _compile=True
                )
            torch._functorch.config.donated_buffer = False  # a backward may run again
            made.extend((torch.compile(flex_attention, dynamic=False), mask))
        compiled, mask = made
        return compiled(q, k, v, block_mask=mask, enable_gqa=True)

    return run


def with_backward(run: Run, leaves: Inputs) -> Run:
    dout: list[Tensor] = []

    def both() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        out = run()
        if not dout:
            dout.append(torch.randn_like(out))
        out.backward(dout[0])
        return out

    return both


def backward_alone(run: Run, leaves: Inputs) -> Run:
    """The backward of one forward, which is kept."""
    kept: list[Tensor] = []

    def backward() -> Tensor:
        if not kept:
            kept.append(run())
            kept.append(torch.randn_like(kept[0]))
        torch.autograd.grad(kept[0], leaves, kept[1], retain_graph=True)
        return kept[0]

    return backward
