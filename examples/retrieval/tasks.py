"""Four retrieval tasks over a small made-up vocabulary, the kind that long-context tests ask for.

Each task fills a context and asks up to `QUERIES` questions at its end. Only answers carry a label.
Everything follows from the seed.

- needle: facts hidden in filler (RULER's multi-key needle).
- pairs: nothing but facts, so every key has hundreds of near neighbours (key-value retrieval).
- tracking: variables assigned to values or to other variables (variable tracking).
- frequent: in each of 16 groups of words, which word came up most often (frequent words). It wants
  attention spread over the whole context, where the others want one place in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

QUERIES = 16
IGNORE = -100  # the label that torch's cross entropy leaves out

BOS, COPY, FACT, SET, ASK = range(1, 6)
GROUPS = np.arange(16, 16 + QUERIES)  # names of the word groups
VALUES = np.arange(32, 96)
FILLER = np.arange(96, 192)
NAMES = np.arange(192, 704)
VOCABULARY = 704
WORDS_A_GROUP = 4

Facts = list[tuple[int, int]]  # (what is asked, the answer)


@dataclass(frozen=True)
class Batch:
    """Token ids and labels, int64 `[batch, length]`; labels are `IGNORE` but for the answers."""

    input_ids: Tensor
    labels: Tensor


def _names(rng: np.random.Generator, count: int) -> list[int]:
    """`count` different names."""
    return rng.choice(NAMES, size=count, replace=False).tolist()


def _scatter(rng: np.random.Generator, pieces: list[list[int]], room: int) -> list[int]:
    """`pieces` in their order, at random places among filler, `room` tokens together."""
    gaps = room - sum(map(len, pieces))
    cuts = np.sort(rng.integers(0, gaps + 1, size=len(pieces)))
    filler = rng.choice(FILLER, size=gaps).tolist()
    tokens: list[int] = []
    start = 0
    for cut, piece in zip(cuts, pieces, strict=True):
        tokens += filler[start:cut] + piece
        start = cut
    return tokens + filler[start:]


def needle(rng: np.random.Generator, room: int) -> tuple[list[int], Facts]:
    count = max(1, min(QUERIES, room // 8))
    values = rng.choice(VALUES, size=count)
    facts = list(zip(_names(rng, count), values.tolist(), strict=True))
    return _scatter(rng, [[FACT, name, v] for name, v in facts], room), facts


def pairs(rng: np.random.Generator, room: int) -> tuple[list[int], Facts]:
    count = min(room // 2, len(NAMES))
    values = rng.choice(VALUES, size=count)
    facts = list(zip(_names(rng, count), values.tolist(), strict=True))
    context = [token for fact in facts for token in fact]
    return context + [int(FILLER[0])] * (room - len(context)), facts


def tracking(rng: np.random.Generator, room: int) -> tuple[list[int], Facts]:
    count = max(2, min(QUERIES, room // 10))
    pieces: list[list[int]] = []
    facts: Facts = []
    for i, name in enumerate(_names(rng, count)):
        if i >= 2 and rng.random() < 0.5:  # assigned from an earlier variable
            source, value = facts[int(rng.integers(i))]
            pieces.append([SET, name, source])
        else:
            value = int(rng.choice(VALUES))
            pieces.append([SET, name, value])
        facts.append((name, value))
    return _scatter(rng, pieces, room), facts


def frequent(rng: np.random.Generator, room: int) -> tuple[list[int], Facts]:
    groups = max(1, min(QUERIES, room // 16))
    context: list[int] = []
    facts: Facts = []
    for group, part in enumerate(np.array_split(np.arange(room), groups)):
        words = VALUES[group * WORDS_A_GROUP : (group + 1) * WORDS_A_GROUP]
        winner = int(rng.integers(WORDS_A_GROUP))
        shares = np.full(WORDS_A_GROUP, 0.5 / (WORDS_A_GROUP - 1))
        shares[winner] = 0.5
        drawn = rng.choice(WORDS_A_GROUP, size=len(part), p=shares)
        counts = np.bincount(drawn, minlength=WORDS_A_GROUP)
        best = int(counts.argmax())
        drawn[drawn == best] = -1  # make the best the winner: exact, whatever was drawn
        drawn[drawn == winner] = best
        drawn[drawn == -1] = winner
        context += words[drawn].tolist()
        facts.append((int(GROUPS[group]), int(words[winner])))
    return [context[i] for i in rng.permutation(len(context))], facts


TASKS: dict[str, Callable[[np.random.Generator, int], tuple[list[int], Facts]]] = {
    "needle": needle,
    "pairs": pairs,
    "tracking": tracking,
    "frequent": frequent,
}


def copy_row(rng: np.random.Generator, length: int) -> tuple[list[int], list[int]]:
    """A random string, twice: what teaches a young model to look back at all."""
    half = (length - 2) // 2
    text = rng.integers(16, VOCABULARY, size=half).tolist()
    tokens = [BOS, COPY, *text, *text]
    labels = [IGNORE] * (2 + half) + text
    padding = length - len(tokens)  # of an odd length
    return tokens + [0] * padding, labels + [IGNORE] * padding


def row(rng: np.random.Generator, task: str, length: int) -> tuple[list[int], list[int]]:
    """One sequence of `length` tokens and its labels."""
    if task == "copy":
        return copy_row(rng, length)
    question = 3  # ASK, what, the answer
    queries = min(QUERIES, length // (2 * question))  # at most half of a short sequence
    context, facts = TASKS[task](rng, length - 1 - queries * question)
    tokens = [BOS, *context]
    labels = [IGNORE] * len(tokens)
    for i in rng.integers(len(facts), size=queries):
        what, answer = facts[int(i)]
        tokens += [ASK, what, answer]
        labels += [IGNORE] * (question - 1) + [answer]
    return tokens, labels


def batch(rng: np.random.Generator, tasks: Sequence[str], length: int, size: int) -> Batch:
    """`size` sequences, the tasks in turn."""
    rows = [row(rng, tasks[i % len(tasks)], length) for i in range(size)]
    return Batch(
        torch.tensor([tokens for tokens, _ in rows]), torch.tensor([labels for _, labels in rows])
    )


def held_out(task: str, length: int, count: int, seed: int = 10_000) -> Iterator[Batch]:
    """`count` sequences for testing, one a batch; another seed than training ever uses."""
    rng = np.random.default_rng([seed, list(TASKS).index(task), length])
    for _ in range(count):
        yield batch(rng, [task], length, 1)


@torch.no_grad()
def accuracy(model: torch.nn.Module, task: str, length: int, count: int = 32) -> float:
    """The share of questions whose answer is the model's first choice."""
    right = asked = 0
    for sample in held_out(task, length, count):
        logits = model(input_ids=sample.input_ids, use_cache=False).logits
        labels = sample.labels[:, 1:]
        here = labels != IGNORE
        right += int((logits[:, :-1].argmax(-1)[here] == labels[here]).sum())
        asked += int(here.sum())
    return right / asked
