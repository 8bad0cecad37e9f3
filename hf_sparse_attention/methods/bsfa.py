"""Block-Sparse FlashAttention (arXiv 2512.07011, section 4): keep about k blocks a block row.

A block is skipped if its largest score lies below a threshold that was calibrated for its layer,
head and query position.

Positions are the request's own, so padding, chunked prefill and static caches meet the thresholds
that an unpadded request would; a block row that a chunk boundary has shifted takes those of the
calibrated row its first query falls into. Positions past the calibrated ones reuse the last
(section 4.3). Ours: decode has thresholds of its own, and block 0, the attention sink, is always
kept unless `keep_sink` is off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.methods.base import (
    Method,
    end_of_causal,
    first_key,
    heads_of,
    loaded_tables,
    refuse_geometry,
)
from hf_sparse_attention.thresholds import Thresholds
from hf_sparse_attention.types import PHASES, AttentionCall, BlockGeometry, SkipRule


class Bsfa(Method):
    """The absolute rule; it needs thresholds of this very model."""

    name = "bsfa"

    def check(self, config: SparseAttentionConfig) -> None:
        """Refuses missing thresholds, another geometry than theirs, or a level they lack."""
        tables = _tables(config)
        refuse_geometry(config, self.calibrated(config))
        if config.keep_sink != tables.keep_sink:
            raise ValueError(
                f"keep_sink: expected {tables.keep_sink}, as the thresholds were calibrated, got "
                f"{config.keep_sink}"
            )
        if config.level is not None:
            tables.level_index(config.level)

    def notes(self, config: SparseAttentionConfig) -> list[str]:
        """Says when decoding will be exact because it was not calibrated."""
        tables = _tables(config)
        calibrated = any(
            tables.table(geometry.name, "decode") is not None
            for geometry in self.geometries(config)
        )
        if not calibrated and "decode" not in (config.max_dropped_mass or {}):
            return ["bsfa: these thresholds are for prefill only; decoding skips nothing."]
        return []

    def calibrated(self, config: SparseAttentionConfig) -> list[BlockGeometry]:
        """The geometries of the tables that hold prefill thresholds."""
        tables = _tables(config)
        geometries = tables.geometries.values()
        return [g for g in geometries if tables.table(g.name, "prefill") is not None]

    def rule(
        self,
        config: SparseAttentionConfig,
        layer: int,
        call: AttentionCall,
        geometry: BlockGeometry,
    ) -> SkipRule:
        """`block_threshold` `[B|1, Hq, NQ]` for a calibrated phase, and the budget if any."""
        prepared = self.prepare(config, call.q.device, geometry)
        budget = prepared.get(f"{call.phase}.max_dropped_mass")
        table = prepared.get(f"{call.phase}.threshold")
        if table is None:
            return SkipRule(max_dropped_mass=budget, keep_sink=config.keep_sink)
        blocks = row_positions(call, geometry) // geometry.block_q
        blocks = blocks.clamp(max=table.shape[2] - 1)  # [B|1, NQ]
        threshold = heads_of(table, layer, call)[:, blocks].transpose(0, 1)
        return SkipRule(
            block_threshold=threshold, max_dropped_mass=budget, keep_sink=config.keep_sink
        )

    def _tensors(
        self, config: SparseAttentionConfig, device: torch.device, geometry: BlockGeometry
    ) -> dict[str, Tensor]:
        """Adds `<phase>.threshold` `[layers, heads, blocks]` of the chosen level."""
        self.check(config)
        tensors = super()._tensors(config, device, geometry)
        tables = _tables(config)
        level = max(tables.levels) if config.level is None else config.level
        for phase in PHASES:
            table = tables.table(geometry.name, phase)
            if table is not None:
                # A copy: a view's offset is guarded on, and another level would recompile.
                chosen = table[tables.level_index(level)].to(device, copy=True)
                tensors[f"{phase}.threshold"] = chosen
        return tensors


def row_positions(call: AttentionCall, geometry: BlockGeometry) -> Tensor:
    """Where the first query of each block row (decode: each query) stands in its request.

    int64 `[B|1, NQ]`; position 0 is the first valid key. Rows before it (left padding) do not
    count.
    """
    q_len = call.q.shape[2]
    device = call.q.device
    step = 1 if call.phase == "decode" else geometry.block_q
    rows = torch.arange(0, q_len, step, device=device)[None]
    end = end_of_causal(call)
    offset = (
        end - q_len if isinstance(end, Tensor) else torch.full((1,), end - q_len, device=device)
    )
    first = first_key(call)
    if first is not None:
        offset = offset - first
    return offset.clamp(min=0)[:, None] + rows


def _tables(config: SparseAttentionConfig) -> Thresholds:
    missing = (
        "bsfa: expected thresholds calibrated for this model, got none. Run "
        "config = hf_sparse_attention.calibrate(model, data, method='bsfa'), data an iterable of "
        "token id lists, then hf_sparse_attention.set_sparse_attention(model, config)"
    )
    tables = loaded_tables(config, missing)
    if not tables.levels:
        raise ValueError(missing)
    return tables
