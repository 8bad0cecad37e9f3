"""A dynamic cache whose memory grows ahead of need, so that a decoding step copies one token only.

    model.generate(**inputs, past_key_values=GrowingCache(model.config))

transformers' dynamic cache joins all of K and V anew with each token. On a CPU, at 8K tokens, that
takes as long as reading them (docs/cpu.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

#: A full buffer grows to its tokens plus this share of them, and at least this many.
HEADROOM_SHARE, HEADROOM_LEAST = 8, 256


class GrowingLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """A dynamic layer whose keys and values are the beginnings of larger buffers.

    Compiled, or where gradients are wanted, it is a plain dynamic layer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        new = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(*new)
        is_odd = any(x.requires_grad or x.dtype != self.dtype for x in new)
        if torch.compiler.is_compiling() or is_odd:
            self.buffers = None
            return super().update(*new, *args, **kwargs)  # type: ignore[no-any-return]
        old: tuple[Tensor, Tensor] = (self.keys, self.values)  # type: ignore[has-type]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.buffers is None or not all(map(_begins, old, self.buffers, (end, end))):
            self.buffers = _with_room(old, new, start, end)
        for buffer, states in zip(self.buffers, new, strict=True):
            buffer[:, :, start:end].copy_(states)
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self.buffers = None


def _begins(tokens: Tensor, buffer: Tensor, end: int) -> bool:
    """Whether `tokens` `[B, H, L, D]` are the beginning of `buffer`, which has room up to `end`.

    They no longer are after the cache was reordered, repeated, or moved to another device.
    """
    return (
        tokens.dim() == 4
        and tokens.data_ptr() == buffer.data_ptr()
        and tokens.stride() == buffer.stride()
        and tokens.shape[:2] == buffer.shape[:2]
        and end <= buffer.shape[2]
    )


def _with_room(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], start: int, end: int
) -> tuple[Tensor, Tensor]:
    """Buffers that hold `old`, the first `start` tokens, and have room for `end` and more."""
    room = end + max(end // HEADROOM_SHARE, HEADROOM_LEAST)
    buffers = []
    for tokens, states in zip(old, new, strict=True):
        batch, heads, _, size = states.shape
        buffer = states.new_empty((batch, heads, room, size))
        if start:
            buffer[:, :, :start].copy_(tokens)
        buffers.append(buffer)
    return buffers[0], buffers[1]


class GrowingCache(DynamicCache):  # type: ignore[misc]
    """transformers' `DynamicCache`, with the same contents, whose steps don't copy what it holds.

    It takes an eighth more memory, and at least room for 256 more tokens. Layers with a sliding
    window or a linear state are as in `DynamicCache`.

    Args:
        config: the model's config.
        kwargs: as for `DynamicCache`.
    """

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        for i, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[i] = GrowingLayer()
