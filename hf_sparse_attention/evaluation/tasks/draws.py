"""Random draws that are the same on every Python: only random.Random.random() is drawn from."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draws:
    """A stream of draws that the parts of `seed` name, such as task, length, seed and index."""

    def __init__(self, *seed: object) -> None:
        self._random = random.Random(" ".join(map(str, seed)))

    def below(self, n: int) -> int:
        """A number in [0, n)."""
        return int(self._random.random() * n)

    def one(self, items: Sequence[T]) -> T:
        """One of `items`."""
        return items[self.below(len(items))]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different ones of `items`, in random order."""
        pool = list(items)
        for i in range(count):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All of `items` in random order."""
        return self.some(items, len(items))

    def number(self, digits: int) -> str:
        """A number of exactly so many digits."""
        lowest = 10 ** (digits - 1)
        return str(lowest + self.below(9 * lowest))

    def letters(self, count: int, alphabet: str = string.ascii_uppercase) -> str:
        """A made-up word."""
        return "".join(self.one(alphabet) for _ in range(count))

    def uuid(self) -> str:
        """A random UUID, version 4."""
        digits = [f"{self.below(16):x}" for _ in range(32)]
        digits[12], digits[16] = "4", self.one("89ab")
        text = "".join(digits)
        return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
