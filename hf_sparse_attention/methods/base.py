"""What a method is: it turns settings and one attention call into a `SkipRule`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.types import PHASES, AttentionCall, SkipRule


class Method(ABC):
    """One way to decide which blocks to skip; stateless, so one instance serves every model.

    The numbers of a config become tensors once per config and device (`prepare`), and `rule` only
    reads those: a compiled forward takes them as inputs, so other values do not recompile it.
    Whoever changes a model's config should call `prepare` for the model's device, outside of any
    compiled forward.
    """

    name: ClassVar[str]

    @abstractmethod
    def check(self, config: SparseAttentionConfig) -> None:
        """Refuses a config that this method cannot run.

        Raises:
            ValueError: says what is missing and what to call.
        """

    @abstractmethod
    def notes(self, config: SparseAttentionConfig) -> list[str]:
        """What a user of this config should be told once, such as that it is not calibrated."""

    @abstractmethod
    def rule(self, config: SparseAttentionConfig, layer: int, call: AttentionCall) -> SkipRule:
        """When blocks of `call`, which layer number `layer` makes, may be skipped.

        Reads shapes, positions and validity, never q, k or v; no device sync.
        """

    def prepare(self, config: SparseAttentionConfig, device: torch.device) -> dict[str, Tensor]:
        """The config's numbers as tensors on `device`, by name; made at the first request."""
        key = f"{self.name} on {device}"
        if key not in config.prepared:
            config.prepared[key] = self._tensors(config, device)
        prepared: dict[str, Tensor] = config.prepared[key]
        return prepared

    def _tensors(self, config: SparseAttentionConfig, device: torch.device) -> dict[str, Tensor]:
        """The budgets, `[1, 1]` each, under `<phase>.max_dropped_mass`; methods add theirs."""
        budgets = config.max_dropped_mass or {}
        return {
            f"{phase}.max_dropped_mass": torch.full((1, 1), budgets[phase], device=device)
            for phase in PHASES
            if phase in budgets
        }


def first_key(call: AttentionCall) -> Tensor | None:
    """Column of each request's first valid key, int64 `[B]`; None if every column is valid."""
    if call.key_valid is None or call.key_valid.shape[1] == 0:
        return None
    return call.key_valid.to(torch.int8).argmax(dim=1)


def end_of_causal(call: AttentionCall) -> Tensor | int:
    """The column after the one that the last query stands at: int64 `[B|1]`, or a number."""
    if call.q_offset is None:
        return call.k.shape[2]
    return call.q_offset + call.q.shape[2]
