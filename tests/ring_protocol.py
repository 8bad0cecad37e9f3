"""The barrier protocol of the sm_90a prefill kernel as a state machine; a search of all its runs.

Modelled after `csrc_cuda/sm90/{prefill,consumer}.cuh`: a producer that fills a ring of K slots and,
unless V comes on demand, a ring of V slots; consumers (warpgroups of one or more warps) that read
K, vote, and in their next step read V; barriers with counts, bytes and parities as the hardware has
them; copies that arrive at any time; products that read their slot from issue to wait. Numbers are
left out.

What a warpgroup does with a block (keep, skip, or look on because the block is not its own) is free
at every step, and `search` visits every state that any choices and any interleaving can lead to. It
raises `Broken` for a deadlock, a slot that is overwritten while it is read, another block in a slot
than its reader expects, and a barrier that gets more arrivals than it counts.

Two pairs of events are one step, which hides no error: to wait and then begin to read (a later
beginning could only find what a reader is protected from), and to end reading and then release.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from typing import Protocol as TypingProtocol

DECISIONS = ("keep", "skip", "other")


class Broken(Exception):
    """The protocol is wrong; the message says how."""


@dataclass(frozen=True)
class Protocol:
    """Its parameters; and what can be broken about it, to see that the search finds it."""

    steps: int = 5
    on_demand: bool = False
    k_slots: int = 2
    v_slots: int = 2  # on demand: of each warpgroup
    groups: int = 2
    warps: int = 1  # of a warpgroup
    mutation: str = ""


class Barrier(NamedTuple):
    missing: int
    bytes: int = 0
    parity: int = 0


class Warp(NamedTuple):
    """How far a consumer warp has come."""

    step: int
    decision: str  # of this step; "over": it has ended
    at: int = 0  # in the program of this step
    pending: int = -1  # the block whose product with V is still to come
    kept: int = 0  # blocks kept before
    met: int = 0  # votes begun


class State(NamedTuple):
    """Everything the future depends on."""

    produced: int  # how many copies the producer has begun
    warps: tuple[Warp, ...]
    decisions: frozenset[tuple[int, int, str]]  # group, step: what its slower warps will do too
    barriers: tuple[Barrier, ...]
    slots: tuple[Any, ...]  # which block is in it; None: nothing, or a copy that is on its way
    readers: tuple[int, ...]
    copies: frozenset[tuple[int, int]]  # slot, block
    meetings: tuple[int, ...]  # of each group: how often a warp has come to a vote


class Machine:
    """The moves of a protocol. Slots: K's, then V's; barriers: full and empty of each."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = p = protocol
        self.consumers = p.groups * p.warps
        self.n_slots = p.k_slots + p.v_slots * (p.groups if p.on_demand else 1)
        self.first = -1 if p.on_demand else 0  # Q is block -1 of K's ring
        self.items = [
            (kind, t) for t in range(self.first, p.steps) for kind in ("k", "v" * (not p.on_demand))
        ]
        self.items = [item for item in self.items if item[0]]

    def start(self) -> State:
        n, p = self.n_slots, self.protocol
        barriers = tuple(Barrier(1 if i % 2 == 0 else self.consumers) for i in range(2 * n))
        return State(
            0,
            tuple(Warp(self.first - 1, "start") for _ in range(self.consumers)),
            frozenset(),
            barriers,
            (None,) * n,
            (0,) * n,
            frozenset(),
            (0,) * p.groups,
        )

    def place(self, kind: str, turn: int, group: int = 0) -> tuple[int, int]:
        """Slot and parity of the `turn`-th use of a ring."""
        p = self.protocol
        if kind == "k":
            turn -= self.first
            return turn % p.k_slots, turn // p.k_slots % 2
        own = group * p.v_slots if p.on_demand else 0
        return p.k_slots + own + turn % p.v_slots, turn // p.v_slots % 2

    def program(self, warp: Warp, group: int, leader: bool) -> list[tuple[Any, ...]]:
        """What a warp does in its step, as consumer.cuh has it."""
        p, t, broken = self.protocol, warp.step, self.protocol.mutation
        do: list[tuple[Any, ...]] = []
        if warp.decision == "start":
            return do
        turn = warp.kept - 1 if p.on_demand else warp.pending  # of V, for the pending block
        last = (*self.place("v", max(turn, 0), group), warp.pending)
        finish = [("end", last[0])] if p.on_demand else [("end", last[0]), ("release", last[0])]
        if broken == "release V before it is read":
            finish.reverse()
        flush = [("begin", *last), *finish] if warp.pending >= 0 else []
        k_slot, k_parity = self.place("k", t)
        v_slot, v_parity = self.place("v", t)
        see_v = [("wait", v_slot, v_parity), ("release", v_slot)]
        if broken == "skip without waiting for V":
            see_v = see_v[1:]
        if t == p.steps:
            return flush
        if warp.decision == "other" or t < 0:  # or Q, which every warp copies
            do += flush if broken != "look on with V pending" else []
            do += [("wait", k_slot, k_parity), ("release", k_slot)]
            if broken == "look on without waiting for K":
                do = do[:-2] + do[-1:]
            return do + ([] if p.on_demand else see_v)
        if warp.pending >= 0:
            do.append(("begin", *last))
        do += [("begin", k_slot, k_parity, t), ("end", k_slot), ("release", k_slot)]
        if broken == "no vote":
            pass
        elif p.on_demand or p.warps > 1:
            do += [("meet",), ("met",)]
        if warp.decision == "keep" and p.on_demand and leader:
            do.append(("copy", self.place("v", warp.kept, group)[0], t))
        do += finish if warp.pending >= 0 else []
        if warp.decision == "skip" and not p.on_demand and broken != "skip without release of V":
            do += see_v
        return do

    def moves(self, state: State) -> Iterator[State]:
        """Every state that one step of anyone leads to."""
        for copy in state.copies:
            yield self.arrive(state, copy)
        if state.produced < len(self.items):
            yield from self.produce(state)
        for i in range(self.consumers):
            yield from self.consume(state, i)

    def done(self, state: State) -> bool:
        over = all(w.decision == "over" for w in state.warps)
        return over and state.produced == len(self.items) and not state.copies

    def produce(self, state: State) -> Iterator[State]:
        kind, t = self.items[state.produced]
        slot, parity = self.place(kind, t)
        if self.protocol.mutation != "producer waits for the wrong parity":
            parity ^= 1
        if state.barriers[2 * slot + 1].parity != parity:
            yield self.copy(state, slot, t)._replace(produced=state.produced + 1)

    def copy(self, state: State, slot: int, block: int) -> State:
        if state.readers[slot]:
            raise Broken(f"slot {slot} is overwritten while it is read")
        full = state.barriers[2 * slot]
        state = self.turn(state, 2 * slot, full._replace(missing=full.missing - 1, bytes=1))
        return state._replace(
            slots=put(state.slots, slot, None), copies=state.copies | {(slot, block)}
        )

    def arrive(self, state: State, copy: tuple[int, int]) -> State:
        slot, block = copy
        full = state.barriers[2 * slot]
        state = self.turn(state, 2 * slot, full._replace(bytes=0))
        return state._replace(
            slots=put(state.slots, slot, block), copies=state.copies - {(slot, block)}
        )

    def turn(self, state: State, i: int, barrier: Barrier) -> State:
        """Sets barrier i, which turns over if nothing is missing."""
        if barrier.missing < 0:
            raise Broken(f"barrier {i} gets more arrivals than it counts")
        if barrier.missing == 0 and barrier.bytes == 0:
            count = 1 if i % 2 == 0 else self.consumers
            barrier = Barrier(count, 0, barrier.parity ^ 1)
        return state._replace(barriers=put(state.barriers, i, barrier))

    def consume(self, state: State, i: int) -> Iterator[State]:
        p, warp, group = self.protocol, state.warps[i], i // self.protocol.warps
        if warp.decision == "over":
            return
        program = self.program(warp, group, i % p.warps == 0)
        if warp.at == len(program):
            following = self.next_step(warp)
            for decision in self.choices(state, group, following.step):
                warps = put(state.warps, i, following._replace(decision=decision))
                slowest = min(w.step for w in warps[group * p.warps : (group + 1) * p.warps])
                decided = state.decisions | {(group, following.step, decision)}
                yield state._replace(
                    decisions=frozenset(d for d in decided if d[0] != group or d[1] > slowest),
                    warps=warps,
                )
            return
        kind, *what = program[warp.at]
        ahead = warp._replace(at=warp.at + 1, met=warp.met + (kind == "meet"))
        after = state._replace(warps=put(state.warps, i, ahead))
        if kind in ("wait", "begin") and state.barriers[2 * what[0]].parity == what[1]:
            return
        if kind == "begin":
            after = begin(after, what[0], what[2])
        elif kind == "end":
            after = end(after, what[0])
        elif kind == "release":
            empty = state.barriers[2 * what[0] + 1]
            after = self.turn(after, 2 * what[0] + 1, empty._replace(missing=empty.missing - 1))
        elif kind == "copy":
            after = self.copy(after, *what)
        elif kind == "meet":
            after = after._replace(meetings=put(state.meetings, group, state.meetings[group] + 1))
        elif kind == "met" and state.meetings[group] < p.warps * warp.met:
            return
        yield after

    def choices(self, state: State, group: int, step: int) -> tuple[str, ...]:
        """What a warp may do in a step: what the first of its group to come there chose."""
        if step > self.protocol.steps:
            return ("over",)
        if step == self.protocol.steps or step < 0:
            return ("last",)
        decided = [d for g, t, d in state.decisions if (g, t) == (group, step)]
        return tuple(decided) or DECISIONS

    def next_step(self, warp: Warp) -> Warp:
        kept = warp.decision == "keep"
        pending = warp.step if kept else -1
        if warp.decision == "other" and self.protocol.mutation == "look on with V pending":
            pending = warp.pending
        return Warp(warp.step + 1, "", 0, pending, warp.kept + kept, warp.met)


