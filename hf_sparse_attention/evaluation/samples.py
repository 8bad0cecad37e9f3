"""What the evaluation's tasks are made of: samples, and what makes and scores them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Sample:
    """One generated example.

    Attributes:
        task: the name of the task that made it.
        length: tokens of prompt and answer together that were asked for, as in RULER: the prompt
            has at most `length - max_new_tokens` tokens and is close to it.
        prompt: the text to feed, no chat template applied; it ends with `answer_prefix`.
        answers: the references.
        max_new_tokens: the budget of the answer.
        depth: where the needle lies as a fraction of the haystack, 0 at its start and 1 at its end,
            where the task has one needle to find.
        answer_prefix: how the answer begins. Behind a chat template it is no part of the question:
            `question` goes into the template and the prefix after it.
    """

    task: str
    length: int
    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    depth: float | None = None
    answer_prefix: str = ""

    @property
    def question(self) -> str:
        """The prompt without the beginning of its answer."""
        return self.prompt.removesuffix(self.answer_prefix)


class Task(Protocol):
    """Makes samples of any length for any tokenizer, and scores what a model says to them."""

    @property
    def name(self) -> str:
        """As RULER spells it."""

    @property
    def max_new_tokens(self) -> int:
        """The budget of the answer."""

    def samples(self, tokenizer: Any, length: int, count: int, seed: int) -> list[Sample]:
        """`count` samples; the same arguments give the same samples, another seed gives others.

        Args:
            tokenizer: a transformers tokenizer.
            length: in tokens, prompt and answer together; a chat template's own tokens are the
                caller's to take off.
            count: how many.
            seed: any integer.

        Raises:
            ValueError: a `length` that the shortest prompt of this task does not fit into.
        """

    def score(self, output: str, answers: Sequence[str]) -> float:
        """0 to 1: how right `output`, what the model generated, is."""


def mean_and_standard_error(scores: Sequence[float]) -> tuple[float, float]:
    """The mean, and the standard deviation of a sample (n - 1) over the root of n; nan for n = 1.

    Raises:
        ValueError: no scores.
    """
    if not scores:
        raise ValueError("scores: expected one at least, got none")
    n = len(scores)
    mean = math.fsum(scores) / n
    if n == 1:
        return mean, math.nan
    variance = math.fsum((score - mean) ** 2 for score in scores) / (n - 1)
    return mean, math.sqrt(variance / n)
