"""What there is to say about a calibration, JSON-ready, for the report and for `inspect`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from hf_sparse_attention.calibration.curves import curves_of
from hf_sparse_attention.calibration.fitting import lengths_of
from hf_sparse_attention.calibration.prediction import log_factors
from hf_sparse_attention.calibration.tallies import BINS_PER_NAT, U_BINS, U_MIN
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.fits import PhaseFit
from hf_sparse_attention.types import PHASES, Phase

if TYPE_CHECKING:
    from hf_sparse_attention.calibration.observation import Observations

TARGETS = (0.3, 0.5, 0.7)
#: What predicted and measured sparsity should differ by at most.
GOAL = 0.05
#: Tables of their own, not among the lines of provenance.
_SHOWN_BELOW = ("predicted_sparsity", "level_costs")
#: The figures' resolution, and the smallest ln(lambda) that they show.
_POINTS_PER_NAT, _LEAST = 2, -18.0


def report_data(
    config: SparseAttentionConfig, observations: Observations | None = None
) -> dict[str, Any]:
    """Everything that the report shows.

    Args:
        config: what calibration made.
        observations: what it was made from; None leaves out what only they tell.

    Returns:
        - `settings`, `provenance`: names and values;
        - `fits`: a row for each geometry and phase;
        - `held_out`: rows of target against measured sparsity, `worst` their largest difference;
        - `costs`: what targets or levels cost on held-out text, where one was chosen by that;
        - `budgets`: the budget rule's eps for each target;
        - `levels`: BSFA's sparsity by level;
        - `curves`: sparsity against lambda by length; `needed`: the scale factor that each target
          takes at each length, beside the fitted one; `heads`: sparsity `[layers][voters]`.
    """
    fits = list(_fits(config))
    held_out = [_at(name, phase, row) for name, phase, fit in fits for row in fit.held_out]
    data: dict[str, Any] = {
        "settings": _settings(config),
        "provenance": {k: v for k, v in config.provenance.items() if k not in _SHOWN_BELOW},
        "fits": [_at(name, phase, _fit_row(fit)) for name, phase, fit in fits],
        "held_out": held_out,
        "worst": max((abs(row["measured"] - row["target"]) for row in held_out), default=None),
        "costs": [_at(name, phase, row) for name, phase, fit in fits for row in fit.costs]
        + config.provenance.get("level_costs", []),
        "budgets": [
            _at(name, phase, {"target": target, "eps": fit.max_dropped_mass(target)})
            for name, phase, fit in fits
            for target in TARGETS
            if fit.budget is not None
        ],
        "levels": list(_levels(config)),
        "curves": [],
        "needed": [],
        "heads": [],
    }
    for name, phase, fit in fits:
        if observations is not None and name in observations.geometries:
            curves = _curves(observations, name, phase)
            data["curves"] += [_at(name, phase, row) for row in curves]
            needed = _needed(observations, name, phase, fit)
            data["needed"] += [_at(name, phase, row) for row in needed]
            data["heads"].append(_at(name, phase, _heads(config, observations, name, phase)))
    return data


def _at(name: str, phase: Phase, row: dict[str, Any]) -> dict[str, Any]:
    return {"geometry": name, "phase": phase, **row}


def _fits(config: SparseAttentionConfig) -> Iterator[tuple[str, Phase, PhaseFit]]:
    for name, fit in config.fits.items():
        for phase in PHASES:
            if phase in fit.phases:
                yield name, phase, fit.phases[phase]


def _settings(config: SparseAttentionConfig) -> dict[str, Any]:
    return {
        "method": config.method,
        "granularity": config.granularity,
        "geometry": config.geometry.name if config.geometry else "by backend",
        "target sparsity": config.target_sparsity,
        "max dropped mass": config.max_dropped_mass,
        "level": config.level,
        "levels": config.levels,
        "sink kept": config.keep_sink if config.levels else None,
    }


def _fit_row(fit: PhaseFit) -> dict[str, Any]:
    names = ("a", "b", "r2", "residual", "lengths", "sparsity", "target_sparsity")
    return {name: getattr(fit, name) for name in names}


def _curves(observations: Observations, name: str, phase: Phase) -> Iterator[dict[str, Any]]:
    steps = torch.arange(0, U_BINS + 1, BINS_PER_NAT // _POINTS_PER_NAT)
    for length, curves in lengths_of(observations, name, phase).items():
        log_lambda = steps / BINS_PER_NAT + U_MIN - math.log(length)
        shown = (log_lambda > _LEAST) & (log_lambda <= 0)
        yield {
            "length": length,
            "lambda": [float(f"{x:.4g}") for x in log_lambda[shown].exp().tolist()],
            "sparsity": [round(y, 4) for y in curves.below[0, steps[shown]].tolist()],
        }


def _needed(
    observations: Observations, name: str, phase: Phase, fit: PhaseFit
) -> Iterator[dict[str, Any]]:
    for length, curves in lengths_of(observations, name, phase).items():
        for target in TARGETS:
            if target < float(curves.largest) and fit.covers_target(target):
                log_factor = float(curves.log_factor(torch.tensor([target])))
                yield {
                    "length": length,
                    "target": target,
                    "scale_factor": float(f"{math.exp(log_factor):.5g}"),
                    "fitted": float(f"{fit.scale_factor(target):.5g}"),
                }


def _heads(
    config: SparseAttentionConfig, observations: Observations, name: str, phase: Phase
) -> dict[str, Any]:
    """Sparsity by layer and voter at the longest length, at what runs unless something is set."""
    length = observations.lengths(phase)[-1]
    target = config.target(phase, observations.geometries[name])
    target = 0.5 if target is None else target
    curves = curves_of(observations, name, phase, length, "head")
    factors = log_factors(config, observations, name, phase, target)
    layers = [layer for layer in observations.layers if layer >= 0]
    voters = [len(observations.gaps(name, phase, layer, length)) for layer in layers]
    if len(factors) == len(layers):  # one for each layer
        factors = factors.repeat_interleave(torch.tensor(voters))
    found = curves.sparsity(factors).masked_fill(curves.blocks == 0, math.nan)
    return {
        "length": length,
        "target": target,
        "voters": "head" if phase == "prefill" else "key/value head",
        "layers": layers,
        "sparsity": [
            [None if math.isnan(x) else round(x, 4) for x in row.tolist()]
            for row in torch.split(found, voters)
        ],
    }


def _levels(config: SparseAttentionConfig) -> Iterator[dict[str, Any]]:
    for name, phases in config.provenance.get("predicted_sparsity", {}).items():
        for phase, levels in phases.items():
            for level, sparsity in levels.items():
                yield _at(name, phase, {"level": int(level), "sparsity": sparsity})
