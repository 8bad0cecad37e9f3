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
from hf_sparse_attention.methods.base import (
    Method,
    end_of_causal,
    heads_of,
    loaded_tables,
    refuse_geometry,
)
from hf_sparse_attention.types import (
    LARGEST_LAMBDA,
    PHASES,
    AttentionCall,
    BlockGeometry,
    Phase,
    SkipRule,
)

#: The budget of a phase that nobody calibrated: no row loses more than an eleventh of its mass.
#: The bound is far from tight: SmolLM2-135M at 4K tokens of prose skips 13% of its blocks under it,
#: at a perplexity ratio of 1.000 (0.01 skips 4%; 1.0 skips 35%, at 1.000 too).
DEFAULT_MAX_DROPPED_MASS = 0.1


class Blasst(Method):
    """The relative rule; a phase without a scale factor runs under the budget rule instead."""

    name = "blasst"

    def check(self, config: SparseAttentionConfig) -> None:
        """Refuses a scale factor without its target, and another geometry than the calibrated."""
        if config.fits and not set(PHASES) <= set(config.threshold_scale_factor or {}):
            refuse_geometry(config, self.calibrated(config))
        for geometry in self.geometries(config):
            for phase in PHASES:
                config.scale_factor(phase, geometry)
                _coefficients(config, phase, geometry)

    def notes(self, config: SparseAttentionConfig) -> list[str]:
        """Names the phases that are not calibrated and what runs there, and far-off targets."""
        geometries = self.geometries(config)
        phases = [
            phase
            for phase in PHASES
            if any(config.scale_factor(phase, geometry) is None for geometry in geometries)
            and phase not in (config.max_dropped_mass or {})
        ]
        said = []
        if phases:
            eps = DEFAULT_MAX_DROPPED_MASS
            said.append(
                f"blasst is not calibrated for {' and '.join(phases)}: it only skips while every "
                f"row provably keeps all but {eps / (1 + eps):.0%} of its softmax mass "
                f"(max_dropped_mass={eps}). For more speed, "
                "hf_sparse_attention.calibrate(model, data, method='blasst'), or choose "
                "with hf_sparse_attention.set_sparse_attention(model, max_dropped_mass=...)."
            )
        for phase in PHASES:
            for geometry in geometries:
                fit, target = config.fit(phase, geometry), config.target(phase, geometry)
                if phase in (config.threshold_scale_factor or {}) or fit is None or target is None:
                    continue
                if not fit.covers_target(target):
                    assert fit.sparsity is not None
                    low, high = fit.sparsity
                    said.append(
                        f"blasst: target_sparsity {target:g} for {phase} is extrapolated: "
                        f"{geometry.name} was calibrated from {low:g} to {high:g}."
                    )
        return said

    def calibrated(self, config: SparseAttentionConfig) -> list[BlockGeometry]:
        """The geometries of the fits."""
        return [fit.geometry for fit in config.fits.values()]

    def rule(
        self,
        config: SparseAttentionConfig,
        layer: int,
        call: AttentionCall,
        geometry: BlockGeometry,
    ) -> SkipRule:
        """`log_lambda` `[B|1, Hq|1]` for a calibrated phase, and the budget if there is one."""
        prepared = self.prepare(config, call.q.device, geometry)
        log_factor = prepared.get(f"{call.phase}.log_factor")
        log_lambda = None
        if log_factor is not None:
            if log_factor.dim() == 2:  # each layer, or head, has its own
                log_factor = heads_of(log_factor, layer, call)
            log_length = keys_in_reach(call).clamp(min=1).log()[:, None]
            log_lambda = (log_factor - log_length).clamp(max=math.log(LARGEST_LAMBDA))
        return SkipRule(
            log_lambda=log_lambda,
            max_dropped_mass=prepared.get(f"{call.phase}.max_dropped_mass"),
            expected_sparsity=self._expected_sparsity(config, call, geometry),
        )

    def prepare(
        self, config: SparseAttentionConfig, device: torch.device, geometry: BlockGeometry
    ) -> dict[str, Tensor]:
        """Makes what is expected to be skipped, too, so that no compiled forward computes it."""
        key = _skips(geometry)
        if key not in config.prepared:
            shares = {phase: expected_sparsity(config, phase, geometry) for phase in PHASES}
            config.prepared[key] = shares
        return super().prepare(config, device, geometry)

    def _expected_sparsity(
        self, config: SparseAttentionConfig, call: AttentionCall, geometry: BlockGeometry
    ) -> float | None:
        """What calibration saw the thresholds skip; for inference on GPUs, which alone use it."""
        if call.q.device.type != "cuda" or call.needs_grad:
            return None
        expected: float | None = config.prepared[_skips(geometry)][call.phase]
        return expected

    def _tensors(
        self, config: SparseAttentionConfig, device: torch.device, geometry: BlockGeometry
    ) -> dict[str, Tensor]:
        """Adds `<phase>.log_factor`, `[1]` or `[layers, heads]`.

        Or the default budget, where that is all there is.
        """
        tensors = super()._tensors(config, device, geometry)
        for phase in PHASES:
            factor = config.scale_factor(phase, geometry)
            own = _coefficients(config, phase, geometry)
            if own is not None:
                log_a, b = own
                log_factor = log_a + b * (config.target(phase, geometry) or 0.0)
                tensors[f"{phase}.log_factor"] = log_factor.to(device, copy=True)
            elif factor is not None:
                value = math.log(factor) if factor > 0 else -math.inf
                tensors[f"{phase}.log_factor"] = torch.full((1,), value, device=device)
            elif f"{phase}.max_dropped_mass" not in tensors:
                budget = torch.full((1, 1), DEFAULT_MAX_DROPPED_MASS, device=device)
                tensors[f"{phase}.max_dropped_mass"] = budget
        return tensors


