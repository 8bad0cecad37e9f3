"""Prompts as token ids: plain, or in the tokenizer's chat template."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attention.evaluation.samples import Sample, Task


class Prompts:
    """Turns samples into token ids, and tokens into text.

    Args:
        tokenizer: a transformers tokenizer.
        chat_template: ask as a user in its chat template; the answer's prefix goes behind it.

    Raises:
        ValueError: it has no chat template.
    """

    def __init__(self, tokenizer: Any, chat_template: bool = False) -> None:
        if chat_template and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "chat_template: expected a tokenizer that has one, got "
                f"{type(tokenizer).__name__} without"
            )
        self.tokenizer, self.chat_template = tokenizer, chat_template

    def samples(self, task: Task, length: int, count: int, seed: int) -> list[Sample]:
        """`count` samples of `task` that make `length` tokens, a chat template's own included."""
        around = len(self._encoded(self._chat(""), special=False)) if self.chat_template else 0
        made = task.samples(self.tokenizer, length - around, count, seed)
        return [replace(sample, length=length) for sample in made]

    def ids(self, sample: Sample) -> Tensor:
        """The token ids `[1, n]` int64 that a model is given."""
        if self.chat_template:
            text = self._chat(sample.question) + sample.answer_prefix
            return torch.tensor([self._encoded(text, special=False)])
        return torch.tensor([self._encoded(sample.prompt, special=True)])

    def text(self, tokens: list[int]) -> str:
        """What new tokens say."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _chat(self, question: str) -> str:
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        return text

    def _encoded(self, text: str, *, special: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=special, verbose=False)[
            "input_ids"
        ]
        return ids
