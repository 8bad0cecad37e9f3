"""BLASST (arXiv 2512.12087): skip a block whose scores lie far below their row's running max.

lambda = scale_factor / L with `scale_factor = a * exp(b * target_sparsity)`: the longer the
request, the smaller each key's share of the softmax mass, and the lower the bar. L is the request's
own number of keys in reach: valid, not after the last query, and at most a window. Since a row then
skips at most L keys and each weighs at most lambda, **no row drops more than `scale_factor` of its
softmax mass** (a bound that is worth something below 1), with padding, static caches and windows
alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.methods.base import Method, end_of_causal
from hf_sparse_attention.types import LARGEST_LAMBDA, PHASES, AttentionCall, SkipRule

#: The budget of a phase that nobody calibrated: no row loses more than an eleventh of its mass.
#: The bound is far from tight: SmolLM2-135M at 4K tokens of prose skips 13% of its blocks under it,
#: at a perplexity ratio of 1.000 (0.01 skips 4%; 1.0 skips 35%, at 1.000 too).
DEFAULT_MAX_DROPPED_MASS = 0.1


class Blasst(Method):
    """The relative rule; a phase without a scale factor runs under the budget rule instead."""

    name = "blasst"

    def check(self, config: SparseAttentionConfig) -> None:
        """Refuses a scale factor whose target sparsity is not set."""
        for phase in PHASES:
            config.scale_factor(phase)

    def notes(self, config: SparseAttentionConfig) -> list[str]:
        """Names the phases that are not calibrated, and what runs there."""
        phases = [
            phase
            for phase in PHASES
            if config.scale_factor(phase) is None and phase not in (config.max_dropped_mass or {})
        ]
        if not phases:
            return []
        eps = DEFAULT_MAX_DROPPED_MASS
        note = (
            f"blasst is not calibrated for {' and '.join(phases)}: it only skips while every row "
            f"provably keeps all but {eps / (1 + eps):.0%} of its softmax mass "
            f"(max_dropped_mass={eps}). For more speed, "
            "hf_sparse_attention.calibrate(model, data, method='blasst'), or choose "
            "with hf_sparse_attention.set_sparse_attention(model, max_dropped_mass=...)."
        )
        return [note]

    def rule(
        self,
        config: SparseAttentionConfig,
        layer: int,  # noqa: ARG002 - one lambda for all layers
        call: AttentionCall,
    ) -> SkipRule:
        """`log_lambda` `[B|1, 1]` for a calibrated phase, and the budget if there is one."""
        prepared = self.prepare(config, call.q.device)
        log_factor = prepared.get(f"{call.phase}.log_factor")
        log_lambda = None
        if log_factor is not None:
            log_length = keys_in_reach(call).clamp(min=1).log()
            log_lambda = (log_factor - log_length).clamp(max=math.log(LARGEST_LAMBDA))[:, None]
        return SkipRule(
            log_lambda=log_lambda,
            max_dropped_mass=prepared.get(f"{call.phase}.max_dropped_mass"),
        )

    def _tensors(self, config: SparseAttentionConfig, device: torch.device) -> dict[str, Tensor]:
        """Adds `<phase>.log_factor` `[1]`, or the default budget where that is all there is."""
        tensors = super()._tensors(config, device)
        for phase in PHASES:
            factor = config.scale_factor(phase)
            if factor is not None:
                log_factor = math.log(factor) if factor > 0 else -math.inf
                tensors[f"{phase}.log_factor"] = torch.full((1,), log_factor, device=device)
            elif f"{phase}.max_dropped_mass" not in tensors:
                budget = torch.full((1, 1), DEFAULT_MAX_DROPPED_MASS, device=device)
                tensors[f"{phase}.max_dropped_mass"] = budget
        return tensors


def keys_in_reach(call: AttentionCall) -> Tensor:
    """L, float32 `[B|1]`: how many keys the last query of each request may see."""
    kv_len = call.k.shape[2]
    end = end_of_causal(call) if call.causal else kv_len
    if call.key_valid is not None:
        valid = call.key_valid
        if isinstance(end, Tensor):
            column = torch.arange(kv_len, device=valid.device)
            valid = valid & (column < end[:, None])
        length = valid.sum(dim=1)
    elif isinstance(end, Tensor):
        length = end.clamp(max=kv_len)
    else:
        length = torch.full((1,), end, device=call.q.device)
    if call.window is not None:
        length = length.clamp(max=call.window)
    return length.to(torch.float32)
