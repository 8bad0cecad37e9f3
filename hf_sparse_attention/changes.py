"""Changing settings, as a value: what may be combined, and what takes the place of what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.methods import METHODS
from hf_sparse_attention.types import PHASES, Phase

ByPhase = float | Mapping[Phase, float] | None


def updated(
    config: SparseAttentionConfig,
    *,
    target_sparsity: ByPhase = None,
    threshold_scale_factor: ByPhase = None,
    max_dropped_mass: ByPhase = None,
    level: int | None = None,
    backend: str | None = None,
    min_length: int | None = None,
) -> SparseAttentionConfig:
    """`config` with what is given changed: what `set_sparse_attention` would give a model.

    Raises:
        ValueError: a value is out of its range, or would be ignored.
    """
    given = config
    if target_sparsity is not None and config.fits:
        given = _calibrated_again(config, target_sparsity)
    changes: dict[str, Any] = {
        "target_sparsity": merged(given.target_sparsity, target_sparsity),
        "threshold_scale_factor": merged(given.threshold_scale_factor, threshold_scale_factor),
        "max_dropped_mass": merged(given.max_dropped_mass, max_dropped_mass),
        "level": level,
        "backend": backend,
        "min_length": min_length,
    }
    changed = replace(given, **{name: x for name, x in changes.items() if x is not None})
    _check_meaningful(changed, target_sparsity, threshold_scale_factor, level)
    METHODS[changed.method].check(changed)
    return changed


def merged(present: Mapping[Phase, Any] | None, given: ByPhase) -> dict[Phase, Any] | None:
    """`present` with the phases that `given` mentions replaced; None where nothing is given."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        return dict.fromkeys(PHASES, given)
    return {**(present or {}), **given}


def _check_meaningful(
    config: SparseAttentionConfig, target: ByPhase, factor: ByPhase, level: int | None
) -> None:
    """Refuses settings that would be ignored."""
    if config.method == "blasst" and level is not None:
        raise ValueError(f"level: expected with method 'bsfa' only, got {level} with 'blasst'")
    if config.method == "bsfa":
        for name, value in (("target_sparsity", target), ("threshold_scale_factor", factor)):
            if value is not None:
                raise ValueError(
                    f"{name}: expected with method 'blasst' only, got {value} with 'bsfa'"
                )
    for phase in _phases(target):
        given = (config.threshold_scale_factor or {}).get(phase)
        fits = [fit.phases[phase] for fit in config.fits.values() if phase in fit.phases]
        exponents = [fit.b for fit in fits] if given is None else [given["b"]]
        if not any(exponents):
            raise ValueError(
                f"target_sparsity: expected a fit a * exp(b * target_sparsity) for {phase}, "
                f"got {given}; calibrate(model, data) makes one"
            )


def _phases(given: ByPhase) -> list[Phase]:
    """The phases that `given` mentions."""
    if given is None:
        return []
    return [phase for phase in PHASES if not isinstance(given, Mapping) or phase in given]


def _calibrated_again(config: SparseAttentionConfig, target: ByPhase) -> SparseAttentionConfig:
    """`config` without the constant factors that a target sparsity could not move."""
    kept = {
        phase: factor
        for phase, factor in (config.threshold_scale_factor or {}).items()
        if phase not in _phases(target) or factor["b"] != 0
    }
    return replace(config, threshold_scale_factor=kept)
