"""A register of made-up people and towns, and questions that lead from one to the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest

from hf_sparse_attention.evaluation.tasks.draws import Draws

_SYLLABLES = """bar bel bor cal dan der dor fal fen gar gel hal hol kar kel lam lin lor mar mel
mir nar nel nor pel per ral ren ror sal sel sor tal tar tel tor val ven ver vol wal wen yar
zel""".split()
_TRADES = """architect baker botanist bookbinder clockmaker composer engraver gardener geologist
glazier painter physician poet sculptor shipbuilder surveyor tailor weaver""".split()
_GOODS = """amber bells barrels candles cheese chairs cider clocks cloth combs glass gloves hats
honey kites lace lamps linen maps nails oars paper pears pottery ropes saddles salt silk soap
vinegar""".split()
_SURROUNDINGS = ("between two hills", "at the edge of a moor", "behind old walls", "near the coast")


@dataclass(frozen=True)
class Town:
    """A made-up town."""

    name: str
    river: str
    founded: int
    goods: str

    def entry(self, draws: Draws) -> str:
        """What the register says about it."""
        return (
            f"{self.name}\n{self.name} is a town {draws.one(_SURROUNDINGS)}. It lies on the river "
            f"{self.river} and was founded in {self.founded}. The town is known for its "
            f"{self.goods}. About {draws.number(5)} people live there."
        )

    def questions(self, person: str) -> list[tuple[str, str]]:
        """What can be asked about the town that `person` was born in, and the answers."""
        town = f"the town in which {person} was born"
        return [
            (f"On which river lies {town}?", self.river),
            (f"In which year was {town} founded?", str(self.founded)),
            (f"What is {town} known for?", self.goods),
        ]


def person_entry(name: str, town: str, draws: Draws) -> str:
    """What the register says about a person who was born in `town`."""
    born = 1700 + draws.below(200)
    return (
        f"{name}\n{name} was a {draws.one(_TRADES)}, born in {town} in {born}. The best known of "
        f"all works by {name} was finished in {born + 20 + draws.below(40)}, when it had taken "
        f"{2 + draws.below(9)} years. {name} had {2 + draws.below(6)} children."
    )


def linked_entries(count: int, draws: Draws) -> tuple[str, str, list[str]]:
    """A question, its answer, and `count` entries, the two that answer it first.

    The answer stands in no other entry.
    """
    made = _names(draws)
    towns = [
        Town(name, river, 1000 + draws.below(600), draws.one(_GOODS))
        for name, river in islice(zip(made, made, strict=False), count)
    ]
    people = [f"{first} {last}" for first, last in islice(zip(made, made, strict=False), count)]
    question, answer = draws.one(towns[0].questions(people[0]))
    others = [town for town in towns[1:] if answer not in (town.goods, str(town.founded))]
    entries = [person_entry(people[0], towns[0].name, draws), towns[0].entry(draws)]
    for person, town in zip_longest(people[1:], others):
        entries.append(person_entry(person, draws.one(towns[1:]).name, draws))
        if town:
            entries.append(town.entry(draws))
        if len(entries) >= count:
            break
    return question, answer, entries[:count]


def _names(draws: Draws) -> Iterator[str]:
    """Names such as Torvenhal: long enough that none is part of a word, and none comes twice."""
    taken: set[str] = set()
    while True:
        syllables = 3 if len(taken) < 10_000 else 4
        name = "".join(draws.one(_SYLLABLES) for _ in range(syllables)).capitalize()
        if name not in taken:
            taken.add(name)
            yield name
