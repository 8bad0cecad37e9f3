"""One measurement: a prompt, answered greedily, with the time it took and what was skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import pstdev
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attention.stats import Stats
from hf_sparse_attention.types import PHASES, Phase


@dataclass(frozen=True)
class Answer:
    """What a model generated.

    Args:
        tokens: the new tokens, the end-of-text token not among them.
        first_token_s: seconds of the forward over the prompt.
        step_s: seconds of each forward after it, of one token each.
    """

    tokens: list[int]
    first_token_s: float
    step_s: list[float]

    @property
    def tokens_per_s(self) -> float | None:
        """The decode rate; None where nothing was decoded."""
        return len(self.step_s) / sum(self.step_s) if self.step_s else None


@torch.no_grad()
def answer(
    model: Any,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    ends: Sequence[int] = (),
    enough: Callable[[list[int]], bool] = lambda _: False,
) -> Answer:
    """Greedy generation with a cache, each forward timed by itself.

    Args:
        model: a causal language model.
        prompt: token ids `[1, n]` int64, on the model's device.
        max_new_tokens: at most so many.
        ends: tokens that end the text.
        enough: of the tokens so far, whether more would change nothing.
    """
    tokens: list[int] = []
    seconds: list[float] = []
    ids, cache = prompt, None
    while len(tokens) < max_new_tokens:
        start = time.perf_counter()
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids = out.logits[:, -1:].argmax(-1)
        token = int(ids)  # waits for the device
        seconds.append(time.perf_counter() - start)
        cache = out.past_key_values
        if token in ends:
            break
        tokens.append(token)
        if enough(tokens):
            break
    return Answer(tokens, seconds[0] if seconds else 0.0, seconds[1:])


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text, by the model's and the tokenizer's say."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    known = [] if found is None else [found] if isinstance(found, int) else list(found)
    if tokenizer.eos_token_id is not None:
        known.append(tokenizer.eos_token_id)
    return sorted(set(known))


def counted(stats: Stats) -> dict[Phase, dict[str, float | None]]:
    """What was skipped, by phase, without those in which nothing ran on blocks.

    `sparsity` is over all blocks; `layers` and `heads` are the standard deviations of the layers'
    and of all heads' own; `least` and `most` are a head's. `p50`, `p99` and `max` are the
    certificate's, None where it was not asked for.
    """
    found: dict[Phase, dict[str, float | None]] = {}
    for phase in PHASES:
        counts = stats.counts(phase)
        if not counts:
            continue
        heads = torch.cat([_shares(x) for x in counts.values()]).tolist()
        layers = [float(_shares(x.sum(dim=0, keepdim=True))) for x in counts.values()]
        certificate = stats.dropped_mass(phase) or {}
        found[phase] = {
            "sparsity": stats.sparsity(phase),
            "layers": pstdev(layers),
            "heads": pstdev(heads),
            "least": min(heads),
            "most": max(heads),
            **{name: certificate.get(name) for name in ("p50", "p99", "max")},
        }
    return found


def _shares(counts: Tensor) -> Tensor:
    """Skipped of visited `[n]` from counts `[n, 2]`; 0 where nothing was visited."""
    return counts[:, 1] / counts[:, 0].clamp(min=1)
