"""What an evaluation is asked for, checked before any work."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from hf_sparse_attention.evaluation.samples import Task
from hf_sparse_attention.evaluation.tasks import STRESS_TASKS, TASKS

logger = logging.getLogger(__name__)


def chosen_tasks(tasks: Sequence[str | Task] | None) -> list[Task]:
    """The tasks themselves.

    Raises:
        ValueError: a name that is none of `TASKS` or `STRESS_TASKS`, or no task at all.
    """
    known = TASKS | STRESS_TASKS
    names = list(TASKS) if tasks is None else tasks
    unknown = [x for x in names if isinstance(x, str) and x not in known]
    if unknown or not names:
        raise ValueError(
            f"tasks: expected names among {', '.join(known)}, got {', '.join(unknown) or 'none'}"
        )
    return [known[x] if isinstance(x, str) else x for x in names]


def checked_lengths(model: Any, lengths: Sequence[int]) -> list[int]:
    """The lengths, ascending; says where the model was not made for one.

    Raises:
        ValueError: none, or one that is not positive.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths: expected positive integers, got {list(lengths)}")
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and max(lengths) > most:
        logger.warning(
            "lengths: up to %d tokens, but the model was made for %d: expect poor answers beyond",
            max(lengths),
            most,
        )
    return sorted(set(lengths))


def checked_samples(samples: int | Mapping[int, int], lengths: Sequence[int]) -> dict[int, int]:
    """How many samples of each task at each of `lengths`.

    Raises:
        ValueError: a number that is not positive, or a length without one.
    """
    by_length = dict.fromkeys(lengths, samples) if isinstance(samples, int) else samples
    if set(by_length) != set(lengths) or min(by_length.values()) < 1:
        raise ValueError(
            "samples: expected a positive integer, or one for each of the lengths "
            f"{list(lengths)}, got {samples}"
        )
    return {length: by_length[length] for length in lengths}


def samples_by_length(text: str) -> int | dict[int, int]:
    """`10`, or `2048=20,4096=8`.

    Raises:
        ValueError: it is neither.
    """
    try:
        if "=" not in text:
            return int(text)
        pairs = (part.split("=") for part in text.split(","))
        return {int(length): int(count) for length, count in pairs}
    except ValueError:
        raise ValueError(f"samples: expected 10 or 2048=20,4096=8, got {text!r}") from None
