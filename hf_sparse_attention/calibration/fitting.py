"""BLASST's fit: from gap histograms to the scale factor `a * exp(b * target_sparsity)`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_sparse_attention.calibration.observation import Observations
from hf_sparse_attention.calibration.tallies import BINS_PER_NAT, U_BINS, U_MIN
from hf_sparse_attention.fits import Fit, PhaseFit
from hf_sparse_attention.types import PHASES, Phase


@dataclass(frozen=True)
class Curve:
    """Sparsity as a function of the scale factor; from a histogram `[U_BINS + 1]`."""

    counts: Tensor

    @property
    def _below(self) -> Tensor:
        """Share of blocks below each bin edge, `[U_BINS + 1]`."""
        counts = self.counts.double()
        return torch.cat([counts.new_zeros(1), counts[:-1].cumsum(0)]) / counts.sum()

    @property
    def largest(self) -> float:
        """The sparsity that lambda -> 1 gives."""
        return float(self._below[-1])

    def sparsity(self, scale_factor: float) -> float:
        """The share of blocks that `scale_factor` skips."""
        if scale_factor <= 0:
            return 0.0
        x = min(max((math.log(scale_factor) - U_MIN) * BINS_PER_NAT, 0.0), float(U_BINS))
        i = min(int(x), U_BINS - 1)
        low, high = self._below[i : i + 2].tolist()
        return float(low + (high - low) * (x - i))

    def log_scale_factor(self, sparsity: float) -> float:
        """The logarithm of the scale factor that skips a share of `sparsity` (< `largest`)."""
        below = self._below
        i = int((below <= sparsity).sum()) - 1  # the bin that it falls into
        low, high = below[i : i + 2].tolist()
        return float(U_MIN + (i + (sparsity - low) / (high - low)) / BINS_PER_NAT)


def fit_blasst(observations: Observations, geometry: str, targets: Sequence[float]) -> Fit:
    """`a` and `b` of `a * exp(b * target_sparsity)` by phase, and how well they fit.

    Least squares of the logarithm over all lengths and targets. With one target b is 0 and the
    scale factor is the geometric mean over lengths: lambda = a / L, version 1 of the paper.

    Raises:
        ValueError: no length reaches any of the targets.
    """
    phases: dict[Phase, PhaseFit] = {}
    shortest = observations.lengths("prefill")[0]
    for phase in PHASES:
        # Every sample also holds short decode positions. Nobody decodes there who runs requests of
        # these lengths, and with their few blocks they would pull the fit away.
        lengths = [n for n in observations.lengths(phase) if n >= shortest / 2]
        curves = {n: Curve(observations.total(geometry, phase, n)) for n in lengths}
        points = [
            (s, curve.log_scale_factor(s))
            for curve in curves.values()
            for s in targets
            if s < curve.largest
        ]
        if not points:
            best = max((curve.largest for curve in curves.values()), default=0.0)
            raise ValueError(
                f"target_sparsity: expected less than {best:.2f} in {phase}, all that lambda < 1 "
                f"skips at lengths {lengths}, got {list(targets)}; calibrate on longer samples"
            )
        x, y = zip(*points, strict=True)
        log_a, b, r2, residual = _fit_line(x, y)
        fit = PhaseFit(
            a=math.exp(log_a),
            b=b,
            lengths=(min(curves), max(curves)),
            sparsity=(min(x), max(x)),
            r2=r2,
            residual=residual,
        )
        phases[phase] = replace(fit, predicted=_predicted(curves, fit, targets))
    return Fit(observations.geometries[geometry], phases)


def _fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float | None, float]:
    """Intercept, slope, R^2 and rms residual of y over x; slope 0 and no R^2 if all x are one."""
    xs, ys = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    dx, dy = xs - xs.mean(), ys - ys.mean()
    if len(set(x)) == 1:
        return float(ys.mean()), 0.0, None, float((dy * dy).mean().sqrt())
    slope = float((dx * dy).sum() / (dx * dx).sum())
    spread, rest = float((dy * dy).sum()), float(((dy - slope * dx) ** 2).sum())
    r2 = 1.0 - rest / spread if spread > 0 else 1.0
    return float(ys.mean() - slope * xs.mean()), slope, r2, math.sqrt(rest / len(x))


def _predicted(
    curves: Mapping[int, Curve], fit: PhaseFit, targets: Sequence[float]
) -> dict[str, dict[str, float]]:
    """The sparsity that the fit gives on the calibration data, by length and target."""
    return {
        str(n): {f"{s:g}": round(curve.sparsity(fit.scale_factor(s)), 4) for s in targets}
        for n, curve in curves.items()
    }
