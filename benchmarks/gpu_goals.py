"""Which of the goals for an H200 the times of `make gpu-check` reach: each named with its number.

A goal that was not timed has no number; it is neither met nor missed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]


def goals(rows: list[Row]) -> list[Row]:
    """Rows of `goal`, the number `wanted`, what was `measured` or None, and `met` or None.

    Args:
        rows: of the timing, as `gpu_measure.measure` makes them, with their names.
    """
    timed = {row["name"]: row["contestants"] for row in rows if row.get("contestants")}
    prefill, decode = timed.get("prefill 65536", {}), timed.get("decode 1 x 65536", {})
    backward = timed.get("backward 32768") or timed.get("backward 8192") or {}
    found = [
        ("prefill 64K, 0% sparse, over the fastest dense peer", 0.97, over_peer(prefill, "0%")),
        ("prefill 64K, 75% sparse, over the fastest dense peer", 1.62, over_peer(prefill, "75%")),
        ("prefill 64K, 75% sparse, over itself without a rule", 1.62, over_itself(prefill, "75%")),
        ("prefill 64K, 90% sparse, over the fastest dense peer", 2.0, over_peer(prefill, "90%")),
        ("prefill 64K, 10% sparse, over itself without a rule", 1.0, over_itself(prefill, "10%")),
        ("decode 64K, 0% sparse, over the fastest dense peer", 0.97, over_peer(decode, "0%")),
        ("decode 64K, 75% sparse, over the fastest dense peer", 1.55, over_peer(decode, "75%")),
        ("backward, 75% sparse, over itself at 0%", 2.5, over_itself(backward, "75%", "0% low")),
    ]
    return [
        {"goal": goal, "wanted": wanted, "measured": x, "met": None if x is None else x >= wanted}
        for goal, wanted, x in found
    ]


def of(contestants: Row, words: str) -> Iterable[tuple[str, Row]]:
    """Ours, but those that stand in for older GPUs, whose names end with `words`."""
    for name, x in contestants.items():
        ours = name.startswith(("cuda ", "triton ")) and not name.startswith("cuda of")
        if ours and name.endswith(f", {words}"):
            yield name, x


def over_peer(contestants: Row, share: str) -> float | None:
    """The fastest of ours with that share of low blocks, over the fastest peer."""
    found = (x["speedup_over_best_peer"] for _, x in of(contestants, f"{share} low"))
    return max(found, default=None)


def over_itself(contestants: Row, share: str, base: str = "no rule") -> float | None:
    """The best of ours with that share of low blocks, over the same backend's `base`."""
    bases = {name.split()[0]: x["seconds"] for name, x in of(contestants, base)}
    found = [
        bases[name.split()[0]] / x["seconds"]
        for name, x in of(contestants, f"{share} low")
        if name.split()[0] in bases
    ]
    return max(found, default=None)


def print_goals(rows: list[Row]) -> None:
    print("\ngoals")
    for row in rows:
        measured = "not timed" if row["measured"] is None else f"{row['measured']:.2f} x"
        verdict = {None: "", True: "met", False: "missed"}[row["met"]]
        print(f"  {row['goal']:55s} wanted {row['wanted']:.2f} x  {measured:>9s}  {verdict}")