def put(items: tuple[Any, ...], i: int, item: Any) -> tuple[Any, ...]:
    return (*items[:i], item, *items[i + 1 :])


def search(protocol: Protocol) -> int:
    """Visits every reachable state of `protocol`; returns how many there are.

    Raises:
        Broken: if one of them is wrong.
    """
    return explore(Machine(protocol))


class Explorable(TypingProtocol):
    """What has states."""

    def start(self) -> Any: ...

    def moves(self, state: Any) -> Iterator[Any]: ...

    def done(self, state: Any) -> bool: ...


def explore(machine: Explorable) -> int:
    """Visits every reachable state of `machine`; returns how many there are.

    Raises:
        Broken: if one of them is wrong.
    """
    start = machine.start()
    seen, todo = {start}, [start]
    while todo:
        state = todo.pop()
        stuck = True
        for after in machine.moves(state):
            stuck = False
            if after not in seen:
                seen.add(after)
                todo.append(after)
        if stuck and not machine.done(state):
            raise Broken(f"deadlock: {state.warps}")
    return len(seen)


def begin(state: Any, slot: int, block: int) -> Any:
    """A warp reads `block` in `slot` from now on."""
    if state.slots[slot] != block:
        raise Broken(f"slot {slot}: expected block {block}, got {state.slots[slot]}")
    return state._replace(readers=put(state.readers, slot, state.readers[slot] + 1))


def end(state: Any, slot: int) -> Any:
    """It has read it."""
    return state._replace(readers=put(state.readers, slot, state.readers[slot] - 1))
