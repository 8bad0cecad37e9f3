"""What a config's thresholds skip on text that was observed: predicted, and held out.

Gaps are those of a dense pass. What runs differs a little: skipping in one layer moves the
activations of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_sparse_attention.calibration.curves import rows_of
from hf_sparse_attention.calibration.fitting import lengths_of
from hf_sparse_attention.calibration.observation import Observations
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.fits import Fit
from hf_sparse_attention.types import Phase


def with_predictions(
    config: SparseAttentionConfig,
    observations: Observations,
    held_out: Observations | None,
    targets: Sequence[float],
) -> SparseAttentionConfig:
    """`config` with the tables `predicted` and `held_out` of its fits filled in.

    Args:
        config: what was fitted.
        observations: of the text that it was fitted on.
        held_out: of other text, with the same geometries; None leaves that table empty.
        targets: the target sparsities to look at.
    """
    fits: dict[str, Fit] = {}
    for name, fit in config.fits.items():
        phases = dict(fit.phases)
        for phase in phases:
            predicted = sparsities(config, observations, name, phase, targets)
            measured = (
                [] if held_out is None else sparsities(config, held_out, name, phase, targets)
            )
            by_length: dict[str, dict[str, float]] = {}
            for length, target, sparsity in predicted:
                by_length.setdefault(str(length), {})[f"{target:g}"] = sparsity
            phases[phase] = replace(
                phases[phase],
                predicted=by_length,
                held_out=[
                    {"length": length, "target": target, "measured": sparsity}
                    for length, target, sparsity in measured
                ],
            )
        fits[name] = replace(fit, phases=phases)
    return replace(config, fits=fits)


def sparsities(
    config: SparseAttentionConfig,
    observations: Observations,
    geometry: str,
    phase: Phase,
    targets: Sequence[float],
) -> list[tuple[int, float, float]]:
    """What each target skips at each length: rows of length, target and sparsity."""
    return [
        (length, target, round(curves.total_sparsity(log_factor), 4))
        for target in targets
        for log_factor in [log_factors(config, observations, geometry, phase, target)]
        for length, curves in lengths_of(observations, geometry, phase, config.granularity).items()
    ]


def log_factors(
    config: SparseAttentionConfig,
    observations: Observations,
    geometry: str,
    phase: Phase,
    target: float,
) -> Tensor:
    """`ln(scale_factor)` under `target` for each row of the curves, `[rows]` or `[1]`."""
    if config.granularity != "global" and config.tables is not None:
        own = config.tables.coefficients(geometry, phase)
        if own is not None:
            log_a, b = own
            table = log_a + b * target
            return rows_of(table, observations, geometry, phase, config.granularity)
    fit = config.fits[geometry].phases[phase]
    return torch.tensor([fit.scale_factor(target)], dtype=torch.float64).log()
