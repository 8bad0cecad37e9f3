"""What the attention skips while it trains, and apart from that while it is evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import distributed, nn

from hf_sparse_attention.sharding import is_distributed
from hf_sparse_attention.stats import Stats, collect_stats
from hf_sparse_attention.types import PHASES, Phase

Activity = Literal["training", "evaluation"]

#: What the names of log entries end with. Training is prefill, so that has the plain names.
SUFFIXES: Mapping[Phase, str] = {"prefill": "", "decode": "_decode"}

#: Whose stats are being collected by a meter. One that an error or Ctrl-C kept from stopping gives
#: way to the next.
_running: WeakKeyDictionary[nn.Module, Meter] = WeakKeyDictionary()


class Meter:
    """Counts from its creation to `stop`, and gives the counts since they were last read.

    Args:
        model: whose attention is watched.
    """

    def __init__(self, model: nn.Module) -> None:
        if model in _running:
            _running[model].stop()
        self._model = model
        # Both live as long as the run: a compiled forward is compiled anew for others.
        self._stats: dict[Activity, Stats] = {"training": Stats(), "evaluation": Stats()}
        self._collecting: AbstractContextManager[Stats] | None = None
        #: Why attention ran dense here, where it did, before the last reading.
        self.reasons: list[str] = []
        self.count("evaluation")
        _running[model] = self

    def count(self, activity: Activity) -> None:
        """Counts what comes now as `activity`."""
        self._pause()
        self._collecting = collect_stats(self._model, into=self._stats[activity])
        self._collecting.__enter__()

    def stop(self) -> None:
        """Leaves the model as it was."""
        self._pause()
        _running.pop(self._model, None)

    def _pause(self) -> None:
        if self._collecting is not None:
            self._collecting.__exit__(None, None, None)
        self._collecting = None

    def read(self, activity: Activity, device: torch.device) -> dict[str, float]:
        """Counts of all processes since the last reading, by name; empty if no attention ran.

        `sparsity` (0 if all ran dense), and if not all did, `dropped_mass_p99` and
        `dropped_mass_max`; the same with `_decode` for decode. Over several processes the p99 is
        the largest of theirs.

        Args:
            activity: which counts.
            device: through which processes exchange them; all of them must ask.
        """
        stats = self._stats[activity]
        sums = torch.zeros(len(PHASES), 3, dtype=torch.int64)  # visited, skipped, dense calls
        bounds = torch.full((len(PHASES), 2), -1.0)  # p99, max; -1 is none
        for row, phase in enumerate(PHASES):
            for counts in stats.counts(phase).values():
                sums[row, :2] += counts.sum(dim=0)
            sums[row, 2] = sum(stats.dense(phase).values())
            if mass := stats.dropped_mass(phase):
                bounds[row] = torch.tensor([mass["p99"], mass["max"]])
        self.reasons = [reason for reason, calls in stats.dense().items() if calls]
        stats.reset()
        if is_distributed():
            sums, bounds = sums.to(device), bounds.to(device)
            distributed.all_reduce(sums)
            distributed.all_reduce(bounds, distributed.ReduceOp.MAX)
        found: dict[str, float] = {}
        for phase, (visited, skipped, dense), (p99, largest) in zip(
            PHASES, sums.tolist(), bounds.tolist(), strict=True
        ):
            if visited or dense:
                found["sparsity" + SUFFIXES[phase]] = skipped / max(visited, 1)
            if visited and largest >= 0:
                found["dropped_mass_p99" + SUFFIXES[phase]] = p99
                found["dropped_mass_max" + SUFFIXES[phase]] = largest
        return found
