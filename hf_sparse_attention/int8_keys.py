"""An int8 copy of K, kept beside a cache: decode on the CPU then reads less of K.

Where the copy proves that the exact test would skip a block, K itself is not read. No result
depends on it, not in one bit (docs/int8-filter.md has the proof), provided that it is a copy of the
very keys that it is used with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_sparse_attention.backends import cpu

_ATTRIBUTE = "_sparse_attention_int8_keys"


class Int8Keys:
    """A copy of `[batch, heads, length, head_size]` keys, at first of none of them.

    It takes `head_size + 12` bytes a key. Keys never appended are merely not known: blocks
    that hold them are read from K.

    Args:
        batch, heads, length, head_size: the cache's B, Hkv, its most keys, and D up to 512.

    Raises:
        RuntimeError: there is no compiled CPU kernel; says why.
    """

    def __init__(self, batch: int, heads: int, length: int, head_size: int) -> None:
        self.shape = (batch, heads, length, head_size)
        self.data = cpu.empty_int8_keys(batch, heads, length, head_size)
        self._version: int | None = None

    @classmethod
    def of(cls, k: Tensor) -> Int8Keys:
        """The copy of all of `k` `[B, Hkv, L, D]`: float32, bfloat16 or float16, on the CPU."""
        batch, heads, length, head_size = k.shape
        copy = cls(batch, heads, length, head_size)
        copy.append(k, 0)
        return copy

    def append(self, k: Tensor, position: int | Tensor) -> None:
        """Enters `k` `[B, Hkv, n, D]` at `position` (a number, or one int64) and behind.

        A head's first keys also fix the mean that all its keys are stored relative to: better a
        whole prompt than a single token. Entering other keys at the same place replaces them.
        """
        position = torch.as_tensor(position, dtype=torch.int64)
        end = int(position) + k.shape[2]
        if (*k.shape[:2], k.shape[3]) != (*self.shape[:2], self.shape[3]) or end > self.shape[2]:
            raise ValueError(
                f"int8 keys: expected [B, Hkv, n, D] as in {list(self.shape)} and at most "
                f"{self.shape[2]} keys, got {list(k.shape)} at {int(position)}"
            )
        cpu.append_int8_keys(k.detach(), position, self.data)

    def select(self, indices: Tensor) -> None:
        """Makes batch item i what item `indices[i]` was; int64 `[new B]`."""
        self.data = self.data.index_select(0, indices.to(self.data.device))
        self.shape = (self.data.shape[0], *self.shape[1:])

    def clear(self) -> None:
        """Forgets all keys."""
        self.data.zero_()

    def data_for(self, k: Tensor) -> Tensor:
        """The copy as a backend wants it, for `k` `[B, Hkv, L, D]`.

        Raises:
            ValueError: it cannot be a copy of `k`: the shapes differ, or `k` is longer.
        """
        shape: Sequence[int] = self.shape
        if (*k.shape[:2], k.shape[3]) != (*shape[:2], shape[3]) or k.shape[2] > shape[2]:
            raise ValueError(f"int8_keys: expected a copy of k {list(k.shape)}, got {list(shape)}")
        return self.data

    def attach(self, key: Tensor) -> None:
        """Ties this copy to the tensor object `key`, as it is now."""
        self._version = _version(key)
        setattr(key, _ATTRIBUTE, self)

    def is_of(self, key: Tensor) -> bool:
        """Whether `key` is what the copy was tied to, and was not written to since.

        Torch counts what is written to a tensor, except in inference mode.
        """
        return getattr(key, _ATTRIBUTE, None) is self and self._version == _version(key)


def attached(key: Tensor) -> Tensor | None:
    """The int8 copy tied to the tensor object `key`; None where there is none that still holds."""
    if torch.compiler.is_compiling():
        return None
    copy = getattr(key, _ATTRIBUTE, None)
    return copy.data_for(key) if isinstance(copy, Int8Keys) and copy.is_of(key) else None


def _version(key: Tensor) -> int | None:
    return None if key.is_inference() else key._version
