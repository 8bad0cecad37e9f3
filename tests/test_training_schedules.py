"""Schedules are pure functions of the step number."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hf_sparse_attention.training import Schedule


def strengths(schedule: Schedule, max_steps: int) -> list[float | None]:
    return [schedule.strength(step, max_steps) for step in range(max_steps)]


def test_constant_is_full_right_after_the_dense_steps() -> None:
    assert strengths(Schedule("constant", dense_steps=2), 4) == [None, None, 1.0, 1.0]


def test_linear_rises_by_equal_steps_between_dense_and_full() -> None:
    found = strengths(Schedule("linear", dense_steps=1, ramp_steps=3), 6)
    assert found == [None, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_rises_slowly_fast_slowly() -> None:
    found = strengths(Schedule("cosine", ramp_steps=3), 5)
    expected = [(1 - math.cos(math.pi * x)) / 2 for x in (0.25, 0.5, 0.75)]
    assert found == [*expected, 1.0, 1.0]


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (1, [1.0] * 6 + [1.0]),
        (2, [0.5] * 6 + [1.0]),
        (4, [0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0]),
    ],
)
def test_stepwise_rises_in_stages_of_equal_length(stages: int, expected: list[float]) -> None:
    assert strengths(Schedule("stepwise", ramp_steps=6, stages=stages), 7) == expected


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "stepwise"])
@pytest.mark.parametrize("max_steps", [3, 10, 997])
def test_any_ramp_rises_and_is_full_from_its_end_on(name: Any, max_steps: int) -> None:
    schedule = Schedule(name, dense_steps=0.2, ramp_steps=0.4)
    dense, full = schedule.steps(max_steps)
    found = strengths(schedule, max_steps)
    assert found[:dense] == [None] * dense
    sparse = [x for x in found if x is not None]
    assert sparse == sorted(sparse)
    assert sparse[0] > 0
    assert all(x < 1.0 for x in found[dense:full] if x is not None)
    assert found[full:] == [1.0] * (max_steps - full)


def test_shares_of_the_run_and_numbers_of_steps_agree() -> None:
    shares = Schedule("linear", dense_steps=0.1, ramp_steps=0.5)
    assert shares.steps(40) == Schedule("linear", dense_steps=4, ramp_steps=20).steps(40) == (4, 24)


@pytest.mark.parametrize(("dense", "ramp"), [(5, 5), (0, 10), (0, 11), (1.0, 0), (0.5, 0.5)])
def test_full_strength_that_no_step_would_see_is_refused(dense: float, ramp: float) -> None:
    with pytest.raises(ValueError, match="the run's 10 steps, got"):
        Schedule("linear", dense_steps=dense, ramp_steps=ramp).steps(10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "exponential"}, "expected one of .*'linear'.*got 'exponential'"),
        ({"dense_steps": -1}, "dense_steps: expected a number of steps or a share, got -1"),
        ({"ramp_steps": 2.5}, "ramp_steps: expected a whole number .* got 2.5"),
        ({"ramp_steps": float("nan")}, "ramp_steps: expected a number"),
        ({"ramp_steps": True}, "ramp_steps: expected a number of steps or a share, got True"),
        ({"stages": 0}, "stages: expected a positive integer, got 0"),
    ],
)
def test_bad_schedules_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**changes)
