"""Calibration data: from whatever holds text or token ids to samples of the lengths asked for.

Texts are packed: joined, with the tokenizer's end-of-text token between them, and cut into pieces
of the longest length, each starting with the tokenizer's beginning-of-text token if it uses one
(models park attention there, so a sample without it would calibrate another model). Token ids are
taken as they are. Every sample is then cut to each of the lengths.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attention.calibration.bundled import KINDS, Part, bundled

#: What the bundled texts are cut to, unless other lengths are asked for.
DEFAULT_LENGTHS = (2048, 4096, 8192)
#: Columns that hold a text or a conversation, the first that is there.
TEXT_COLUMNS = ("text", "content")
CHAT_COLUMNS = ("messages", "conversations", "conversation")

_Ids = Sequence[int]


def token_samples(
    data: Any = None,
    tokenizer: Any = None,
    lengths: Sequence[int] | None = None,
    samples: int | None = None,
    seed: int = 0,
    part: Part = "calibration",
) -> Iterator[Tensor]:
    """Samples `[n]` int64 on the CPU, made as they are taken.

    Args:
        data: None for the bundled texts; the path of a text file, of a folder of them, or of a
            .jsonl file of rows; a dataset of `datasets`, streaming or not, with a column `text` (or
            one column of strings), `messages` (for the chat template) or `input_ids`; an iterable
            of such rows, of texts, or of token ids in any form that `token_rows` takes.
        tokenizer: for text; a transformers tokenizer, or where to load one from.
        lengths: in tokens; None takes each text and each row of token ids as it is, and for the
            bundled texts 2048, 4096 and 8192.
        samples: at most so many of each length; None takes all that is there.
        seed: of the order in which the rows of a dataset or the files of a folder are taken.
            Streaming datasets and other iterables keep their order.
        part: which of the bundled texts; those for validation are never calibrated on.

    Raises:
        TypeError: data of another kind, or text without a tokenizer.
        ValueError: bad lengths, a path that is not there, unknown columns; and, once the data is at
            an end, if nothing was long enough.
    """
    if lengths is None and data is None:
        lengths = DEFAULT_LENGTHS
    if lengths is not None and (not lengths or min(lengths) < 1):
        raise ValueError(f"lengths: expected positive integers, got {list(lengths)}")
    if samples is not None and samples < 1:
        raise ValueError(f"samples: expected a positive integer or None, got {samples}")
    coder = _Coder(tokenizer)
    longest = max(lengths) if lengths else None
    if data is None:
        rows = coder.packs([[bundled(kind, part)] for kind in KINDS], longest)
    elif isinstance(data, (str, Path)) and Path(data).suffix == ".jsonl":
        rows = _rows(map(json.loads, _text(Path(data)).splitlines()), coder, longest, seed)
    elif isinstance(data, (str, Path)):
        rows = coder.packs([_texts_at(Path(data), seed)], longest)
    elif isinstance(data, Iterable) and not isinstance(data, (Mapping, Tensor, bytes)):
        rows = _rows(data, coder, longest, seed)
    elif isinstance(data, Mapping) and any(
        hasattr(split, "column_names") for split in data.values()
    ):
        raise ValueError(f"data: expected one split of {sorted(data)}, got all; pass data['...']")
    else:
        rows = token_rows(data)
    return _cut(islice(rows, samples), sorted(set(lengths)) if lengths else None)


# Text


class _Coder:
    """A tokenizer, loaded when the first text needs it."""

    def __init__(self, tokenizer: Any) -> None:
        self._given = tokenizer

    @cached_property
    def tokenizer(self) -> Any:
        if self._given is None:
            raise TypeError("data: expected token ids, or text and a tokenizer, got text alone")
        if not isinstance(self._given, (str, Path)):
            return self._given
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self._given)
        except (OSError, ValueError) as error:
            raise TypeError(
                "data: expected token ids, or text and a tokenizer; none could be loaded from "
                f"{str(self._given)!r} ({str(error).splitlines()[0]})"
            ) from error

    def ids(self, document: str | Sequence[Mapping[str, str]] | None) -> _Ids:
        """The token ids of a text or a conversation, without special tokens around it."""
        if not document:
            return []
        if not isinstance(document, str):
            if not getattr(self.tokenizer, "chat_template", None):
                raise ValueError(
                    "data: expected a tokenizer with a chat template for conversations, got "
                    f"{type(self.tokenizer).__name__} without one"
                )
            document = self.tokenizer.apply_chat_template(document, tokenize=False)
        ids: _Ids = self.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    @property
    def start(self) -> list[int]:
        """What the tokenizer puts before a text: its beginning-of-text token, or nothing."""
        first = self.tokenizer("a")["input_ids"][:1]
        return list(first) if first == [self.tokenizer.bos_token_id] else []

    def packs(self, streams: Iterable[Iterable[Any]], length: int | None) -> Iterator[Tensor]:
        """The texts of several streams in turn, in samples of `length` tokens; None: as they are.

        What is left of each stream is packed together at the end, and the very last sample is as
        short as it comes.
        """
        start = self.start
        end = self.tokenizer.eos_token_id
        separator = [] if end is None else [end]
        coded = [filter(None, map(self.ids, stream)) for stream in streams]
        if length is None:
            pieces: Iterator[_Ids] = chain.from_iterable(coded)
        else:
            pieces = _packs(coded, length - len(start), separator)
        for ids in pieces:
            # A chat template may have begun with the token itself.
            begun = list(ids[: len(start)]) == start
            sample = [*ids] if begun else [*start, *ids]
            yield torch.tensor(sample, dtype=torch.int64)


def _packs(streams: Sequence[Iterator[_Ids]], room: int, separator: list[int]) -> Iterator[_Ids]:
    rests: list[_Ids] = []
    turns = deque(_windows(stream, room, separator) for stream in streams)
    while turns:
        windows = turns.popleft()
        window = next(windows, None)
        if window is None:
            continue
        if len(window) == room:
            yield window
            turns.append(windows)
        else:
            rests.append(window)
    yield from _windows(rests, room, separator)


def _windows(documents: Iterable[_Ids], room: int, separator: list[int]) -> Iterator[_Ids]:
    """The documents joined and cut every `room` tokens; the last piece may be shorter."""
    buffer: list[int] = []
    for ids in documents:
        buffer += [*separator, *ids] if buffer else ids
        while len(buffer) >= room:
            yield buffer[:room]
            buffer = buffer[room:]
    if buffer:
        yield buffer


def _texts_at(path: Path, seed: int) -> Iterator[str]:
    """The text of a file; or of every file of a folder, in an order from `seed`."""
    if path.is_file():
        return iter([_text(path)])
    if not path.is_dir():
        raise ValueError(
            f"data: expected a text file or a folder of them, found nothing at {str(path)!r}; a "
            "text itself goes into a list: [text]"
        )
    found = [file for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file, path)]
    if not found:
        raise ValueError(f"data: expected text files in {str(path)!r}, found none")
    random.Random(seed).shuffle(found)
    return map(_text, found)


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: expected UTF-8 text, found other bytes in {file}") from error


# Rows


def _rows(data: Iterable[Any], coder: _Coder, longest: int | None, seed: int) -> Iterator[Tensor]:
    """The samples in rows of a dataset, texts or token ids: the first row tells which."""
    if isinstance(data, Sized) and hasattr(data, "column_names") and hasattr(data, "shuffle"):
        data = data.shuffle(seed=seed)
    items = iter(data)
    first = next(items, None)
    if first is None:
        return iter(())
    items = chain([first], items)
    if isinstance(first, int):
        return token_rows(list(items))
    if isinstance(first, str):
        return coder.packs([items], longest)
    if isinstance(first, Mapping) and "input_ids" not in first:
        take = _column(first)
        return coder.packs([map(take, items)], longest)
    return token_rows(items)


def _column(row: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    """Takes the text or conversation out of rows like this one."""
    texts = [name for name, value in row.items() if isinstance(value, str)]
    for name in (*CHAT_COLUMNS, *TEXT_COLUMNS):
        if name in row:
            return lambda each: each[name]
    if len(texts) == 1:
        return lambda each: each[texts[0]]
    known = ["input_ids", *CHAT_COLUMNS, *TEXT_COLUMNS]
    raise ValueError(
        f"data: expected a column of {known} or one column of strings, got {sorted(row)}"
    )


def token_rows(data: Any) -> Iterator[Tensor]:
    """The samples in `data` as int64 `[n]`, without padding.

    Args:
        data: lists or tensors `[n]` or `[B, n]` of token ids; what a tokenizer returns (a mapping
            with `input_ids` and perhaps `attention_mask`); or an iterable of those.

    Raises:
        TypeError: for text, which wants a tokenizer first, and anything else.
    """
    if isinstance(data, (str, bytes)):
        raise TypeError(f"data: expected token ids, got {type(data).__name__}; tokenize it first")
    if isinstance(data, Mapping):
        if "input_ids" not in data:
            raise TypeError(f"data: expected a mapping with input_ids, got {sorted(data)}")
        masks = data.get("attention_mask")
        rows = list(token_rows(data["input_ids"]))
        if masks is None:
            yield from rows
            return
        for ids, mask in zip(rows, token_rows(masks), strict=True):
            yield ids[mask.bool()]
    elif isinstance(data, Tensor):
        for row in data.reshape(-1, data.shape[-1]):
            yield row.to(torch.int64)
    elif isinstance(data, Sequence) and data and all(isinstance(x, int) for x in data):
        yield torch.tensor(data, dtype=torch.int64)
    elif isinstance(data, Iterable):
        for item in data:
            yield from token_rows(item)
    else:
        raise TypeError(f"data: expected an iterable of token ids, got {type(data).__name__}")


def _cut(rows: Iterable[Tensor], lengths: Sequence[int] | None) -> Iterator[Tensor]:
    """Every row at each of the lengths that it reaches; None: rows as they are."""
    longest, any_long_enough = 0, False
    for ids in rows:
        longest = max(longest, len(ids))
        for length in lengths or [len(ids)]:
            if length <= len(ids):
                any_long_enough = True
                yield ids[:length]
    if lengths and not any_long_enough:
        raise ValueError(
            f"lengths: expected samples of at least {min(lengths)} tokens, the longest found has "
            f"{longest}"
        )


def without_prefixes(samples: Sequence[Tensor]) -> list[Tensor]:
    """Each row once, at the longest of the lengths that `token_samples` has cut it to."""
    after = [*samples[1:], torch.zeros(0, dtype=torch.int64)]
    return [
        ids
        for ids, longer in zip(samples, after, strict=True)
        if not torch.equal(longer[: len(ids)], ids)
    ]
