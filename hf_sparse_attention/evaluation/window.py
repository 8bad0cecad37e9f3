"""The papers' baseline: a sliding window that keeps as many blocks as a skip rule would.

It asks nothing of the scores: each query sees its newest keys and no others. What it loses against
a rule that skips as much is what looking at the scores is worth.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attention.calibration.top_blocks import kept_blocks
from hf_sparse_attention.evaluation.settings import Setting
from hf_sparse_attention.functional import attend
from hf_sparse_attention.stats import ATTRIBUTE as STATS
from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, SkipRule


class SlidingWindow:
    """Stands in for a model's attention, as `calibration.attach.attached` lets it.

    Its blocks are counted like those of a rule: a block outside of the window counts as skipped.

    Args:
        model: whose stats get the counts while they are collected.
        setting: `window:<share>`, the share of the blocks left out of each call, or
            `window:k=<k>`, as many keys as BSFA's level k keeps (section 5.1 of its paper).
        geometry: the blocks that are counted.
    """

    def __init__(self, model: Any, setting: Setting, geometry: BlockGeometry) -> None:
        self.model, self.setting, self.geometry = model, setting, geometry

    def observe(self, layer: int, call: AttentionCall) -> Tensor:
        """The output `[B, Lq, Hq, Dv]` of `call` under the window.

        Raises:
            ValueError: the call has padding or a mask of its own, which the counts do not know.
        """
        q_len, kv_len = call.q.shape[2], call.k.shape[2]
        padded = call.key_valid is not None and not bool(call.key_valid.all())
        moved = call.q_offset is not None and bool((call.q_offset != kv_len - q_len).any())
        if call.mask is not None or moved or padded:
            raise ValueError("window: expected requests without padding, got a masked call")
        rows = self.geometry.block_q if call.phase == "prefill" else 1
        own = kv_len if call.window is None else call.window
        if self.setting.level is not None:
            keys = kept_blocks(self.geometry, self.setting.level) * self.geometry.block_k
        else:
            assert self.setting.amount is not None
            keys = _window_that_skips(
                self.setting.amount, q_len, kv_len, own, rows, self.geometry.block_k
            )
        result = attend(replace(call, window=min(own, keys)), SkipRule.never(), self.geometry)
        stats = vars(self.model).get(STATS)
        if stats is not None:
            visited = blocks_in_window(q_len, kv_len, own, rows, self.geometry.block_k)
            kept = blocks_in_window(q_len, kv_len, min(own, keys), rows, self.geometry.block_k)
            counts = torch.tensor([visited, visited - kept]).expand(*call.q.shape[:2], 2)
            stats.record(layer, call, AttentionResult(result.out, counts=counts), self.geometry)
        return result.out


@functools.lru_cache(maxsize=1024)
def blocks_in_window(q_len: int, kv_len: int, window: int, rows: int, block_k: int) -> int:
    """Blocks with a key that some query of their block row sees, for one head of a causal call.

    Args:
        q_len: queries, the last of which stands at the last key.
        kv_len: keys.
        window: keys that a query sees.
        rows: queries in a block row.
        block_k: keys in a block.
    """
    first = torch.arange(kv_len - q_len, kv_len, rows)
    last = (first + rows).clamp(max=kv_len) - 1
    oldest = (first - window + 1).clamp(min=0)
    return int((last // block_k - oldest // block_k + 1).sum())


@functools.lru_cache(maxsize=1024)
def _window_that_skips(
    share: float, q_len: int, kv_len: int, own: int, rows: int, block_k: int
) -> int:
    """The widest window, of at least one key, that keeps at most `1 - share` of the blocks."""
    allowed = (1.0 - share) * blocks_in_window(q_len, kv_len, own, rows, block_k)
    low, high = 1, own + 1  # low is taken, high is too wide
    while high - low > 1:
        middle = (low + high) // 2
        if blocks_in_window(q_len, kv_len, middle, rows, block_k) <= allowed:
            low = middle
        else:
            high = middle
    return low
