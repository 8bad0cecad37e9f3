"""A stress test: one needle inside one block, at depths from 0 to 100%, and decoys where it hurts.

A block is skipped when its scores lie far below the running max. So the needle gets a block among
plain text, alone, and the key it is asked by is named many times at the very end, without its
value: in the newest blocks, which are visited first and set the running max of the question's rows.
`benchmarks.needle_blocks` tells how many heads would skip the needle's block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hf_sparse_attention.evaluation.samples import Sample
from hf_sparse_attention.evaluation.tasks.base import found_fraction, largest, require_tokens
from hf_sparse_attention.evaluation.tasks.draws import Draws
from hf_sparse_attention.evaluation.tasks.haystacks import essay, key_word
from hf_sparse_attention.evaluation.tasks.needles import NeedleTask

#: 0, 10%, ... 100%.
DEPTH_GRID = tuple(step / 10 for step in range(11))
_DECOYS = (
    "Many have asked for {key}.",
    "What is {key} for?",
    "Nobody here has heard of {key} before.",
    "They spoke of {key} again.",
    "Then it was all about {key}.",
    "Some remember {key}, some do not.",
)


@dataclass(frozen=True)
class NeedleDepths:
    """`needle_depths`: the samples go round the grid of depths.

    Attributes:
        depths: of the needle in the text without the decoys, off by less than a block.
        block: tokens in a block; the needle lies inside of one where it is not longer.
        decoys: sentences at the end of the text that name the key and not its value; at most 6.
    """

    name: str = "needle_depths"
    max_new_tokens: int = 32
    depths: Sequence[float] = DEPTH_GRID
    block: int = 64
    decoys: int = 6

    def samples(self, tokenizer: Any, length: int, count: int, seed: int) -> list[Sample]:
        """See `samples.Task`."""
        require_tokens(tokenizer)
        return [
            self._sample(
                tokenizer,
                length,
                self.depths[index % len(self.depths)],
                Draws(self.name, length, seed, index),
            )
            for index in range(count)
        ]

    def score(self, output: str, answers: Sequence[str]) -> float:
        """1 if the output contains the value."""
        return found_fraction(output, answers)

    def _sample(self, tokenizer: Any, length: int, depth: float, draws: Draws) -> Sample:
        key, value = key_word(draws), draws.number(7)
        task = NeedleTask("", 0)
        needle = task.needle(key, value)
        words = " ".join(essay(length, draws)).split()  # a token is a word at most
        decoys = " ".join(decoy.format(key=key) for decoy in _DECOYS[: self.decoys])

        def prompt(units: int, place: int) -> tuple[str, str]:
            text = " ".join([*words[:place], needle, *words[place:units], decoys])
            return task.ask(text, [key], many=False)

        def tokens(units: int) -> int:
            return len(tokenizer("".join(prompt(units, round(depth * units)))).input_ids)

        room = length - self.max_new_tokens
        if tokens(1) > room:
            raise ValueError(
                f"{self.name}: expected a length of at least {tokens(1) + self.max_new_tokens} "
                f"tokens for this tokenizer, got {length}"
            )
        units = largest(lambda units: tokens(units) <= room, 1, length // 2)
        for place in _nearest(round(depth * units), units, self.block):
            question, prefix = prompt(units, place)
            first, last = token_span(tokenizer, question + prefix, needle)
            fits = len(tokenizer(question + prefix).input_ids) <= room  # it may cut words otherwise
            if fits and first // self.block == last // self.block:
                break
        else:  # longer than a block: then at its depth
            question, prefix = prompt(units, round(depth * units))
        return Sample(
            task=self.name,
            length=length,
            prompt=question + prefix,
            answers=(value,),
            max_new_tokens=self.max_new_tokens,
            depth=depth,
            answer_prefix=prefix,
        )


def needle_depth_samples(
    tokenizer: Any,
    length: int,
    depths: Sequence[float] = DEPTH_GRID,
    per_depth: int = 1,
    seed: int = 0,
    block: int = 64,
) -> list[Sample]:
    """`per_depth` samples at each of `depths`, depth by depth in turn; see `NeedleDepths`."""
    task = NeedleDepths(depths=tuple(depths), block=block)
    return task.samples(tokenizer, length, per_depth * len(depths), seed)


def _nearest(place: int, most: int, steps: int) -> Iterator[int]:
    """`place` and its neighbours in 0 .. `most`, the nearest first, up to `steps` away."""
    for step in range(steps):
        yield from (p for p in dict.fromkeys((place + step, place - step)) if 0 <= p <= most)


def token_span(tokenizer: Any, prompt: str, needle: str) -> tuple[int, int]:
    """The first and the last token of `needle` in `prompt`, whose tokens may span its ends."""
    start = prompt.index(needle)
    before = tokenizer(prompt[:start].rstrip()).input_ids
    through = tokenizer(prompt[: start + len(needle)]).input_ids
    return len(before), len(through) - 1
