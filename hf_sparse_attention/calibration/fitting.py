"""BLASST's fits: from histograms to the scale factor `a * exp(b * target_sparsity)`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hf_sparse_attention.calibration.curves import Curves, budget_sparsity, curves_of
from hf_sparse_attention.calibration.observation import Observations
from hf_sparse_attention.calibration.tallies import BUDGET_GRID
from hf_sparse_attention.config import Granularity
from hf_sparse_attention.fits import Fit, PhaseFit
from hf_sparse_attention.types import PHASES, Phase


def fit_blasst(observations: Observations, geometry: str, targets: Sequence[float]) -> Fit:
    """The fit for one geometry, of what all layers and heads share.

    Several targets: version 2 of the paper, least squares of `ln(scale_factor)` over all lengths
    and targets. One target: version 1, `lambda = a / L` by linear regression on 1 / L; b is 0.

    Raises:
        ValueError: no length reaches any of the targets.
    """
    phases: dict[Phase, PhaseFit] = {}
    for phase in PHASES:
        curves = lengths_of(observations, geometry, phase)
        points = [
            (n, s, float(each.log_factor(torch.tensor([s]))))
            for n, each in curves.items()
            for s in targets
            if s < float(each.largest)
        ]
        if not points:
            best = max((float(each.largest) for each in curves.values()), default=0.0)
            raise ValueError(
                f"target_sparsity: expected less than {best:.2f} in {phase} on {geometry}, all "
                f"that lambda < 1 skips at lengths {list(curves)}, got {list(targets)}; calibrate "
                "on longer samples"
            )
        reached = [s for _, s, _ in points]
        if len(set(targets)) == 1:
            line = _version_1(points)
        else:
            line = Line.through(reached, [y for _, _, y in points])
        phases[phase] = PhaseFit(
            a=math.exp(line.start),
            b=line.slope,
            lengths=(min(curves), max(curves)),
            sparsity=(min(reached), max(reached)),
            r2=line.r2,
            residual=line.residual,
            budget=_fit_budget(observations, geometry, phase, list(curves), targets),
        )
    return Fit(observations.geometries[geometry], phases)


def lengths_of(
    observations: Observations, geometry: str, phase: Phase, granularity: Granularity = "global"
) -> dict[int, Curves]:
    """The curves to fit, by length.

    Every sample also holds short decode positions. Nobody decodes there who runs requests of these
    lengths, and with their few blocks they would pull the fit away: those below half of the
    shortest sample are left out.
    """
    shortest = observations.lengths("prefill")[0]
    return {
        n: curves_of(observations, geometry, phase, n, granularity)
        for n in observations.lengths(phase)
        if n >= shortest / 2
    }


@dataclass(frozen=True)
class Line:
    """`start + slope * x`, and how well it fits.

    Args:
        start: at x = 0; slope: per unit of x.
        r2: None where all y are to be one.
        residual: root mean square of what is left of y.
    """

    start: float
    slope: float
    r2: float | None
    residual: float

    @classmethod
    def through(cls, x: Sequence[float], y: Sequence[float]) -> Line:
        """Least squares; slope 0 if all x are one."""
        xs, ys = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
        dx, dy = xs - xs.mean(), ys - ys.mean()
        if len(set(x)) == 1:
            return cls(float(ys.mean()), 0.0, None, float((dy * dy).mean().sqrt()))
        slope = float((dx * dy).sum() / (dx * dx).sum())
        rest = dy - slope * dx
        start = float(ys.mean() - slope * xs.mean())
        return cls(start, slope, _r2(dy, rest), float((rest * rest).mean().sqrt()))


def _version_1(points: Sequence[tuple[int, float, float]]) -> Line:
    """`lambda = a / L`, least squares of lambda on 1 / L through the origin; start is ln a."""
    inverse = torch.tensor([1.0 / n for n, _, _ in points], dtype=torch.float64)
    log_factor = torch.tensor([y for _, _, y in points], dtype=torch.float64)
    lam = log_factor.exp() * inverse
    a = (lam * inverse).sum() / (inverse * inverse).sum()
    r2 = _r2(lam - lam.mean(), lam - a * inverse) if len(points) > 1 else None
    rest = log_factor - a.log()
    return Line(float(a.log()), 0.0, r2, float((rest * rest).mean().sqrt()))


def _r2(spread: Tensor, rest: Tensor) -> float:
    total = float((spread * spread).sum())
    return 1.0 - float((rest * rest).sum()) / total if total > 0 else 1.0


def _fit_budget(
    observations: Observations,
    geometry: str,
    phase: Phase,
    lengths: Sequence[int],
    targets: Sequence[float],
) -> dict[str, float] | None:
    """`{"a", "b"}` of the budget rule's `eps = a * exp(b * s)`.

    Between the eps that were simulated, `ln eps` is taken as linear in the sparsity. None if eps up
    to 1 skip less than every target.
    """
    points: list[tuple[float, float]] = []
    for n in lengths:
        skipped = budget_sparsity(observations, geometry, phase, n)
        grid = pairwise(zip(skipped, BUDGET_GRID, strict=True))
        for (low, eps), (high, larger) in grid:
            for s in targets:
                if low <= s < high:
                    part = (s - low) / (high - low)
                    points.append((s, math.log(eps) + part * math.log(larger / eps)))
    if not points:
        return None
    x, y = zip(*points, strict=True)
    line = Line.through(x, y)
    return {"a": math.exp(line.start), "b": line.slope}
