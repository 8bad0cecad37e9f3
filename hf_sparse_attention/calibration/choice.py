"""Chooses targets and levels by what they cost on held-out text (`cost.py`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hf_sparse_attention import config_values as values
from hf_sparse_attention.calibration.cost import Cost, HeldOut
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.types import PHASES, BlockGeometry, Phase

logger = logging.getLogger(__name__)

#: Targets are tried in these steps.
STEP = 0.05


@dataclass(frozen=True)
class Limits:
    """The largest costs allowed; a phase without any is not chosen for.

    Args:
        max_kl: largest `Cost.kl`, by phase.
        max_ppl_increase: largest `Cost.ppl_increase`, by phase.
    """

    max_kl: Mapping[Phase, float]
    max_ppl_increase: Mapping[Phase, float]

    @classmethod
    def of(cls, max_kl: Any, max_ppl_increase: Any) -> Limits:
        """From one number for both phases, a dict by phase, or None.

        Raises:
            ValueError: for other phases, or numbers below 0.
        """
        return cls(
            values.by_phase("max_kl", max_kl) or {},
            values.by_phase("max_ppl_increase", max_ppl_increase) or {},
        )

    @property
    def phases(self) -> list[Phase]:
        """The phases with a limit."""
        return [p for p in PHASES if p in self.max_kl or p in self.max_ppl_increase]

    def allow(self, cost: Cost, phase: Phase) -> bool:
        """Whether `cost` is within the limits of `phase`."""
        return cost.kl <= self.max_kl.get(phase, math.inf) and (
            cost.ppl_increase <= self.max_ppl_increase.get(phase, math.inf)
        )


def choose(
    model: Any,
    samples: Sequence[Tensor],
    config: SparseAttentionConfig,
    limits: Limits,
    progress: bool = False,
) -> SparseAttentionConfig:
    """`config` with the highest target sparsity, or the smallest level, that keeps the limits.

    Targets are chosen for each geometry by itself; BSFA's level is one that does for all. A phase
    in which nothing keeps the limits will skip nothing, which is said.

    Args:
        model: a transformers causal language model; left as it was.
        samples: held-out token ids `[n]` int64.
        config: calibrated for its method.
        limits: the largest costs allowed.
        progress: show a bar.
    """
    held_out = HeldOut(model, samples, progress)
    chooser = _choose_targets if config.method == "blasst" else _choose_level
    config, exact = chooser(held_out, config, limits)
    held_out.close()
    for phase in exact:
        logger.warning(
            "calibrate: expected a limit that the least skipping keeps in %s, which it exceeds; "
            "nothing will be skipped there (max_dropped_mass=0)",
            phase,
        )
    if exact:
        budgets = {**(config.max_dropped_mass or {}), **dict.fromkeys(exact, 0.0)}
        config = replace(config, max_dropped_mass=budgets)
    return config


def _choose_targets(
    held_out: HeldOut, config: SparseAttentionConfig, limits: Limits
) -> tuple[SparseAttentionConfig, set[Phase]]:
    """The targets go into the fits, with what each that was tried costs."""
    exact: set[Phase] = set()
    fits = dict(config.fits)
    for name, fit in config.fits.items():
        phases = dict(fit.phases)
        for phase in [p for p in limits.phases if p in phases]:
            low, high = phases[phase].sparsity or (0.0, 1.0)
            steps = [n * STEP for n in range(1, 20)]
            targets = [round(s, 2) for s in steps if s <= high + 1e-6]
            others = config.target_sparsity or {}
            tried = [replace(config, target_sparsity={**others, phase: s}) for s in targets]
            best, costs = _best(held_out, tried, fit.geometry, phase, limits)
            if best is None:
                exact.add(phase)
            chosen = targets[best or 0]
            phases[phase] = replace(
                phases[phase],
                target_sparsity=chosen,
                sparsity=(min(low, chosen), high),  # it was measured
                costs=[{"target": targets[n], **cost.to_dict()} for n, cost in costs.items()],
            )
        fits[name] = replace(fit, phases=phases)
    kept = {p: s for p, s in (config.target_sparsity or {}).items() if p not in limits.phases}
    return replace(config, fits=fits, target_sparsity=kept), exact


def _choose_level(
    held_out: HeldOut, config: SparseAttentionConfig, limits: Limits
) -> tuple[SparseAttentionConfig, set[Phase]]:
    """The level, and in the provenance what each that was tried costs."""
    assert config.tables is not None
    levels = sorted(config.levels, reverse=True)  # from the least skipping on
    exact: set[Phase] = set()
    chosen, rows = min(levels), []
    for name, geometry in config.tables.geometries.items():
        for phase in limits.phases:
            if config.tables.table(name, phase) is None:
                continue
            tried = [replace(config, level=level) for level in levels]
            best, costs = _best(held_out, tried, geometry, phase, limits)
            if best is None:
                exact.add(phase)
            else:
                chosen = max(chosen, levels[best])
            about = {"geometry": name, "phase": phase}
            rows += [{**about, "level": levels[n], **cost.to_dict()} for n, cost in costs.items()]
    provenance = {**config.provenance, "level_costs": rows}
    return replace(config, level=chosen, provenance=provenance), exact


def _best(
    held_out: HeldOut,
    tried: Sequence[SparseAttentionConfig],
    geometry: BlockGeometry,
    phase: Phase,
    limits: Limits,
) -> tuple[int | None, dict[int, Cost]]:
    """The last of `tried`, ordered from the least skipping on, that is within the limits.

    Returns:
        Its number, None if there is none; and the costs that were measured, by number, ascending.
    """
    tried = [replace(config, geometry=geometry) for config in tried]
    costs: dict[int, Cost] = {}
    if phase == "decode":  # the prompt is most of the work: all at once after one
        costs = dict(enumerate(held_out.costs(tried, phase)))

    def fits(n: int) -> bool:
        if n not in costs:
            (costs[n],) = held_out.costs([tried[n]], phase)
        return limits.allow(costs[n], phase)

    best = last_that(fits, len(tried))
    return best, dict(sorted(costs.items()))


def last_that(fits: Callable[[int], bool], count: int) -> int | None:
    """The last of the numbers below `count` that fits, by bisection; None if even 0 does not.

    Those that fit are taken to come before those that do not.
    """
    low, high = -1, count  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low if low >= 0 else None
