"""The demo's text and question: a book with one planted sentence, or the user's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BOOK = Path(__file__).resolve().parent.parent / "calibration_data" / "alice_in_wonderland.txt"
PLANTED = "The number engraved on the White Rabbit's watch is 7318642."
QUESTION = "What is the number engraved on the White Rabbit's watch?"
# The model is 135M parameters small: it needs its answer opened to answer briefly.
ANSWER_START = "The number engraved on the White Rabbit's watch is"
PLANTED_DEPTH = 0.4


@dataclass(frozen=True)
class Prompt:
    """What the model is given.

    Attributes:
        input_ids: `[1, tokens]`, the chat-formatted prompt with the start of the answer.
        title: What the text is, for the report.
        question: What is asked at its end.
        answer_start: How the answer begins; "" where the model begins it itself.
    """

    input_ids: torch.Tensor
    title: str
    question: str
    answer_start: str


def paragraphs(path: Path) -> list[str]:
    """The paragraphs of a text file, each on one line."""
    return [
        " ".join(part.split()) for part in path.read_text("utf-8").split("\n\n") if part.strip()
    ]


def book_prompt(tokenizer: Any, max_tokens: int) -> Prompt:
    """The first `max_tokens` of the book, the planted sentence in it, and the question."""
    kept = _first_paragraphs(tokenizer, paragraphs(BOOK), max_tokens - 100)
    kept.insert(round(len(kept) * PLANTED_DEPTH), PLANTED)
    ids = _chat(tokenizer, kept, QUESTION, ANSWER_START)
    return Prompt(ids, "Alice's Adventures in Wonderland, from its start", QUESTION, ANSWER_START)


def own_prompt(
    tokenizer: Any, path: Path, question: str, answer_start: str, max_tokens: int
) -> Prompt:
    """The first `max_tokens` of a user's text file, and their question."""
    kept = _first_paragraphs(tokenizer, paragraphs(path), max_tokens - 100)
    return Prompt(_chat(tokenizer, kept, question, answer_start), path.name, question, answer_start)


def calibration_ids(tokenizer: Any, length: int) -> torch.Tensor:
    """`[1, length]`: the end of the book, which the demo never asks about."""
    ids = tokenizer("\n\n".join(paragraphs(BOOK)), return_tensors="pt").input_ids
    return ids[:, -length:]


def _first_paragraphs(tokenizer: Any, parts: list[str], max_tokens: int) -> list[str]:
    kept: list[str] = []
    used = 0
    for part in parts:
        size = len(tokenizer(part + "\n\n").input_ids)
        if used + size > max_tokens:
            break
        kept.append(part)
        used += size
    if not kept:
        raise SystemExit(f"the first paragraph alone is longer than {max_tokens} tokens")
    return kept


def _chat(tokenizer: Any, parts: list[str], question: str, answer_start: str) -> torch.Tensor:
    body = "\n\n".join([*parts, question])
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": body}]
        body = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        # The template has written the special tokens that a plain call would add.
        return tokenizer(
            body + answer_start, add_special_tokens=False, return_tensors="pt"
        ).input_ids
    return tokenizer(f"{body} {answer_start}".rstrip(), return_tensors="pt").input_ids
