"""Block-skipping attention as a plain function of tensors, without transformers."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from hf_sparse_attention.backends import select
from hf_sparse_attention.int8_keys import Int8Keys
from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, SkipRule
from hf_sparse_attention.validation import check

logger = logging.getLogger(__name__)

#: Calls with fewer keys than this run SDPA where they run dense: the native kernel costs a few
#: microseconds a call before it computes anything (docs/results.md, break-even).
KERNEL_MIN_LENGTH = 64

_said: set[str] = set()


def block_skip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rule: SkipRule,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_valid: Tensor | None = None,
    q_offset: Tensor | None = None,
    int8_keys: Int8Keys | None = None,
    geometry: BlockGeometry | None = None,
    backend: str = "auto",
    return_skips: bool = False,
    return_dropped_mass: bool = False,
) -> AttentionResult:
    """Attention that leaves out the blocks which `rule` finds negligible.

    Args:
        q: `[B, Hq, Lq, D]`, float16, bfloat16, float32 or (reference only) float64.
        k: `[B, Hkv, Lk, D]`; Hq is a multiple of Hkv.
        v: `[B, Hkv, Lk, Dv]`.
        rule: `SkipRule.blasst(lam)`, `.bsfa(threshold)`, `.budget(eps)`, `.never()`, or several.
        causal: query row r sees key columns up to `r + (Lk - Lq)` (bottom-right aligned).
        scale: factor on the scores; None is `D ** -0.5`.
        window: a query sees only its newest `window` keys; None is all.
        softcap: `softcap * tanh(score / softcap)` replaces the scores; None is off.
        sinks: `[Hq]` logits that join each softmax's denominator.
        key_valid: bool `[B, Lk]`, False for padding.
        q_offset: int64 `[1]` or `[B]`, the key column of query row 0 where it is not `Lk - Lq`.
        int8_keys: an int8 copy of `k`, kept beside it. It can only save time, and that only in
            decode; it never changes the result, if it is a copy of these keys.
        geometry: block sizes and visiting order; None is 64x64, sink and diagonal first.
        backend: one of `available_backends()`, or "auto": the first that can.
        return_skips: also return which blocks were skipped.
        return_dropped_mass: also return the certificate, a bound on each row's dropped mass.

    Raises:
        ValueError, TypeError: an argument is not as described, or the backend named cannot run it.
    """
    call = AttentionCall(
        q,
        k,
        v,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        causal=causal,
        q_offset=q_offset,
        key_valid=key_valid,
        window=window,
        softcap=softcap,
        sinks=sinks,
        int8_keys=None if int8_keys is None else int8_keys.data_for(k),
    )
    return attend(
        call,
        rule,
        geometry or BlockGeometry(),
        backend,
        return_skips=return_skips,
        return_dropped_mass=return_dropped_mass,
    )


def attend(
    call: AttentionCall,
    rule: SkipRule,
    geometry: BlockGeometry,
    backend: str = "auto",
    *,
    return_skips: bool = False,
    return_dropped_mass: bool = False,
) -> AttentionResult:
    """Checks `call`, picks the backend and runs it; why a faster backend cannot is logged once."""
    check(call, rule, geometry)
    chosen, reasons = select(call, rule, geometry, backend)
    plain = chosen.NAME in ("reference", "dense")
    if plain and reasons and not torch.compiler.is_compiling():
        for name, reason in reasons.items():
            _say_once(f"backend {name!r} is not used: {reason}; {chosen.NAME!r} runs instead")
    return chosen.run(
        call,
        rule,
        geometry,
        return_skips=return_skips,
        return_dropped_mass=return_dropped_mass,
    )


def attend_dense(call: AttentionCall, backend: str = "auto") -> AttentionResult:
    """Exact attention in the fastest way there is: the native kernel, never skipping, or SDPA.

    Args:
        call: what to compute, whatever mask or dropout it has.
        backend: what the user asked for; "dense" and "reference" mean torch's own.
    """
    rule, geometry = SkipRule.never(), BlockGeometry()
    check(call, rule, geometry)
    if backend in ("dense", "reference") or call.k.shape[2] < KERNEL_MIN_LENGTH:
        return select(call, rule, geometry, "dense")[0].run(call, rule, geometry)
    return select(call, rule, geometry, "auto")[0].run(call, rule, geometry)


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.warning(message)
