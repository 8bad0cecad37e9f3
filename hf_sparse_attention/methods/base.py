"""What a method is: it turns settings and one attention call into a `SkipRule`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.thresholds import Thresholds
from hf_sparse_attention.types import PHASES, AttentionCall, BlockGeometry, SkipRule


class Method(ABC):
    """One way to decide which blocks to skip; stateless, so one instance serves every model.

    The numbers of a config become tensors once per config, geometry and device (`prepare`), and
    `rule` only reads those: a compiled forward takes them as inputs, so other values do not
    recompile it. Whoever changes a model's config should call `prepare` for the model's device,
    outside of any compiled forward.
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
    def calibrated(self, config: SparseAttentionConfig) -> list[BlockGeometry]:
        """The geometries that this config has thresholds for."""

    @abstractmethod
    def rule(
        self,
        config: SparseAttentionConfig,
        layer: int,
        call: AttentionCall,
        geometry: BlockGeometry,
    ) -> SkipRule:
        """When blocks of `call`, which layer number `layer` makes, may be skipped.

        Reads shapes, positions and validity, never q, k or v; no device sync.

        Args:
            config: the settings.
            layer: the layer's number.
            call: what is to be computed.
            geometry: one of `geometries(config)`, the one that runs.
        """

    def geometries(self, config: SparseAttentionConfig) -> list[BlockGeometry]:
        """The geometries that may run, the default one first; a backend chooses among them."""
        if config.geometry is not None:
            return [config.geometry]
        default = BlockGeometry().name
        found = sorted(self.calibrated(config), key=lambda geometry: geometry.name != default)
        return found or [BlockGeometry()]

    def prepare(
        self, config: SparseAttentionConfig, device: torch.device, geometry: BlockGeometry
    ) -> dict[str, Tensor]:
        """The numbers for `geometry` as tensors on `device`, by name; made at the first request."""
        key = f"{self.name} {geometry.name} on {device}"
        if key not in config.prepared:
            config.prepared[key] = self._tensors(config, device, geometry)
        prepared: dict[str, Tensor] = config.prepared[key]
        return prepared

    def _tensors(
        self,
        config: SparseAttentionConfig,
        device: torch.device,
        geometry: BlockGeometry,  # noqa: ARG002 - a budget holds for every geometry
    ) -> dict[str, Tensor]:
        """The budgets, `[1, 1]` each, under `<phase>.max_dropped_mass`; methods add theirs."""
        budgets = config.max_dropped_mass or {}
        return {
            f"{phase}.max_dropped_mass": torch.full((1, 1), budgets[phase], device=device)
            for phase in PHASES
            if phase in budgets
        }


def heads_of(table: Tensor, layer: int, call: AttentionCall) -> Tensor:
    """`table` `[layers, heads, ...]` cut down to the query heads of `layer` that `call` holds.

    Args:
        table: by layer and global head number.
        layer: the layer's number.
        call: says which: all, or a rank's share of them.

    Raises:
        ValueError: the table has no such layer or heads.
    """
    heads = slice(call.first_head, call.first_head + call.q.shape[1])
    if not 0 <= layer < table.shape[0] or heads.stop > table.shape[1]:
        raise ValueError(
            f"thresholds: expected layer {layer} with {heads.stop} heads to be calibrated, got "
            f"{table.shape[0]} layers with {table.shape[1]} heads; they are another model's"
        )
    return table[layer, heads]


def loaded_tables(config: SparseAttentionConfig, otherwise: str) -> Thresholds:
    """The config's tables.

    Raises:
        ValueError: there are none; says what to call.
    """
    if config.tables is not None:
        return config.tables
    if config.thresholds_file is not None:
        raise ValueError(
            f"{config.method}: expected the thresholds of {config.thresholds_file['name']} to be "
            "loaded; call hf_sparse_attention.load_thresholds(model, repo_or_folder) before the "
            "first forward"
        )
    raise ValueError(otherwise)


def refuse_geometry(config: SparseAttentionConfig, calibrated: Iterable[BlockGeometry]) -> None:
    """Raises if `config.geometry` is none of `calibrated`: there they skip other blocks."""
    if config.geometry is not None and config.geometry not in calibrated:
        names = " or ".join(_describe(geometry) for geometry in calibrated) or "none"
        raise ValueError(
            f"geometry: expected {names}, on which the thresholds were calibrated, got "
            f"{_describe(config.geometry)}; there they skip other blocks"
        )


def _describe(geometry: BlockGeometry) -> str:
    return f"{geometry.name} ({geometry.order}, split_k {geometry.split_k})"


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
