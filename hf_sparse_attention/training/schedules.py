"""How strong the sparsity is at each step: pure functions of the step number.

A schedule has no state, so a run that is resumed at any step goes on exactly as it would have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

ScheduleName = Literal["constant", "linear", "cosine", "stepwise"]


@dataclass(frozen=True)
class Schedule:
    """Dense for a while, then a ramp from 0 to 1, then 1 to the end.

    Args:
        name: the ramp's shape. `constant` has none: 1 right after the dense steps. `linear` and
            `cosine` rise with every step. `stepwise` rises in equal steps: 1 / `stages` first.
        dense_steps: steps at the start that train dense: a number of steps, or a share of all steps
            if it is a float.
        ramp_steps: steps from the first sparse one to full strength, given likewise. Full strength
            is first reached at step `dense_steps + ramp_steps`.
        stages: of the stepwise ramp, full strength included.

    Raises:
        ValueError: a value out of its range.
    """

    name: ScheduleName = "linear"
    dense_steps: int | float = 0
    ramp_steps: int | float = 0.5
    stages: int = 4

    def __post_init__(self) -> None:
        if self.name not in get_args(ScheduleName):
            raise ValueError(
                f"schedule: expected one of {list(get_args(ScheduleName))}, got {self.name!r}"
            )
        for name in ("dense_steps", "ramp_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise ValueError(f"{name}: expected a number of steps or a share, got {value!r}")
            if isinstance(value, float) and value > 1.0:
                raise ValueError(
                    f"{name}: expected a whole number of steps or a share up to 1.0, got {value!r}"
                )
        if isinstance(self.stages, bool) or not isinstance(self.stages, int) or self.stages < 1:
            raise ValueError(f"stages: expected a positive integer, got {self.stages!r}")

    def steps(self, max_steps: int) -> tuple[int, int]:
        """The first sparse step and the first at full strength, in a run of `max_steps`.

        Raises:
            ValueError: full strength would come after the last step.
        """
        dense = _steps(self.dense_steps, max_steps)
        ramp = 0 if self.name == "constant" else _steps(self.ramp_steps, max_steps)
        if dense + ramp >= max_steps:
            raise ValueError(
                f"schedule: expected full strength by the last of the run's {max_steps} steps, got "
                f"{dense} dense_steps + {ramp} ramp_steps = {dense + ramp} steps before it"
            )
        return dense, dense + ramp

    def strength(self, step: int, max_steps: int) -> float | None:
        """In (0, 1] at `step` (the first is 0) of a run of `max_steps`; None while training dense.

        Raises:
            ValueError: as `steps`.
        """
        dense, full = self.steps(max_steps)
        if step < dense:
            return None
        if step >= full:
            return 1.0
        x = (step - dense + 1) / (full - dense + 1)  # neither 0, which is dense, nor 1
        if self.name == "cosine":
            return (1.0 - math.cos(math.pi * x)) / 2.0
        if self.name == "stepwise":
            # As many stages as the ramp has room for below 1; 1 itself comes right after it.
            return (math.floor(x * (self.stages - 1)) + 1) / self.stages
        return x


def _steps(value: int | float, max_steps: int) -> int:
    return round(value * max_steps) if isinstance(value, float) else value
