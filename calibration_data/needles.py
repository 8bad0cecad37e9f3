"""Writes the needle-style texts of this folder: facts in a haystack, asked for again later.

    python calibration_data/needles.py SEED CHARACTERS > FILE

One long text in which something is said, a great deal of other text follows, and then it is asked
and answered. The distances are spread evenly over all orders of magnitude, up to the whole text:
wherever a sample is cut out of it, short and long retrievals lie inside. The kinds are those of
long-context benchmarks such as RULER, in words of our own: one number under one key, several
numbers under one key, a table of random identifiers, chains of assignments, and the commonest words
of a list. The haystack alternates between made-up sentences and one sentence over and over.

The same seed gives the same bytes on every Python: only random.Random.random() is drawn from.
"""

import heapq
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise

ADJECTIVES = """amber ancient brisk broad calm clever copper crimson curious distant early faint
gentle golden hidden hollow humble idle ivory jolly keen lively lonely marble merry narrow nimble
odd pale patient plain proud quick quiet rapid rough rustic salty scarlet silent silver sleepy
slender smooth solemn steady stern sunny tidy tiny upright vivid warm wooden young""".split()
NOUNS = """anchor apple barrel basket beacon bell bridge bucket cabin candle carpet castle cellar
chapel compass cottage engine feather fiddle forest fountain garden gate hammer harbour island
kettle ladder lantern lemon letter library market meadow mill mirror mountain needle oven paddle
parrot pebble pencil piano pillow river saddle sailor shepherd spoon stable station table teapot
temple tower tunnel valley village violin wagon window workshop""".split()
NAMES = """Ada Bruno Clara Dmitri Elena Farid Greta Hugo Ines Jonas Kira Lars Mina Noor Otto Petra
Quentin Rosa Sami Tilda Umar Vera Wanda Xenia Yusuf Zoe""".split()
VERBS = """admired borrowed carried cleaned counted drew found guarded kept left lifted measured
mended moved noticed opened painted passed praised remembered repaired searched sold
watched""".split()
PLACES = """at dawn|in the evening|before the rain|after lunch|on the way home|without a word|
as always|for the second time|near the old wall|under a grey sky|with some care|
a week later""".replace("\n", "").split("|")
REPEATED = [
    "The road goes on and the hours go by. Nothing new is said here.",
    "One wave follows another. The shore stays where it was. So it went all day.",
    "It rained a little, then it stopped. Nobody wrote it down.",
]
SHORTEST = 300  # characters between a fact and its question, at least


