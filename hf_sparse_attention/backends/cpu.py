"""The compiled CPU kernel: `kernel_hub/block-skip-attention`, loaded on first use.

Where it is looked for, in this order: what `LOCAL_KERNELS` gives for `REPO_ID`; the build of the
checkout that this file lies in; the build that an installed wheel carries; and, only if the
environment variable HF_SPARSE_ATTENTION_HUB_KERNELS is 1, the Hub. HF_SPARSE_ATTENTION_CPU_LEVEL
forces the level of instructions down: portable, avx2, avx512 or avx512_bf16.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, SkipRule

NAME = "cpu"
GEOMETRIES: tuple[str, ...] | None = ("64x64", "64x128", "64x1")
PREFERRED = ("64x1", "64x64")  # single keys can be left out at no extra cost, and far more of them

REPO_ID = "hf-sparse-attention/block-skip-attention"
VERSION = 1
MAX_HEAD_SIZE = 512

_PACKAGE = Path(__file__).resolve().parents[1]
_CHECKOUT = _PACKAGE.parent / "kernel_hub" / "block-skip-attention"
_WHEEL = _PACKAGE / "_kernels"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ORDERS = {"ascending": 0, "sink_diagonal": 1, "descending": 2}


@functools.cache
def load_kernel(allow_hub: bool | None = None) -> ModuleType | str:
    """The kernel's module, or why there is none; looked for once.

    Args:
        allow_hub: whether it may be downloaded; None asks HF_SPARSE_ATTENTION_HUB_KERNELS.
    """
    import kernels  # here, so that importing this package stays fast

    if allow_hub is None:
        allow_hub = os.environ.get("HF_SPARSE_ATTENTION_HUB_KERNELS", "") == "1"
    named = f"{REPO_ID}=" in os.environ.get("LOCAL_KERNELS", "")
    tried: list[str] = []
    for folder in (_CHECKOUT, _WHEEL):
        if named:
            break
        if not any(folder.glob("**/metadata.json")):
            tried.append(f"no build in {folder}")
            continue
        try:
            return cast(ModuleType, kernels.get_local_kernel(folder, backend="cpu"))
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            tried.append(f"the build in {folder} does not load: {_first_line(error)}")
    if named or allow_hub:
        try:
            # Only this repo is trusted; one that LOCAL_KERNELS names never leads to the network.
            return cast(
                ModuleType,
                kernels.get_kernel(
                    REPO_ID, version=VERSION, backend="cpu", trust_remote_code=[REPO_ID]
                ),
            )
        except Exception as error:  # whatever the network and the Hub may raise
            where = "LOCAL_KERNELS" if named else "the Hub"
            tried.append(f"{REPO_ID} from {where} does not load: {_first_line(error)}")
    return (
        f"no compiled CPU kernel: {'; '.join(tried)}. "
        "In a checkout, build it with `python kernel_hub/build.py` (needs g++)"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


# torch.compile must not trace the loading: it runs it once and takes the result for granted.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> str | None:
    """Why this machine cannot run the backend, or None."""
    kernel = load_kernel()
    return kernel if isinstance(kernel, str) else None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _namespace() -> str:
    """Where in `torch.ops` the kernel's ops are: a string, as dynamo takes no other constant."""
    kernel = load_kernel()
    if isinstance(kernel, str):
        raise RuntimeError(kernel)
    return str(kernel.add_op_namespace_prefix("")).removesuffix("::")


def supports(call: AttentionCall, rule: SkipRule, geometry: BlockGeometry) -> str | None:
    """Why this call cannot be served, or None."""
    if call.mask is not None:
        return "an arbitrary mask has no block structure"
    if call.dropout > 0:
        return "attention dropout cannot be combined with block skipping"
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        if x.device.type != "cpu":
            return f"{name} lies on {x.device.type}, not on the CPU"
        if x.dtype not in DTYPES:
            return f"{name} is {x.dtype}; float32, bfloat16 and float16 are compiled"
    if max(call.q.shape[-1], call.v.shape[-1]) > MAX_HEAD_SIZE:
        return f"head sizes are compiled up to {MAX_HEAD_SIZE}"
    if not 1 <= geometry.block_q <= 64:
        return f"block_q {geometry.block_q} is not among 1 to 64"
    if geometry.block_k > 1024 or (64 % geometry.block_k and geometry.block_k % 64):
        return f"block_k {geometry.block_k} is neither a divisor nor a multiple (up to 1024) of 64"
    return None


def run(
    call: AttentionCall,
    rule: SkipRule,
    geometry: BlockGeometry,
    *,
    return_skips: bool = False,
    return_dropped_mass: bool = False,
) -> AttentionResult:
    """Computes `call` under `rule`; see `AttentionResult` for what comes back."""
    q, k, v = call.q, call.k, call.v
    if not q.dtype == k.dtype == v.dtype:  # autocast may leave q and k in float32, v in bfloat16
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    out, lse, counts, skips, dropped_mass = getattr(torch.ops, _namespace()).forward(
        q,
        k,
        v,
        call.key_valid,
        call.q_offset,
        _float32(call.sinks),
        _float32(rule.log_lambda),
        _float32(rule.block_threshold),
        _float32(rule.max_dropped_mass),
        call.scale,
        call.causal,
        call.window or 0,
        call.softcap or 0.0,
        geometry.block_q,
        geometry.block_k,
        _ORDERS[geometry.order],
        geometry.split_k,
        rule.keep_sink,
        return_skips or (call.needs_grad and not rule.is_never),  # the backward reads them
        return_dropped_mass,
        call.int8_keys if k is call.k else None,
    )
    return AttentionResult(
        out=out.to(call.q.dtype),
        lse=lse,
        counts=counts,
        skips=skips if return_skips else None,
        dropped_mass=dropped_mass if return_dropped_mass else None,
        backend=NAME,
    )


def empty_int8_keys(batch: int, heads: int, length: int, head_size: int) -> Tensor:
    """The tensor that `AttentionCall.int8_keys` wants, for `length` keys; it knows none yet."""
    kernel = load_kernel()
    if isinstance(kernel, str):
        raise RuntimeError(kernel)
    return cast(Tensor, kernel.empty_int8_keys(batch, heads, length, head_size))


def append_int8_keys(k: Tensor, position: Tensor, copy: Tensor) -> None:
    """Enters `k` `[B, Hkv, n, D]` into `copy` at `position`, one int64, and behind."""
    getattr(torch.ops, _namespace()).append_int8_keys(k, position, copy)


def _float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32)
