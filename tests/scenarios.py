"""The ways in which a model is run, each a function from a model to the logits that matter.

Every scenario is run under eager and under ours; only rows that are not padding come back.
"""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import padded, token_ids
from torch import Tensor
from transformers import DynamicCache, StaticCache

LENGTHS = [70, 41, 58]  # of the ragged batch; none a multiple of a block


def no_padding(model: Any) -> Tensor:
    return model(token_ids(2, 150)).logits


def one_token(model: Any) -> Tensor:
    return model(token_ids(2, 1)).logits


def left_padding(model: Any) -> Tensor:
    return _ragged(model, "left")


def right_padding(model: Any) -> Tensor:
    return _ragged(model, "right")


def _ragged(model: Any, side: str) -> Tensor:
    ids, mask = padded(LENGTHS, side)
    return model(ids, attention_mask=mask).logits[mask.bool()]


def all_ones_mask(model: Any) -> Tensor:
    ids = token_ids(2, 70)
    return model(ids, attention_mask=torch.ones_like(ids)).logits


def _in_steps(model: Any, cache: Any, steps: list[int], side: str | None = "left") -> Tensor:
    """Feeds a ragged batch `steps` tokens at a time (the last `len(steps) - 1` without padding)."""
    total = sum(steps)
    later = total - steps[0]
    ids, mask = padded([n + later for n in (steps[0], steps[0] - 17, steps[0] - 9)], "left")
    if side is None:
        mask = torch.ones_like(mask)
    rows, start = [], 0
    for step in steps:
        end = start + step
        output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        rows.append(output.logits[mask[:, start:end].bool()])
        start = end
    return torch.cat(rows)


def dynamic_cache(model: Any) -> Tensor:
    return _in_steps(model, DynamicCache(config=model.config), [40, 1, 1, 1])


def dynamic_cache_without_padding(model: Any) -> Tensor:
    return _in_steps(model, DynamicCache(config=model.config), [40, 1, 1], side=None)


def whole_cache(model: Any) -> Tensor:
    """A cache that keeps every key, whatever the layer's window."""
    return _in_steps(model, DynamicCache(), [40, 1, 1, 1])


def static_cache(model: Any) -> Tensor:
    return _in_steps(model, StaticCache(config=model.config, max_cache_len=90), [40, 1, 1, 1])


def static_cache_without_padding(model: Any) -> Tensor:
    cache = StaticCache(config=model.config, max_cache_len=90)
    return _in_steps(model, cache, [40, 1, 1], side=None)


def static_cache_exactly_full(model: Any) -> Tensor:
    return _in_steps(model, StaticCache(config=model.config, max_cache_len=42), [40, 1, 1])


def chunked_prefill(model: Any) -> Tensor:
    return _in_steps(model, DynamicCache(config=model.config), [32, 32, 19])


def chunked_prefill_static(model: Any) -> Tensor:
    cache = StaticCache(config=model.config, max_cache_len=100)
    return _in_steps(model, cache, [32, 32, 19, 1])


def few_queries(model: Any) -> Tensor:
    """What assisted decoding does: a handful of candidate tokens at a time."""
    return _in_steps(model, DynamicCache(config=model.config), [40, 5, 3, 6])


def packed(model: Any) -> Tensor:
    """Two rows of three packed sequences each, told apart by their position ids only."""
    rows = [[31, 25, 14], [9, 1, 60]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    return model(token_ids(2, 70), position_ids=positions, use_cache=False).logits


def user_bool_mask(model: Any) -> Tensor:
    """A prefix that sees itself both ways, then causal."""
    ids = token_ids(2, 50)
    mask = torch.ones(50, 50, dtype=torch.bool).tril()
    mask[:20, :20] = True
    return model(ids, attention_mask=_for_eager(model, mask.expand(2, 1, 50, 50))).logits


def user_additive_mask(model: Any) -> Tensor:
    ids = token_ids(2, 50)
    dtype = next(model.parameters()).dtype
    mask = torch.zeros(50, 50, dtype=dtype)
    mask = mask.masked_fill(~torch.ones(50, 50, dtype=torch.bool).tril(), torch.finfo(dtype).min)
    mask = mask + torch.linspace(0, 3, 50, dtype=dtype)  # a bias towards late keys
    return model(ids, attention_mask=mask.expand(2, 1, 50, 50)).logits


def _for_eager(model: Any, mask: Tensor) -> Tensor:
    """Eager only adds masks."""
    if model.config.get_text_config()._attn_implementation != "eager":
        return mask
    dtype = next(model.parameters()).dtype
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


ALL = {
    scenario.__name__: scenario
    for scenario in (
        no_padding,
        one_token,
        left_padding,
        right_padding,
        all_ones_mask,
        dynamic_cache,
        dynamic_cache_without_padding,
        whole_cache,
        static_cache,
        static_cache_without_padding,
        static_cache_exactly_full,
        chunked_prefill,
        chunked_prefill_static,
        few_queries,
        packed,
        user_bool_mask,
        user_additive_mask,
    )
}
FOR_ENCODERS = {
    name: ALL[name] for name in ("no_padding", "left_padding", "right_padding", "all_ones_mask")
}
