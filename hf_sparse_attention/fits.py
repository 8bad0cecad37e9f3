"""`Fit`: what calibration knows about one block geometry; JSON-ready, kept in config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_sparse_attention import config_values as values
from hf_sparse_attention.types import PHASES, BlockGeometry, Phase

#: How far beyond the calibrated lengths a fit is trusted: half an octave either way.
LENGTH_TOLERANCE = math.sqrt(2.0)


@dataclass(frozen=True)
class PhaseFit:
    """One phase under one geometry: `scale_factor = a * exp(b * target_sparsity)`.

    Args:
        a: factor; b: exponent. b = 0 is version 1 of the paper, for a single target.
        lengths: the shortest and the longest request that was calibrated, in keys.
        sparsity: the lowest and the highest target that the fit is made of.
        r2: R^2 of the fit of `ln(scale_factor)` on the target or, with b = 0, of lambda on 1 / L;
            None where there was but one to fit.
        residual: root mean square of what the fit leaves of `ln(scale_factor)`.
        budget: `{"a", "b"}` of the budget rule's `eps = a * exp(b * target_sparsity)`.
        target_sparsity: chosen by what it costs; holds where the config sets no other.
        predicted: sparsity on the calibration data, `predicted[length][target]`.
        held_out: rows of `length`, `target` and `measured` sparsity on text that was not fitted, at
            the activations of a dense pass.
        costs: what targets cost when they ran on held-out text, if one was chosen by that: rows of
            `target`, `measured` sparsity, `kl` in nats, and `ppl_increase`.

    Raises:
        ValueError: for a value out of its range.
    """

    a: float
    b: float = 0.0
    lengths: tuple[int, int] | None = None
    sparsity: tuple[float, float] | None = None
    r2: float | None = None
    residual: float | None = None
    budget: dict[str, float] | None = None
    target_sparsity: float | None = None
    predicted: dict[str, dict[str, float]] = field(default_factory=dict)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    costs: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("a", values.number("a", self.a))
        put("b", values.number("b", self.b, least=-math.inf))
        if self.target_sparsity is not None:
            put("target_sparsity", values.number("target_sparsity", self.target_sparsity, below=1))
        if self.budget is not None:
            if set(self.budget) != {"a", "b"}:
                raise ValueError(f"budget: expected the keys 'a' and 'b', got {list(self.budget)}")
            values.number("budget['a']", self.budget["a"])
            values.number("budget['b']", self.budget["b"], least=-math.inf)
        for name in ("lengths", "sparsity"):
            ends = getattr(self, name)
            if ends is None:
                continue
            if len(ends) != 2 or not ends[0] <= ends[1]:
                raise ValueError(f"{name}: expected [least, most], got {ends!r}")
            put(name, tuple(values.number(name, end) for end in ends))
        if self.lengths is not None:
            put("lengths", (int(self.lengths[0]), int(self.lengths[1])))

    def scale_factor(self, target_sparsity: float) -> float:
        """`a * exp(b * target_sparsity)`."""
        return values.exponential(self.a, self.b, target_sparsity)

    def max_dropped_mass(self, target_sparsity: float) -> float | None:
        """The budget eps that skips `target_sparsity`; None if that was not fitted."""
        if self.budget is None:
            return None
        return values.exponential(self.budget["a"], self.budget["b"], target_sparsity)

    def covers_length(self, kv_len: int) -> bool:
        """Whether requests of `kv_len` keys lie near those calibrated."""
        if self.lengths is None:
            return True
        low, high = self.lengths
        return low / LENGTH_TOLERANCE <= kv_len <= high * LENGTH_TOLERANCE

    def covers_target(self, target_sparsity: float) -> bool:
        """Whether `target_sparsity` lies among those fitted."""
        if self.sparsity is None or self.b == 0:
            return True
        low, high = self.sparsity
        return low - 1e-6 <= target_sparsity <= high + 1e-6


@dataclass(frozen=True)
class Fit:
    """What was calibrated for `geometry`; a phase that is absent was not."""

    geometry: BlockGeometry
    phases: dict[Phase, PhaseFit]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; what is None or empty is left out."""
        data: dict[str, Any] = {"geometry": asdict(self.geometry)}
        for phase, fit in self.phases.items():
            data[phase] = {
                name: list(x) if isinstance(x, tuple) else x
                for name, x in asdict(fit).items()
                if x not in (None, {}, [])
            }
        return data

    @classmethod
    def from_dict(cls, data: Any) -> Fit:
        """The inverse of `to_dict`.

        Raises:
            ValueError: for unknown keys or values out of range.
        """
        if not isinstance(data, Mapping) or "geometry" not in data:
            raise ValueError(f"fits: expected a dict with a 'geometry' for each, got {data!r}")
        if unknown := sorted(set(data) - {"geometry", *PHASES}):
            raise ValueError(f"fits: expected keys of {['geometry', *PHASES]}, got {unknown}")
        geometry = values.geometry(data["geometry"])
        phases: dict[Phase, PhaseFit] = {}
        for phase in PHASES:
            if phase not in data:
                continue
            where = f"fits[{geometry.name!r}][{phase!r}]"
            entries = data[phase]
            if not isinstance(entries, Mapping) or "a" not in entries:
                raise ValueError(f"{where}: expected a dict with 'a' and 'b', got {entries!r}")
            if unknown := sorted(set(entries) - set(PhaseFit.__dataclass_fields__)):
                known = sorted(PhaseFit.__dataclass_fields__)
                raise ValueError(f"{where}: expected keys of {known}, got {unknown}")
            try:
                phases[phase] = PhaseFit(**entries)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: {error}") from error
        return cls(geometry, phases)


def fits(value: Any) -> dict[str, Fit]:
    """Fits by their geometry's name, from those or from their dicts."""
    if not isinstance(value, Mapping):
        raise ValueError(f"fits: expected a dict by geometry, got {value!r}")
    read = {}
    for name, fit in value.items():
        read[name] = fit if isinstance(fit, Fit) else Fit.from_dict(fit)
        if read[name].geometry.name != name:
            raise ValueError(
                f"fits: expected the fit of {name!r} under that name, got that of "
                f"{read[name].geometry.name!r}"
            )
    return read
