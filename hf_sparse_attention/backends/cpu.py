"""The compiled CPU kernel; `kernel.py` says where it is looked for.

HF_SPARSE_ATTENTION_CPU_LEVEL forces the level of instructions down: portable, avx2, avx512 or
avx512_bf16; or asks for avx512_amx.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from hf_sparse_attention.backends import kernel
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

NAME = "cpu"
GEOMETRIES: tuple[str, ...] | None = ("64x64", "64x128", "64x1")
PREFERRED = ("64x1", "64x64")  # single keys can be left out at no extra cost, and far more of them

MAX_HEAD_SIZE = 512


def load_kernel() -> ModuleType | str:
    """The kernel's module, or why there is none."""
    found = kernel.load("cpu")
    if not isinstance(found, str):
        return found
    return (
        f"no compiled CPU kernel: {found}. "
        "In a checkout, build it with `python kernel_hub/build.py` (needs g++)"
    )


# torch.compile must not trace the loading: it runs it once and takes the result for granted.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> str | None:
    """Why this machine cannot run the backend, or None."""
    found = load_kernel()
    return found if isinstance(found, str) else None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _namespace() -> str:
    """Where in `torch.ops` the kernel's ops are: a string, as dynamo takes no other constant."""
    return kernel.namespace("cpu")


def supports(call: AttentionCall, rule: SkipRule, geometry: BlockGeometry) -> str | None:
    """Why this call cannot be served, or None."""
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        if x.device.type != "cpu":
            return f"{name} lies on {x.device.type}, not on the CPU"
    if not 1 <= geometry.block_q <= 64:
        return f"block_q {geometry.block_q} is not among 1 to 64"
    if geometry.block_k > 1024 or (64 % geometry.block_k and geometry.block_k % 64):
        return f"block_k {geometry.block_k} is neither a divisor nor a multiple (up to 1024) of 64"
    return kernel.unserved(call, MAX_HEAD_SIZE)


run = kernel.runner(NAME, _namespace)


append_int8_keys = kernel.appender(_namespace)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None, eps: float) -> None:
    """Rotary position embedding of `x` `[B, H, L, D]` in place; see the kernel's own `rotate_`."""
    getattr(torch.ops, _namespace()).rotate_(x, cos, sin, norm, eps)


def observe(
    call: AttentionCall,
    *,
    geometries: Tensor,
    kept: Tensor,
    keep_sink: bool,
    groups: Tensor,
    group_count: int,
    eps: Tensor,
    bins: int,
    u_min: float,
    bins_per_nat: float,
    mass_unit: float,
    sample_from: int,
    sample_every: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Dense attention of an unpadded causal prefill, and what thresholds would do to it.

    Arguments and results as in the kernel's own `observe`, with `out` in q's dtype.
    """
    out, *told = getattr(torch.ops, _namespace()).observe(
        *kernel.one_dtype(call),
        kernel.float32(call.sinks),
        call.scale,
        call.window or 0,
        call.softcap or 0.0,
        geometries,
        kept,
        keep_sink,
        groups,
        group_count,
        eps,
        bins,
        u_min,
        bins_per_nat,
        mass_unit,
        sample_from,
        sample_every,
    )
    prefill, decode, prefill_tops, decode_tops = told
    return out.to(call.q.dtype), prefill, decode, prefill_tops, decode_tops
