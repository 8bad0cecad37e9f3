"""One run of the demo: prefill, greedy decode, and what the package counted meanwhile."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

# The prompt's last positions see the most context: there the logits are compared.
COMPARED = 512


@dataclass(frozen=True)
class Run:
    """What one way of attention gave.

    Attributes:
        name: What the report calls it.
        first_token_s: Seconds from the prompt to the first token (one prefill).
        decode_tokens_per_s: Over the tokens after the first.
        tokens: The generated token ids.
        logits: `[COMPARED, vocabulary]`, of the prompt's last positions.
        stats: What `collect_stats` gave; None for dense.
    """

    name: str
    first_token_s: float
    decode_tokens_per_s: float
    tokens: list[int]
    logits: torch.Tensor
    stats: Any = None

    def with_times_of(self, other: "Run") -> "Run":
        """This run, with the better of its own and `other`'s times."""
        return replace(
            self,
            first_token_s=min(self.first_token_s, other.first_token_s),
            decode_tokens_per_s=max(self.decode_tokens_per_s, other.decode_tokens_per_s),
        )


@dataclass(frozen=True)
class Difference:
    """How far a run's logits are from dense attention's, over the compared positions."""

    max_abs: float
    mean_abs: float
    mean_kl: float
    max_kl: float
    top1_agreement: float


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    name: str,
    input_ids: torch.Tensor,
    new_tokens: int,
    on_layer: Callable[[], None] = lambda: None,
) -> Run:
    """Prefill `input_ids` and decode `new_tokens` greedily; no early stop, so that rates compare.

    Args:
        model: A causal language model; which attention it runs is set beforehand.
        name: What to call the run.
        input_ids: `[1, tokens]`.
        new_tokens: How many to generate, at least 2.
        on_layer: Called as each decoder layer of the prefill is done.
    """
    _synchronize(input_ids.device)
    start = time.perf_counter()
    with per_layer(model, on_layer):
        output = model(input_ids, use_cache=True, logits_to_keep=COMPARED)
        token = output.logits[:, -1:].argmax(-1)
        tokens = [token.item()]
    prefilled = time.perf_counter()
    logits, cache = output.logits[0].clone(), output.past_key_values
    for _ in range(new_tokens - 1):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens.append(token.item())
    rate = (new_tokens - 1) / (time.perf_counter() - prefilled)
    return Run(name, prefilled - start, rate, tokens, logits)


def difference(dense: torch.Tensor, other: torch.Tensor) -> Difference:
    """Compare two `[positions, vocabulary]` logits; KL is KL(dense || other) in nats."""
    max_abs = mean_abs = kl_sum = max_kl = agree = 0.0
    for a, b in zip(dense.split(64), other.split(64), strict=True):
        a, b = a.float(), b.float()
        gap = (a - b).abs()
        log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        max_abs, max_kl = max(max_abs, gap.max().item()), max(max_kl, kl.max().item())
        mean_abs += gap.mean(-1).sum().item()
        kl_sum += kl.sum().item()
        agree += (a.argmax(-1) == b.argmax(-1)).sum().item()
    count = len(dense)
    return Difference(max_abs, mean_abs / count, kl_sum / count, max_kl, agree / count)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's decoder layers: the longest ModuleList in it."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


@contextmanager
def per_layer(model: PreTrainedModel, on_layer: Callable[[], None]) -> Iterator[None]:
    """Call `on_layer` whenever a decoder layer of `model` is done."""
    hooks = [layer.register_forward_hook(lambda *_: on_layer()) for layer in decoder_layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
