"""A small task for tests of the evaluation: any tokenizer, any length, quick to make."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hf_sparse_attention.evaluation.samples import Sample


@dataclass(frozen=True)
class Recall:
    """Digits with one letter among them, which is asked for."""

    name: str = "recall"
    max_new_tokens: int = 4
    answer: str | None = None  # instead of the letter

    def samples(self, tokenizer, length, count, seed):
        if length < 64:
            raise ValueError(f"recall: expected at least 64 tokens, got {length}")
        found = []
        for n in range(count):
            rng = random.Random(f"{seed} {length} {n}")
            room = length - self.max_new_tokens - 12
            digits = [str(rng.randrange(10)) for _ in range(room)]
            depth = n / max(count - 1, 1)
            letter = rng.choice("abcdef")
            digits.insert(round(depth * room), letter)
            prompt = "".join(digits) + " letter:"
            answers = (letter if self.answer is None else self.answer,)
            found.append(
                Sample(self.name, length, prompt, answers, self.max_new_tokens, depth=depth)
            )
        return found

    def score(self, output, answers):
        return sum(answer in output for answer in answers) / len(answers)
