"""A cache for `generate` that keeps an int8 copy of its keys, so that decode reads less.

    model.generate(**inputs, past_key_values=Int8KeyCache(model.config, max_cache_len=8192))

Built on transformers' static cache, whose keys stay where they are: a dynamic cache writes all of K
anew for each token, which costs more than the copy saves.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer

from hf_sparse_attention.backends import kernel
from hf_sparse_attention.int8_keys import Int8Keys, can_be_on


class Int8KeyLayer(StaticLayer):  # type: ignore[misc]  # transformers is not typed
    """A static layer whose keys carry their int8 copy along, for our attention functions to find.

    The copy is tied to the tensor that `update` returns and to how often it was written to. Should
    anyone else write to it, the copy is not used any more, which is slower and nothing else. In
    `torch.inference_mode` torch does not count that. Compiled, and on devices where no kernels make
    a copy, it is a plain static layer.
    """

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        super().__init__(max_cache_len=max_cache_len, **kwargs)
        self.int8_keys: Int8Keys | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        batch, heads, length, head_size = self.keys.shape
        served = key_states.dtype in kernel.DTYPES and head_size <= kernel.MAX_INT8_HEAD_SIZE
        if served and can_be_on(self.keys.device):
            self.int8_keys = Int8Keys(batch, heads, length, head_size, self.keys.device)
            self.int8_keys.attach(self.keys)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            self.int8_keys = None
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._forget_if_stale()
        position = self.cumulative_length.clone()
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.int8_keys is not None:
            self.int8_keys.append(key_states, position)
            self.int8_keys.attach(keys)
        return keys, values

    def reset(self) -> None:
        super().reset()
        if self.int8_keys is not None:
            self.int8_keys.clear()
            self.int8_keys.attach(self.keys)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._forget_if_stale()
        before = self.keys
        super().reorder_cache(beam_idx)
        if self.int8_keys is not None and self.keys is not before:
            self.int8_keys.select(beam_idx)
            self.int8_keys.attach(self.keys)

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8KeyLayer:
        self._forget_if_stale()
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        if new.int8_keys is not None:
            new.int8_keys.attach(new.keys)
        return new

    def _forget_if_stale(self) -> None:
        """Clears the copy if someone else has written to the keys since."""
        if self.int8_keys is not None and not self.int8_keys.is_of(self.keys):
            self.int8_keys.clear()
            self.int8_keys.attach(self.keys)


class Int8KeyCache(StaticCache):  # type: ignore[misc]
    """transformers' `StaticCache` with an int8 copy of the keys of its full-attention layers.

    The copy takes `head_size + 12` bytes a key and head: about half of what a bfloat16 K takes, a
    quarter of K and V. It changes no result. It speeds up decoding with our attention where most
    blocks are skipped by a threshold; the budget rule (`max_dropped_mass`), softcapping and stats
    that ask for the dropped mass need exact maxima and read K as before. Layers with a sliding
    window or a linear state are as in `StaticCache`.

    On a GPU `generate` compiles the model where it sees a static cache; compiled, there is no copy:
    pass `disable_compile=True`.

    Args:
        config: the model's config.
        max_cache_len: the most tokens it will hold, prompt included.
        kwargs: as for `StaticCache`.
    """

    def __init__(self, config: Any, max_cache_len: int, **kwargs: Any) -> None:
        super().__init__(config, max_cache_len, **kwargs)
        for i, layer in enumerate(self.layers):
            if type(layer) is StaticLayer:
                self.layers[i] = Int8KeyLayer(max_cache_len)
