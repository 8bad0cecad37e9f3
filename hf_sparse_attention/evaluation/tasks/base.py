"""What all tasks share: growing a haystack to a length in tokens, and the two scores of RULER."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_sparse_attention.evaluation.samples import Sample
from hf_sparse_attention.evaluation.tasks.draws import Draws


@dataclass(frozen=True)
class Draft:
    """A prompt with a haystack of some size, and what is known of it."""

    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    depth: float | None = None

    @property
    def prompt(self) -> str:
        return self.question + self.answer_prefix


@dataclass(frozen=True)
class GrowingTask(ABC):
    """A task whose prompts grow unit by unit: a word, a line, a document of haystack.

    Attributes:
        name: as RULER spells it.
        max_new_tokens: RULER's budget for the answer.
        smallest: units that a prompt has at least.
    """

    name: str
    max_new_tokens: int
    smallest: int = 1

    @abstractmethod
    def draft(self, units: int, length: int, draws: Draws) -> Draft:
        """A prompt with `units` of haystack.

        Args:
            units: of haystack.
            length: tokens that it is to have in the end: some tasks get harder with it.
            draws: where all that is random comes from.
        """

    def score(self, output: str, answers: Sequence[str]) -> float:
        """The fraction of the references that the output contains, in whatever case."""
        return found_fraction(output, answers)

    def samples(self, tokenizer: Any, length: int, count: int, seed: int) -> list[Sample]:
        """See `samples.Task`."""
        require_tokens(tokenizer)
        made: list[Sample] = []
        units = 0
        for index in range(count):
            units, draft = self._fitting(tokenizer, length, (self.name, length, seed, index), units)
            made.append(
                Sample(
                    task=self.name,
                    length=length,
                    prompt=draft.prompt,
                    answers=draft.answers,
                    max_new_tokens=self.max_new_tokens,
                    depth=draft.depth,
                    answer_prefix=draft.answer_prefix,
                )
            )
        return made

    def _fitting(
        self, tokenizer: Any, length: int, seed: tuple[object, ...], guess: int
    ) -> tuple[int, Draft]:
        """The largest haystack that fits, and the draft that was measured with it."""
        room = length - self.max_new_tokens
        drafts: dict[int, Draft] = {}

        def tokens(units: int) -> int:
            drafts[units] = self.draft(units, length, Draws(*seed))
            return len(tokenizer(drafts[units].prompt).input_ids)

        needed = tokens(self.smallest)
        if needed > room:
            raise ValueError(
                f"{self.name}: expected a length of at least {needed + self.max_new_tokens} tokens "
                f"for this tokenizer ({needed} of prompt, {self.max_new_tokens} of answer), got "
                f"{length}"
            )
        units = largest(lambda units: tokens(units) <= room, self.smallest, guess)
        return units, drafts[units]


def require_tokens(tokenizer: Any) -> None:
    """Without its files transformers makes a tokenizer that turns any text into nothing.

    Raises:
        ValueError: `tokenizer` is such a one, whose prompts would grow without end.
    """
    if not tokenizer("The grass is green.", add_special_tokens=False).input_ids:
        raise ValueError(
            f"tokenizer: expected one that makes tokens of text, got {type(tokenizer).__name__} "
            f"with a vocabulary of {len(tokenizer)}; are its files beside the model's?"
        )


def largest(fits: Callable[[int], bool], lowest: int, guess: int) -> int:
    """The largest n >= `lowest` for which `fits`; it fits for `lowest`, and up to some n.

    Starts at `guess`, widens until n is bracketed, then halves.
    """
    low, step = lowest, max(1, guess // 8)
    high = max(guess, lowest + 1)
    while fits(high):
        low, high, step = high, high + step, 2 * step
    if low == lowest:  # the guess was too large: come down to where it fits
        while high - step > lowest and not fits(high - step):
            high, step = high - step, 2 * step
        low = max(lowest, high - step)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def found_fraction(output: str, answers: Sequence[str]) -> float:
    """RULER's `string_match_all`: the fraction of `answers` that `output` contains."""
    return sum(_contains(output, answer) for answer in answers) / len(answers)


def found_any(output: str, answers: Sequence[str]) -> float:
    """RULER's `string_match_part`: 1 if `output` contains one of `answers`, else 0."""
    return float(any(_contains(output, answer) for answer in answers))


def _contains(output: str, answer: str) -> bool:
    return answer.lower() in output.lower()
