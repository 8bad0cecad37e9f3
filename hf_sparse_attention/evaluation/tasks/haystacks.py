"""What the needles are hidden in, and the words that keys and lists are made of."""

from __future__ import annotations

import re
from functools import cache

from hf_sparse_attention.calibration.bundled import bundled_file
from hf_sparse_attention.evaluation.tasks.draws import Draws

#: RULER's "noise": one line over and over.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
#: Where one sentence ends and another begins.
_SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z\"'])")
_BOOK_HEADING = re.compile(r"^Book [IVX]+ *$", re.MULTILINE)


@cache
def essay_words() -> tuple[str, ...]:
    """The words of *Paradise Lost*, which stands where RULER has the essays of Paul Graham."""
    return tuple(_poem().split())


@cache
def passages() -> tuple[str, ...]:
    """The same text cut into passages at the ends of sentences, from 16 lines of verse on."""
    made: list[str] = []
    lines: list[str] = []
    for line in filter(None, map(str.strip, _poem().split("\n"))):
        lines.append(line)
        if len(lines) >= 16 and line[-1] in ".!?":
            made.append(" ".join(lines))
            lines = []
    return (*made, " ".join(lines)) if lines else tuple(made)


@cache
def _poem() -> str:
    poem, _ = bundled_file("paradise_lost.txt").split("[The End]")
    return _BOOK_HEADING.sub("", poem)


@cache
def _essay_starts() -> tuple[int, ...]:
    """The indices of words that begin a sentence."""
    words = essay_words()
    ends = (i for i, word in enumerate(words[:-1]) if word[-1] in ".!?")
    return (0, *(i + 1 for i in ends))


def essay(units: int, draws: Draws) -> list[str]:
    """The sentences of `units` words of the essay from some sentence on, round and round."""
    words, start = essay_words(), draws.one(_essay_starts())
    rounds = (start + units) // len(words) + 1
    return _SENTENCE_END.split(" ".join((words * rounds)[start : start + units]))


@cache
def word_lists() -> dict[str, tuple[str, ...]]:
    """The `adjectives`, `nouns` and `verbs` of wonderwords, which RULER takes its words from."""
    parts = bundled_file("words.txt").strip().split("\n\n")[-3:]
    names = ("adjectives", "nouns", "verbs")
    return {name: tuple(part.split("\n")) for name, part in zip(names, parts, strict=True)}


@cache
def all_words() -> tuple[str, ...]:
    """Every word of the three lists once, in alphabetical order."""
    return tuple(sorted({word for words in word_lists().values() for word in words}))


def key_word(draws: Draws) -> str:
    """A key such as `silent-harbour`."""
    lists = word_lists()
    return f"{draws.one(lists['adjectives'])}-{draws.one(lists['nouns'])}"