class Needles:
    """One text in the making: what it says so far, and which questions wait for their place."""

    def __init__(self, seed: int, size: int) -> None:
        self.random = random.Random(seed)
        self.size = size
        self.written = 0
        self.waiting: list[tuple[float, int, str]] = []  # due at, tie-breaker, question and answer
        self.asked = 0
        self.taken: set[str] = set()

    def below(self, n: int) -> int:
        """A number in [0, n)."""
        return int(self.random.random() * n)

    def one(self, items: list[str]) -> str:
        """One of `items`."""
        return items[self.below(len(items))]

    def key(self) -> str:
        """Such as "silent harbour": few enough that similar ones stand side by side."""
        return f"{self.one(ADJECTIVES)} {self.one(NOUNS)}"

    def new_key(self) -> str:
        """A key that no fact has had: each question has one answer."""
        while (key := self.key()) in self.taken:
            pass
        self.taken.add(key)
        return key

    def identifier(self) -> str:
        """Sixteen hexadecimal digits in four groups."""
        return "-".join(f"{self.below(16**4):04x}" for _ in range(4))

    def ask(self, question: str, answer: str) -> None:
        """Puts a question down for later, log-uniformly between SHORTEST and the whole text."""
        distance = SHORTEST * (self.size / SHORTEST) ** self.random.random()
        text = f"Question: {question}\nAnswer: {answer}"
        heapq.heappush(self.waiting, (self.written + distance, self.asked, text))
        self.asked += 1

    def number(self) -> str:
        """One number under one key."""
        key, value = self.new_key(), self.below(9 * 10**6) + 10**6
        self.ask(f"What is the special number of the {key}?", f"{value}.")
        return f"The special number of the {key} is {value}."

    def numbers(self) -> str:
        """Several numbers under one key."""
        key = self.new_key()
        values = [str(self.below(9 * 10**6) + 10**6) for _ in range(2 + self.below(3))]
        self.ask(f"What are all the special numbers of the {key}?", f"{', '.join(values)}.")
        parts = [f"One of the special numbers of the {key} is {value}." for value in values]
        return "\n".join(f"{part} {self.sentences(1 + self.below(3))}" for part in parts)

    def identifiers(self) -> str:
        """A table in which every line looks like the one that is asked for."""
        rows = [(self.identifier(), self.identifier()) for _ in range(4 + self.below(12))]
        for _ in range(2):
            key, value = rows[self.below(len(rows))]
            self.ask(f"Which value belongs to {key}?", f"{value}.")
        return "\n".join(f"{key} belongs with the value {value}." for key, value in rows)

    def chain(self) -> str:
        """Names that are set to each other, and in the end to one number."""
        value = self.below(90000) + 10000
        letters = "ABCDEFGHKLMNPQRSTUVWXYZ"
        names = ["".join(self.one(list(letters)) for _ in range(4)) for _ in range(3)]
        said = [f"VAR {names[0]} = {value}."]
        said += [f"VAR {b} = VAR {a}." for a, b in pairwise(names)]
        self.ask(f"Which variables hold {value}?", f"{', '.join(names)}.")
        return "\n".join(f"{part} {self.sentences(1 + self.below(4))}" for part in said)

    def words(self) -> str:
        """A list of words in which three come more often than all others."""
        common = [f"{self.one(ADJECTIVES)}{self.one(NOUNS)}" for _ in range(3)]
        drawn = [word for n, word in zip((9, 7, 5), common, strict=True) for _ in range(n)]
        drawn += [self.one(NOUNS) for _ in range(25 + self.below(30))]
        shuffled = sorted(drawn, key=lambda _: self.random.random())
        top = ", ".join(word for word, _ in Counter(shuffled).most_common(3))
        self.ask(f"Which three words are commonest in the list that has {common[0]}?", f"{top}.")
        return f"List of words: {' '.join(shuffled)}."

    def sentences(self, count: int) -> str:
        """Made-up sentences, hardly two of them alike."""
        return " ".join(
            f"{self.one(NAMES)} {self.one(VERBS)} the {self.key()} and the {self.one(NOUNS)} "
            f"{self.one(PLACES)}."
            for _ in range(count)
        )

    def haystack(self) -> str:
        """A paragraph in which nothing is asked."""
        if self.random.random() < 0.2:
            return " ".join([self.one(REPEATED)] * (3 + self.below(8)))
        return self.sentences(3 + self.below(5))

    def paragraphs(self) -> Iterator[str]:
        """The text, paragraph by paragraph, until it is long enough."""
        facts: list[Callable[[], str]] = [
            self.number,
            self.number,
            self.numbers,
            self.identifiers,
            self.chain,
            self.words,
        ]
        while self.written < self.size:
            said = facts[self.below(len(facts))]() if self.random.random() < 0.5 else ""
            due = []
            while self.waiting and self.waiting[0][0] <= self.written:
                due.append(heapq.heappop(self.waiting)[2])
            for paragraph in (said, self.haystack(), *due):
                if paragraph:
                    self.written += len(paragraph) + 2
                    yield paragraph


def text(seed: int, size: int) -> str:
    """About `size` characters."""
    return "\n\n".join(Needles(seed, size).paragraphs()) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text(int(sys.argv[1]), int(sys.argv[2])))
