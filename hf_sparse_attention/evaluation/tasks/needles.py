"""Needles in a haystack: RULER's eight tasks of finding values by their keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_sparse_attention.evaluation.tasks.base import Draft, GrowingTask
from hf_sparse_attention.evaluation.tasks.draws import Draws
from hf_sparse_attention.evaluation.tasks.haystacks import NOISE, essay, key_word

#: Needles lie at one of forty depths between the start and the end of an essay.
DEPTHS = tuple(step / 39 for step in range(40))


@dataclass(frozen=True)
class NeedleTask(GrowingTask):
    """`niah_*`: needles "One of the special magic numbers for KEY is: VALUE." in a haystack.

    Attributes:
        haystack: sentences of an essay; one line over and over; or other needles.
        key: what keys are.
        value: what values are.
        keys: needles of different keys, of which some may only distract.
        values: needles that each key has.
        queries: keys that are asked for.
    """

    haystack: Literal["essay", "noise", "needles"] = "essay"
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def draft(self, units: int, length: int, draws: Draws) -> Draft:
        pairs = self._pairs(draws)
        asked = draws.some(list(pairs), self.queries)
        answers = tuple(value for key in asked for value in pairs[key])
        needles = [self.needle(key, value) for key, values in pairs.items() for value in values]
        context = self._context(units, draws.shuffled(needles), asked, draws)
        depth = None
        if len(answers) == 1:
            before, after = context.split(self.needle(asked[0], answers[0]))
            depth = len(before) / max(len(before) + len(after), 1)
        question, answer_prefix = self.ask(context, asked, many=len(answers) > 1)
        return Draft(question, answer_prefix, answers, depth)

    def needle(self, key: str, value: str) -> str:
        """The sentence that is hidden."""
        return f"One of the special magic {self.value} for {key} is: {value}."

    def ask(self, context: str, asked: list[str], *, many: bool) -> tuple[str, str]:
        """The question about `context`, and how its answer begins."""
        what = f"special magic {self.value if many else self.value.removesuffix('s')}"
        some, them, are, are_all = (
            ("Some", "them", "are", "are all") if many else ("A", "it", "is", "is")
        )
        names = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        question = (
            f"{some} {what} {are} hidden in the text below. Remember what it says: you will be "
            f"asked for {them} afterwards.\n{context}\n"
            f"What {are_all} the {what} for {names} that the text above mentions?"
        )
        return question, f" The {what} for {names} mentioned in the text {are}"

    def _pairs(self, draws: Draws) -> dict[str, list[str]]:
        pairs: dict[str, list[str]] = {}
        while len(pairs) < self.keys:
            pairs[self._key(draws)] = [self._value(draws) for _ in range(self.values)]
        return pairs

    def _key(self, draws: Draws) -> str:
        return key_word(draws) if self.key == "words" else draws.uuid()

    def _value(self, draws: Draws) -> str:
        return draws.number(7) if self.value == "numbers" else draws.uuid()

    def _context(self, units: int, needles: list[str], asked: list[str], draws: Draws) -> str:
        """The haystack with the needles in it."""
        if self.haystack == "essay":
            sentences = essay(units, draws)
            depths = draws.some(DEPTHS, len(needles))
            places = [round(depth * len(sentences)) for depth in depths]
        else:
            sentences = [self._line(asked, draws) for _ in range(units)]
            places = draws.some(range(units + 1), len(needles))
        hidden = put_in(sentences, dict(zip(needles, places, strict=True)))
        return (" " if self.haystack == "essay" else "\n").join(hidden)

    def _line(self, asked: list[str], draws: Draws) -> str:
        if self.haystack == "noise":
            return NOISE
        while (key := self._key(draws)) in asked:  # a question has one answer
            pass
        return self.needle(key, self._value(draws))


def put_in(sentences: list[str], places: dict[str, int]) -> list[str]:
    """`sentences` with each needle before the sentence that its place names."""
    context = list(sentences)
    # From the back, so that the places still to come are right.
    for needle, place in sorted(places.items(), key=lambda item: item[1], reverse=True):
        context.insert(place, needle)
    return context


NEEDLE_TASKS = (
    NeedleTask("niah_single_1", haystack="noise", max_new_tokens=128),
    NeedleTask("niah_single_2", max_new_tokens=128),
    NeedleTask("niah_single_3", value="uuids", max_new_tokens=128),
    NeedleTask("niah_multikey_1", keys=4, max_new_tokens=128),
    NeedleTask("niah_multikey_2", haystack="needles", max_new_tokens=128),
    NeedleTask(
        "niah_multikey_3", haystack="needles", key="uuids", value="uuids", max_new_tokens=128
    ),
    NeedleTask("niah_multivalue", values=4, max_new_tokens=128),
    NeedleTask("niah_multiquery", keys=4, queries=4, max_new_tokens=128),
)
