"""Room to grow for the caches that `generate` and a bare forward make for themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from hf_sparse_attention.growing_cache import GrowingLayer


def give_room(cache: Any) -> None:
    """Makes the empty full-attention layers of a dynamic cache `GrowingLayer`s; others stay.

    The cache object stays the one that its maker holds, so that `generate` may do with it all that
    it does.
    """
    if not isinstance(cache, DynamicCache):
        return
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[i] = GrowingLayer()


def before_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook: gives room to the cache that is passed, or that would be made inside."""
    if torch.compiler.is_compiling() or len(args) > 3:  # a cache passed by position: left alone
        return None
    cache = kwargs.get("past_key_values")
    if cache is None:
        config: Any = model.config
        uses_cache = kwargs.get("use_cache")
        if not (config.get_text_config().use_cache if uses_cache is None else uses_cache):
            return None
        cache = DynamicCache(config=config)
        kwargs = {**kwargs, "past_key_values": cache}
    give_room(cache)
    return args, kwargs
