"""Counting words: RULER's `cwe`, the commonest of real words, and `fwe`, of made-up ones."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass

from hf_sparse_attention.evaluation.tasks.base import Draft, GrowingTask
from hf_sparse_attention.evaluation.tasks.draws import Draws
from hf_sparse_attention.evaluation.tasks.haystacks import all_words, key_word

#: RULER makes the list easier below 4096 tokens: 6 : 1 instead of 30 : 3, and a shorter example. It
#: means the length with a chat template's tokens, which have been taken off here.
SHORT = 4000


@dataclass(frozen=True)
class CommonWords(GrowingTask):
    """A numbered list in which ten words come many times more often than the others.

    Attributes:
        common: words to find. `smallest` counts them, too: a unit is a different word.
    """

    common: int = 10

    def draft(self, units: int, length: int, draws: Draws) -> Draft:
        short = length < SHORT
        example, prefix, found = self._asked(
            20 if short else 40, *((3, 1) if short else (10, 3)), draws
        )
        question, prefix, answers = self._asked(units, *((6, 1) if short else (30, 3)), draws)
        return Draft(f"{example}{prefix} {numbered(found)}\n{question}", prefix, tuple(answers))

    def _asked(
        self, units: int, often: int, seldom: int, draws: Draws
    ) -> tuple[str, str, list[str]]:
        words = different_words(units, draws)
        common, others = words[: self.common], words[self.common :]
        listed = draws.shuffled(common * often + others * seldom)
        question = (
            "Here is a numbered list of words, some of which come more often than the others. Keep "
            f"in mind those that come most often.\n{numbered(listed)}\n"
            f"Question: What are the {self.common} most common words of the list above?"
        )
        prefix = f" Answer: The {self.common} words that come most often in the list are:"
        return question, prefix, common


@dataclass(frozen=True)
class FrequentWords(GrowingTask):
    """Made-up words whose counts fall as a power of their rank; the first is noise, then three.

    Attributes:
        alpha: the power. n words in all, `n k^-alpha / zeta(alpha)` of them of rank k.
        letters: of each word.
    """

    alpha: float = 2.0
    letters: int = 6

    def draft(self, units: int, length: int, draws: Draws) -> Draft:
        ranks = max((length - self.max_new_tokens) // 50, 5)
        vocabulary: dict[str, None] = {"...": None}
        while len(vocabulary) < ranks:
            vocabulary[draws.letters(self.letters, string.ascii_lowercase)] = None
        words = list(vocabulary)
        scale = units / _zeta(self.alpha)
        drawn = [
            word
            for rank, word in enumerate(words, start=1)
            for _ in range(int(scale * rank**-self.alpha))
        ]
        question = (
            "The text below is in code. Keep count of how often each code word comes, and find the "
            f"three that come most often. {' '.join(draws.shuffled(drawn))}\n"
            "Question: Which three code words come most often in the text above? Give no reasons, "
            "and leave the dots '...' out."
        )
        prefix = " Answer: The three code words that come most often in the text above are:"
        return Draft(question, prefix, tuple(words[1:4]))


def numbered(words: list[str]) -> str:
    """`1. first 2. second`."""
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def different_words(count: int, draws: Draws) -> list[str]:
    """Words of the lists while they last, pairs of them beyond that."""
    if count <= len(all_words()):
        return draws.some(all_words(), count)
    chosen: dict[str, None] = {}
    while len(chosen) < count:
        chosen[key_word(draws)] = None
    return list(chosen)


def _zeta(alpha: float, terms: int = 1000) -> float:
    """Riemann's zeta: the sum, and the integral of what is left of it."""
    head = math.fsum(k**-alpha for k in range(1, terms))
    return head + math.pow(terms, 1 - alpha) / (alpha - 1) + math.pow(terms, -alpha) / 2
