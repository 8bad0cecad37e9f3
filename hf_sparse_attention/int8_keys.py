"""An int8 copy of K, kept beside a cache: decode then reads less of K.

Where the copy proves that the exact test would skip a block, K itself is not read. No result
depends on it, not in one bit (docs/int8-filter.md has the proof), provided that it is a copy of the
very keys that it is used with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hf_sparse_attention.backends import cpu, cuda, triton

_ATTRIBUTE = "_sparse_attention_int8_keys"


class _Copier(Protocol):
    """What a backend offers that can make a copy."""

    NAME: str

    def available(self) -> str | None: ...

    def append_int8_keys(self, k: Tensor, position: Tensor, copy: Tensor) -> None: ...


#: Who makes the copy on a type of device, first choice first; every backend reads it. On the CPU
#: Triton's kernels run in tests only.
_COPIERS: dict[str, tuple[_Copier, ...]] = {
    "cpu": (cpu, triton),
    "cuda": (cuda, triton),  # ROCm's GPUs too
    "xpu": (triton,),
}


def _copier(device: torch.device) -> _Copier:
    """The backend that makes copies on `device`.

    Raises:
        RuntimeError: there is none; says why.
    """
    reasons = []
    for backend in _COPIERS.get(device.type, ()):
        reason = backend.available()
        if reason is None:
            return backend
        reasons.append(f"{backend.NAME}: {reason}")
    why = "; ".join(reasons) or f"expected one of {', '.join(_COPIERS)}"
    raise RuntimeError(f"int8 keys: nothing makes them on {device}: {why}")


def can_be_on(device: torch.device) -> bool:
    """Whether there is a backend that makes copies on `device`."""
    return any(backend.available() is None for backend in _COPIERS.get(device.type, ()))


class Int8Keys:
    """A copy of `[batch, heads, length, head_size]` keys, at first of none of them.

    It takes `head_size + 12` bytes a key. Keys never appended are merely not known: blocks
    that hold them are read from K.

    Args:
        batch, heads, length, head_size: the cache's B, Hkv, its most keys, and D up to 512.
        device: where the cache is; the CPU by default.

    Raises:
        RuntimeError: no kernels can make a copy there; says why.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        length: int,
        head_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape = (batch, heads, length, head_size)
        _copier(torch.device(device))
        self.data = _empty(self.shape, device)
        self._version: int | None = None

    @classmethod
    def of(cls, k: Tensor) -> Int8Keys:
        """The copy of all of `k` `[B, Hkv, L, D]`, float32, bfloat16 or float16, on its device."""
        batch, heads, length, head_size = k.shape
        copy = cls(batch, heads, length, head_size, k.device)
        copy.append(k, 0)
        return copy

    def append(self, k: Tensor, position: int | Tensor) -> None:
        """Enters `k` `[B, Hkv, n, D]` at `position` (a number, or one int64) and behind.

        A head's first keys also fix the mean that all its keys are stored relative to: better a
        whole prompt than a single token. Entering other keys at the same place replaces them.

        A position on a GPU is read there, so that nothing waits and a CUDA graph can hold the call:
        what lies beyond the copy's end is then left out without an error.
        """
        device, n = self.data.device, k.shape[2]
        known = not isinstance(position, Tensor) or position.device.type == "cpu"
        fits = (*k.shape[:2], k.shape[3]) == (*self.shape[:2], self.shape[3])
        if known:
            fits = fits and 0 <= int(position) <= self.shape[2] - n
        if not fits or n > self.shape[2] or k.device != device:
            place = int(position) if known else "a place read on the device"
            raise ValueError(
                f"int8 keys: expected [B, Hkv, n, D] as in {list(self.shape)} on {device} and at "
                f"most {self.shape[2]} keys, got {list(k.shape)} on {k.device} at {place}"
            )
        if known:
            position = torch.full((1,), int(position), dtype=torch.int64, device=device)
        assert isinstance(position, Tensor)
        _copier(device).append_int8_keys(k.detach(), position.to(device, torch.int64), self.data)

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
            ValueError: it cannot be a copy of `k`: shapes or devices differ, or `k` is longer.
        """
        shape: Sequence[int] = self.shape
        fits = (*k.shape[:2], k.shape[3]) == (*shape[:2], shape[3]) and k.shape[2] <= shape[2]
        if not fits or k.device != self.data.device:
            raise ValueError(
                f"int8_keys: expected a copy of k {list(k.shape)} on {k.device}, got {list(shape)} "
                f"on {self.data.device}"
            )
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


def _empty(shape: tuple[int, int, int, int], device: torch.device | str) -> Tensor:
    """The tensor that `AttentionCall.int8_keys` wants, knowing no key yet.

    As the kernels' own `empty_int8_keys` describes it, `[B, Hkv, chunks, bytes]`.
    """
    batch, heads, length, head_size = shape
    width = -(-head_size // 4) * 4
    sizes = (batch, heads, 1 + -(-length // 64), 64 * (width + 12))
    return torch.zeros(sizes, dtype=torch.uint8, device=device)


def _version(key: Tensor) -> int | None:
    return None if key.is_inference() else key._version