def _coefficients(
    config: SparseAttentionConfig, phase: Phase, geometry: BlockGeometry
) -> tuple[Tensor, Tensor] | None:
    """`ln a` and `b`, each `[layers, heads]`, if those are what `config` runs on `geometry`.

    Raises:
        ValueError: layers or heads should have their own, but the tables lack them.
    """
    calibrated = config.fit(phase, geometry) is not None
    if (
        config.granularity == "global"
        or not calibrated
        or phase in (config.threshold_scale_factor or {})
    ):
        return None
    missing = (
        f"granularity: expected coefficients for each {config.granularity} on {geometry.name}, "
        "got none; calibrate(model, data, granularity=...) makes them, and 'global' needs none"
    )
    own = loaded_tables(config, missing).coefficients(geometry.name, phase)
    if own is None:
        raise ValueError(missing)
    return own


def _skips(geometry: BlockGeometry) -> str:
    """Under what the expected sparsities of a geometry are kept in `config.prepared`."""
    return f"blasst {geometry.name} skips"


def expected_sparsity(
    config: SparseAttentionConfig, phase: Phase, geometry: BlockGeometry
) -> float | None:
    """What share of the blocks is skipped, by the fit; None where there is none.

    A scale factor that was set is taken back through the fit: `(ln factor - ln a) / b`. Rounded
    down to quarters: compiled graphs are guarded by it, and other targets should keep them.
    """
    fit, factor = config.fit(phase, geometry), config.scale_factor(phase, geometry)
    expected = config.target(phase, geometry)
    if factor == 0:
        expected = 0.0
    elif phase in (config.threshold_scale_factor or {}) and fit is not None:
        assert factor is not None
        expected = math.log(factor / fit.a) / fit.b if fit.a > 0 and fit.b > 0 else None
    if factor is None or expected is None:
        return None
    return math.floor(4 * min(max(expected, 0.0), 1.0)) / 4


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
