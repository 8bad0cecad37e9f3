"""Option values that are several numbers, and output as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import typer

Number = TypeVar("Number", int, float)

NUMBERS = "N,N,..."
BY_PHASE = "X|prefill=X,decode=X"


def _numbers(text: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"expected numbers with commas between them, got {text!r}"
        ) from error


def integers(text: str) -> list[int]:
    """`1024,2048` as a list."""
    return _numbers(text, int)


def floats(text: str) -> list[float]:
    """`0.3,0.5` as a list."""
    return _numbers(text, float)


def names(text: str) -> list[str]:
    """`64x64,64x1` as a list."""
    return text.split(",")


def by_phase(text: str) -> float | dict[str, float]:
    """`0.5` for both phases, or `prefill=0.5,decode=0.3`."""
    try:
        if "=" not in text:
            return float(text)
        pairs = (part.split("=") for part in text.split(","))
        found = {phase.strip(): float(number) for phase, number in pairs}
    except ValueError:
        found = {}
    if not found or set(found) - {"prefill", "decode"}:
        raise typer.BadParameter(f"expected 0.5 or prefill=0.5,decode=0.3, got {text!r}")
    return found


def print_json(data: Any) -> None:
    """One JSON object on stdout."""
    typer.echo(json.dumps(data, indent=2, allow_nan=False))
