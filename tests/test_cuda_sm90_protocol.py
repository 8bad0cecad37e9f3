"""The barrier protocols of the sm_90a kernels: every run is right, and errors are found."""

from __future__ import annotations

from dataclasses import replace

import pytest
from decode_protocol import DecodeMachine, DecodeProtocol
from ring_protocol import Broken, Protocol, explore, search

ALWAYS = Protocol(steps=4)
ON_DEMAND = Protocol(steps=5, on_demand=True, groups=1, warps=2)

RIGHT = {
    "V always loaded": replace(ALWAYS, steps=3),
    "V always loaded, rings of one slot": replace(ALWAYS, k_slots=1, v_slots=1),
    "V always loaded, warps apart": Protocol(steps=4, groups=1, warps=2),
    "V on demand": ON_DEMAND,
    "V on demand, two warpgroups": Protocol(steps=3, on_demand=True),
}


@pytest.mark.parametrize("name", RIGHT)
def test_every_run_is_right(name: str) -> None:
    assert search(RIGHT[name]) > 1000


BROKEN = {
    "skip without release of V": (ALWAYS, "deadlock"),
    "skip without waiting for V": (ALWAYS, "more arrivals"),
    "look on without waiting for K": (ALWAYS, "deadlock"),
    "look on with V pending": (ALWAYS, "overwritten while it is read"),
    "release V before it is read": (ALWAYS, "overwritten while it is read"),
    "producer waits for the wrong parity": (ALWAYS, "deadlock"),
    "no vote": (ON_DEMAND, "overwritten while it is read"),
}


@pytest.mark.parametrize("mutation", BROKEN)
def test_a_broken_protocol_is_found_out(mutation: str) -> None:
    protocol, found = BROKEN[mutation]
    with pytest.raises(Broken, match=found):
        search(replace(protocol, mutation=mutation))


def test_on_demand_needs_two_slots() -> None:
    """The next V is asked for while the product with the last one runs."""
    with pytest.raises(Broken, match="overwritten while it is read"):
        search(replace(ON_DEMAND, v_slots=1))


DECODE = DecodeProtocol()
DECODE_RIGHT = {
    "V after votes at first": DECODE,
    "V ahead from the start": replace(DECODE, starts_ahead=True),
    "rings of three": replace(DECODE, k_slots=3, v_slots=3, starts_ahead=True),
    "three warps": replace(DECODE, steps=3, warps=3),
    # Where an int8 copy of K proves blocks to be skipped, they are no steps: few may be left.
    "fewer steps than slots": replace(DECODE, steps=2, k_slots=3, v_slots=3, warps=3),
    "fewer steps than slots, V ahead": replace(
        DECODE, steps=3, k_slots=4, v_slots=4, starts_ahead=True
    ),
}


@pytest.mark.parametrize("name", DECODE_RIGHT)
def test_every_run_of_decode_is_right(name: str) -> None:
    assert explore(DecodeMachine(DECODE_RIGHT[name])) > 1000


DECODE_BROKEN = {
    "asks without waiting for what was passed over": "more arrivals than it counts",
    "a pending product's slot counts as free": "overwritten while it is read|expected block",
    "passes over V with a product pending": "expected block",
    "asks for K before the barrier": "overwritten while it is read",
    "no barrier before the last product": "expected block",
    "nobody waits at the end": "used for something else",
    "one place for maxima": "reads maxima of step",
}


@pytest.mark.parametrize("mutation", DECODE_BROKEN)
def test_a_broken_protocol_of_decode_is_found_out(mutation: str) -> None:
    protocol = replace(DECODE, steps=5, mutation=mutation)
    with pytest.raises(Broken, match=DECODE_BROKEN[mutation]):
        explore(DecodeMachine(protocol))
