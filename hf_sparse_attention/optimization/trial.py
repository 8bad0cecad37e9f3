"""What a model predicts on a few texts, and how long it takes: the same before and after a step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attention.optimization.report import Difference, Timing

#: Positions at the end of each prompt whose predictions are compared.
POSITIONS = 256
#: Tokens of each text that are decoded after the prompt, one by one, as `generate` does.
DECODED = 16
#: Tokens of a run before the first that counts.
WARM_UP = 64


class Trial:
    """The texts, and what the model as it came makes of them.

    Args:
        model: a causal language model.
        samples: token ids `[n]` int64, more than `DECODED` and `WARM_UP`.
    """

    def __init__(self, model: Any, samples: Sequence[Tensor]) -> None:
        self.samples = [ids[None] for ids in samples]
        self.before, self._reference = self.run(model)

    def difference(self, logits: Sequence[Tensor]) -> Difference:
        """Of `logits`, as `run` gives them, from those of the model as it came.

        Logits that are not finite are infinitely far.
        """
        kls, lost, largest = [], [], 0.0
        for ids, one, other in zip(self.samples, self._reference, logits, strict=True):
            if not other.isfinite().all():
                return Difference(math.inf, math.inf, math.inf)
            p, q = (x.float().log_softmax(-1) for x in (one, other))
            kls.append((p.exp() * (p - q)).sum(-1))
            follows = ids[0, 1 - len(one) :, None]
            lost.append((p - q)[:-1].gather(1, follows))
            largest = max(largest, float((one.float() - other.float()).abs().max()))
        ratio = math.exp(float(torch.cat(lost).mean()))
        return Difference(ratio, max(float(torch.cat(kls).mean()), 0.0), largest)

    @torch.no_grad()
    def run(self, model: Any) -> tuple[Timing, list[Tensor]]:
        """How long `model` takes, mean over the texts, and its logits `[positions, vocabulary]`."""
        model(self.samples[0][:, :WARM_UP], use_cache=True, logits_to_keep=1)
        prefill, decode, logits = [], [], []
        for ids in self.samples:
            prompt, rest = ids[:, :-DECODED], ids[:, -DECODED:]
            start = time.perf_counter()
            out = model(prompt, use_cache=True, logits_to_keep=POSITIONS)
            prefill.append(time.perf_counter() - start)
            # A model that does not know the keyword gives all.
            made, cache = [out.logits[0, -POSITIONS:].clone()], out.past_key_values
            for i in range(DECODED):
                start = time.perf_counter()
                out = model(rest[:, i : i + 1], past_key_values=cache, use_cache=True)
                decode.append(time.perf_counter() - start)
                made.append(out.logits[0, -1:])
            logits.append(torch.cat(made))
        return Timing(statistics.mean(prefill), statistics.median(decode)), logits
