"""Checks of single values in a config: each error names the setting, expected and got."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from hf_sparse_attention.types import ORDERS, PHASES, BlockGeometry, Phase


def number(name: str, value: Any, *, least: float = 0.0, below: float = math.inf) -> float:
    """`value` as a float; it must be a number in `[least, below)`, so not NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    if not least <= value < below:
        raise ValueError(f"{name}: expected a number in [{least:g}, {below:g}), got {value!r}")
    return float(value)


def integer(name: str, value: Any, *, least: int) -> None:
    """Refuses what is not an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")


def integers(name: str, value: Any, *, least: int) -> list[int]:
    """`value` as a list of integers, each of at least `least`."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name}: expected a list of integers, got {value!r}")
    for x in value:
        integer(name, x, least=least)
    return list(value)


def names(name: str, value: Any) -> list[str]:
    """`value` as a list of strings."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(x, str) for x in value):
        raise ValueError(f"{name}: expected a list of names, got {value!r}")
    return list(value)


def pin(name: str, value: Any) -> dict[str, str]:
    """`{"name", "sha256"}` of a file that lies in the same folder."""
    if not isinstance(value, Mapping) or set(value) != {"name", "sha256"}:
        raise ValueError(f"{name}: expected 'name' and 'sha256', got {value!r}")
    names(name, list(value.values()))
    if PurePath(value["name"]).name != value["name"]:
        raise ValueError(f"{name}: expected a plain file name, got {value['name']!r}")
    return dict(value)


def _phases(name: str, value: Any) -> dict[Phase, Any] | None:
    """A value for both phases as a dict; None and an empty dict are None."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return dict.fromkeys(PHASES, value)
    if unknown := [phase for phase in value if phase not in PHASES]:
        raise ValueError(f"{name}: expected phases of {list(PHASES)}, got {unknown}")
    return {phase: value[phase] for phase in PHASES if value.get(phase) is not None} or None


def by_phase(name: str, value: Any, *, below: float = math.inf) -> dict[Phase, float] | None:
    """A number for each phase in `[0, below)`, from one number or a dict; None if there is none."""
    phases = _phases(name, value)
    return phases and {p: number(f"{name}[{p!r}]", x, below=below) for p, x in phases.items()}


def factors(value: Any) -> dict[Phase, dict[str, float]] | None:
    """`{phase: {"a", "b"}}` from that, or from plain numbers, where a is the number and b is 0."""
    name = "threshold_scale_factor"
    if isinstance(value, Mapping) and value and {"a", "b"} >= set(value):
        raise ValueError(f"{name}: expected phases of {list(PHASES)}, got {sorted(value)}")
    phases = _phases(name, value)
    if phases is None:
        return None
    fits: dict[Phase, dict[str, float]] = {}
    for phase, fit in phases.items():
        where = f"{name}[{phase!r}]"
        if not isinstance(fit, Mapping):
            fit = {"a": fit, "b": 0.0}
        if set(fit) != {"a", "b"}:
            raise ValueError(f"{where}: expected the keys 'a' and 'b', got {sorted(fit)}")
        fits[phase] = {
            "a": number(f"{where}['a']", fit["a"]),
            "b": number(f"{where}['b']", fit["b"], least=-math.inf),
        }
    return fits


def geometry(value: Any) -> BlockGeometry:
    """A geometry from itself, its name or its dict of fields."""
    if isinstance(value, str):
        value = BlockGeometry.from_name(value)
    if isinstance(value, Mapping):
        known = set(BlockGeometry.__dataclass_fields__)
        if unknown := sorted(set(value) - known):
            raise ValueError(f"geometry: expected keys of {sorted(known)}, got {unknown}")
        value = BlockGeometry(**value)
    if not isinstance(value, BlockGeometry):
        raise ValueError(f"geometry: expected a BlockGeometry or '<rows>x<keys>', got {value!r}")
    for name in ("block_q", "block_k", "split_k"):
        integer(f"geometry.{name}", getattr(value, name), least=1)
    if value.order not in ORDERS:
        raise ValueError(f"geometry.order: expected one of {list(ORDERS)}, got {value.order!r}")
    return value


def exponential(a: float, b: float, x: float) -> float:
    """`a * exp(b * x)`, kept finite."""
    return a * math.exp(min(b * x, 700.0))
