"""What skipping costs on held-out text.

The cost is what the sparse model's next-token distributions lose against the dense model's, at the
end of each sample. For prefill the whole sample runs sparse. For decode the prompt runs dense, and
the last positions are fed as decoding sees them: a few at a time against the cache, each position
decided by itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_sparse_attention.calibration.attach import running
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.stats import collect_stats
from hf_sparse_attention.types import DECODE_MAX_QUERIES, PHASES, Phase

#: Positions at the end of each sample whose predictions are compared.
POSITIONS: dict[Phase, int] = {"prefill": 256, "decode": 64}

#: How a model is to run: settings, whatever the length; or a function that makes a model run so.
Way = SparseAttentionConfig | Callable[[Any], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Cost:
    """What skipping costs on held-out text.

    Args:
        kl: Kullback-Leibler divergence of the sparse prediction from the dense one, in nats, mean
            over positions.
        ppl_increase: the sparse perplexity over the dense one, minus 1.
        sparsity: measured while at it.
        nll: of the text, in nats a token, over the same positions: its exponential is the sparse
            model's perplexity.
    """

    kl: float
    ppl_increase: float
    sparsity: float
    nll: float = math.nan

    def to_dict(self) -> dict[str, float]:
        """JSON-ready, rounded."""
        return {
            "measured": round(self.sparsity, 4),
            "kl": float(f"{self.kl:.4g}"),
            "ppl_increase": float(f"{self.ppl_increase:.4g}"),
        }


class HeldOut:
    """Held-out samples, what the dense model makes of them, and what skipping would cost there.

    Args:
        model: a transformers causal language model; left as it was.
        samples: token ids `[n]` int64.
        progress: show a bar, over sparse runs; how many there will be is not known.

    Raises:
        ValueError: no sample is long enough to be measured.
    """

    def __init__(self, model: Any, samples: Sequence[Tensor], progress: bool = False) -> None:
        self.model = model
        least = 2 * POSITIONS["decode"]
        device = next(model.parameters()).device
        self.samples = [x[None].to(device) for x in samples if len(x) >= least]
        if not self.samples:
            raise ValueError(f"validation: expected samples of at least {least} tokens, got none")
        self._dense: dict[int, Tensor] = {}
        self._bar = tqdm(desc="choosing by cost", unit=" runs", disable=not progress)

    def costs(self, ways: Sequence[Way], phase: Phase) -> list[Cost]:
        """What running `phase` in each of `ways` costs, averaged over the samples."""
        return [_mean(costs) for costs in zip(*self.by_sample(ways, phase), strict=True)]

    @torch.no_grad()
    def by_sample(self, ways: Sequence[Way], phase: Phase) -> list[list[Cost]]:
        """What running `phase` in each of `ways` costs on each sample: a list for each sample."""
        found = []
        for n, ids in enumerate(self.samples):
            with running(self.model, _DENSE):
                if phase == "decode":
                    cache = self._prompt(ids)
                    dense = self._decoded(ids, cache)
                else:
                    cache = None
                    if n not in self._dense:
                        self._dense[n] = self._last_logits(ids)
                    dense = self._dense[n]
            found.append([self._cost(way, phase, ids, dense, cache) for way in ways])
        return found

    def close(self) -> None:
        """Ends the progress bar."""
        self._bar.close()

    def _cost(self, way: Way, phase: Phase, ids: Tensor, dense: Tensor, cache: Any) -> Cost:
        # Settings are looked at by themselves, a function is taken at its word.
        sparse_model = (
            running(self.model, replace(way, min_length=0))
            if isinstance(way, SparseAttentionConfig)
            else way(self.model)
        )
        with sparse_model:
            with collect_stats(self.model, dropped_mass=False) as stats:
                sparse = self._last_logits(ids) if cache is None else self._decoded(ids, cache)
            sparsity = stats.sparsity(phase)
        self._bar.update()
        log_p, log_q = (x.float().log_softmax(-1) for x in (dense, sparse))
        kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        follows = ids[0, 1 - len(sparse) :, None]
        lost = float((log_p - log_q)[:-1].gather(1, follows).mean())
        nll = -float(log_q[:-1].gather(1, follows).mean())
        return Cost(max(kl, 0.0), math.expm1(lost), sparsity, nll)

    def _last_logits(self, ids: Tensor) -> Tensor:
        """Of the last positions, `[positions, vocabulary]`."""
        positions = POSITIONS["prefill"]
        # Models that do not know the keyword take it for another layer's, and give all logits.
        logits = self.model(ids, use_cache=False, logits_to_keep=positions).logits
        last: Tensor = logits[0, -positions:].clone()
        return last

    def _prompt(self, ids: Tensor) -> Any:
        """The cache of all but the positions that are decoded."""
        prompt = ids[:, : -POSITIONS["decode"]]
        return self.model(prompt, use_cache=True, logits_to_keep=1).past_key_values

    def _decoded(self, ids: Tensor, cache: Any) -> Tensor:
        """Logits of the last positions, decoded against a copy of `cache`."""
        cache = copy.deepcopy(cache)
        parts = torch.split(ids[:, -POSITIONS["decode"] :], DECODE_MAX_QUERIES, dim=1)
        logits = [
            self.model(some, past_key_values=cache, use_cache=True).logits[0] for some in parts
        ]
        return torch.cat(logits)


_DENSE = SparseAttentionConfig(max_dropped_mass=dict.fromkeys(PHASES, 0.0), min_length=2**62)


def _mean(costs: Sequence[Cost]) -> Cost:
    n = len(costs)
    lost = sum(math.log1p(cost.ppl_increase) for cost in costs) / n
    return Cost(
        kl=sum(cost.kl for cost in costs) / n,
        ppl_increase=math.expm1(lost),
        sparsity=sum(cost.sparsity for cost in costs) / n,
        nll=sum(cost.nll for cost in costs) / n,
    )
