"""The protocol of Hopper's decode as a state machine, for `ring_protocol.explore`.

Modelled after `csrc_cuda/sm90/decode.cuh`: warps that read a block of K, meet at a barrier, decide
alike, and multiply a kept block's V when the next block is kept; the first of them asks for copies,
which arrive at any time. Numbers are left out. At every step it is free whether the block is kept
and whether V is asked for ahead.

Wrong are a deadlock, a slot that is overwritten while it is read, another block in a slot than its
reader expects, a barrier with more arrivals than it counts, maxima of another block than is
decided, and a copy that arrives once the memory is used for something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ring_protocol import Barrier, Broken, begin, end, put

CHOICES = [(keep, ahead) for keep in (True, False) for ahead in (True, False)]


@dataclass(frozen=True)
class DecodeProtocol:
    """Its parameters; and what can be broken about it, to see that the search finds it."""

    steps: int = 4
    k_slots: int = 2
    v_slots: int = 2
    warps: int = 2
    starts_ahead: bool = False  # V is asked for before anything is decided
    mutation: str = ""


class Warp(NamedTuple):
    """How far a warp has come. Of V: how much was asked for and taken, and the next to ask for."""

    step: int = 0
    program: tuple[tuple[Any, ...], ...] = ()  # what is left to do before anything else is decided
    asked: int = 0
    taken: int = 0
    next: int = 0
    pending: int = -1  # the step whose product with V is still to come
    told: int = -1  # the last step whose maxima it told
    met: int = 0
    over: bool = False


class State(NamedTuple):
    """Everything the future depends on."""

    warps: tuple[Warp, ...]
    decisions: tuple[tuple[bool, bool], ...]  # of each step: kept, and asked ahead
    barriers: tuple[Barrier, ...]
    slots: tuple[Any, ...]  # which block is in it; None: nothing, or a copy that is on its way
    readers: tuple[int, ...]
    copies: frozenset[tuple[int, int]]  # slot, block


class DecodeMachine:
    """The moves of a protocol. Slots, and their barriers: K's, then V's."""

    def __init__(self, protocol: DecodeProtocol) -> None:
        self.protocol = protocol

    def start(self) -> State:
        p = self.protocol
        n = p.k_slots + p.v_slots
        first: list[tuple[Any, ...]] = [("copy", t, t) for t in range(min(p.k_slots, p.steps))]
        asked = min(p.v_slots, p.steps) if p.starts_ahead else 0
        first += [("copy", self.v(t)[0], t) for t in range(asked)]
        warps = [
            self.look(Warp(program=self.asks(i, first), asked=asked, next=asked), i)
            for i in range(p.warps)
        ]
        return State(tuple(warps), (), (Barrier(1),) * n, (None,) * n, (0,) * n, frozenset())

    def asks(self, i: int, program: list[tuple[Any, ...]]) -> tuple[tuple[Any, ...], ...]:
        """`program`, of which warps other than the first leave out asking and what it waits for."""
        return tuple(x for x in program if i == 0 or x[0] not in ("copy", "await"))

    def v(self, n: int) -> tuple[int, int]:
        """Slot and parity of the n-th use of V's ring."""
        p = self.protocol
        return p.k_slots + n % p.v_slots, n // p.v_slots % 2

    def look(self, warp: Warp, i: int) -> Warp:
        """Goes on to this step's block of K, and up to the vote."""
        p, t = self.protocol, warp.step
        if t == p.steps:
            return self.finish(warp, i)
        slot, parity = t % p.k_slots, t // p.k_slots % 2
        more: list[tuple[Any, ...]] = [("begin", slot, parity, t), ("end", slot), ("tell", t)]
        ask = [("copy", slot, t + p.k_slots)] if t + p.k_slots < p.steps else []
        meet = [("meet",), ("met",)]
        early = p.mutation == "asks for K before the barrier"
        more += ask + meet if early else meet + ask
        return warp._replace(program=(*warp.program, *self.asks(i, more)))

    def finish(self, warp: Warp, i: int) -> Warp:
        p, broken = self.protocol, self.protocol.mutation
        do: list[tuple[Any, ...]] = []
        if broken != "no barrier before the last product":
            do += [("meet",), ("met",)]
        do += self.product(warp)
        if broken != "nobody waits at the end":
            for n in range(max(warp.asked - p.v_slots, 0), warp.asked):
                do.append(("await", *self.v(n)))
        do += [("meet",), ("met",), ("over",)]
        return warp._replace(program=(*warp.program, *self.asks(i, do)))

    def product(self, warp: Warp) -> list[tuple[Any, ...]]:
        if warp.pending < 0:
            return []
        slot, parity = self.v(warp.taken - 1)
        return [("begin", slot, parity, warp.pending), ("end", slot)]

    def decide(self, warp: Warp, i: int, keep: bool, ahead: bool) -> Warp:
        """What a warp does after the vote of its step, as the loop of decode_kernel has it."""
        p, t, broken = self.protocol, warp.step, self.protocol.mutation
        do: list[tuple[Any, ...]] = []
        free = warp.taken - (warp.pending >= 0)
        if broken == "a pending product's slot counts as free":
            free = warp.taken
        asked, following = warp.asked, warp.next
        was_asked = t < following
        takes = was_asked or keep

        def ask(step: int) -> None:
            nonlocal asked, following
            slot, parity = self.v(asked)
            if broken != "asks without waiting for what was passed over":
                do.append(("await", slot, parity ^ 1))
            do.append(("copy", slot, step))
            asked, following = asked + 1, step + 1

        if takes and not was_asked:
            ask(t)
        following = max(following, t + 1)
        while ahead and following < p.steps and asked - free < p.v_slots:
            ask(following)
        pending = warp.pending
        if keep or (takes and broken != "passes over V with a product pending"):
            do += self.product(warp)
            pending = t if keep else -1
        warp = warp._replace(
            step=t + 1,
            program=self.asks(i, do),
            asked=asked,
            taken=warp.taken + takes,
            next=following,
            pending=pending,
        )
        return self.look(warp, i)

    def moves(self, state: State) -> Iterator[State]:
        """Every state that one step of anyone leads to."""
        for slot, block in state.copies:
            after = self.turn(state, slot, state.barriers[slot]._replace(bytes=0))
            yield after._replace(
                slots=put(after.slots, slot, block), copies=after.copies - {(slot, block)}
            )
        for i in range(self.protocol.warps):
            yield from self.move(state, i)

    def done(self, state: State) -> bool:
        return all(w.over for w in state.warps) and not state.copies

    def move(self, state: State, i: int) -> Iterator[State]:
        warp = state.warps[i]
        if warp.over:
            return
        if not warp.program:  # the vote of its step is over
            self.check_maxima(state, warp)
            decided = state.decisions[warp.step : warp.step + 1] or CHOICES
            for choice in decided:
                yield state._replace(
                    warps=put(state.warps, i, self.decide(warp, i, *choice)),
                    decisions=(*state.decisions[: warp.step], choice)
                    if warp.step == len(state.decisions)
                    else state.decisions,
                )
            return
        (kind, *what), rest = warp.program[0], warp.program[1:]
        ahead = warp._replace(program=rest, met=warp.met + (kind == "meet"))
        if kind == "tell":
            ahead = ahead._replace(told=what[0])
        elif kind == "over":
            ahead = ahead._replace(over=True)
            if state.copies:
                raise Broken("a copy arrives when the memory is used for something else")
        after = state._replace(warps=put(state.warps, i, ahead))
        if kind in ("begin", "await") and state.barriers[what[0]].parity == what[1]:
            return
        if kind == "met" and any(w.met < warp.met for w in state.warps):
            return
        if kind == "begin":
            after = begin(after, what[0], what[2])
        elif kind == "end":
            after = end(after, what[0])
        elif kind == "copy":
            after = self.copy(after, *what)
        yield after

    def check_maxima(self, state: State, warp: Warp) -> None:
        """Those it reads are all of its step, though others may have told the next one's."""
        buffers = 1 if self.protocol.mutation == "one place for maxima" else 2
        for other in state.warps:
            last = other.told - (other.told - warp.step) % buffers
            if last != warp.step:
                raise Broken(f"reads maxima of step {last} in step {warp.step}")

    def copy(self, state: State, slot: int, block: int) -> State:
        if state.readers[slot]:
            raise Broken(f"slot {slot} is overwritten while it is read")
        full = state.barriers[slot]
        state = self.turn(state, slot, full._replace(missing=full.missing - 1, bytes=1))
        return state._replace(
            slots=put(state.slots, slot, None), copies=state.copies | {(slot, block)}
        )

    def turn(self, state: State, i: int, barrier: Barrier) -> State:
        if barrier.missing < 0:
            raise Broken(f"barrier {i} gets more arrivals than it counts")
        if barrier.missing == 0 and barrier.bytes == 0:
            barrier = Barrier(1, 0, barrier.parity ^ 1)
        return state._replace(barriers=put(state.barriers, i, barrier))
