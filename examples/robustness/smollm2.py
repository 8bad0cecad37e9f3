"""Does training under sparsity make a model robust to it? SmolLM2-135M with LoRA on long text.

    python examples/robustness/smollm2.py --out benchmarks/results/robustness_smollm2.json

As `retrieval.py`, on the bundled texts: adapters are trained on one part of them, and every model
reads the other, at rising lambda.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import peft
import torch
from common import Rows, Scores, experiment, parser
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_sparse_attention import set_sparse_attention
from hf_sparse_attention.calibration.data import token_samples

sys.path.insert(0, str(Path(__file__).parents[1]))
from demo_model import load as load_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def load() -> tuple[nn.Module, Any]:
    """The model with fresh adapters, in bfloat16 with adapters in float32, and its tokenizer."""
    base, tokenizer, _ = load_model(None, torch.bfloat16)
    set_sparse_attention(base, "blasst", threshold_scale_factor=0.0)
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    return peft.get_peft_model(base, lora), tokenizer


def train_rows(options: argparse.Namespace, samples: list[Tensor], seed: int) -> Rows:
    """The samples in an order of the seed's, over and over."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    shuffled = [samples[i] for i in order]
    taken = islice(cycle(shuffled), options.steps * options.batch)
    return [{"input_ids": ids, "labels": ids} for ids in taken]


def score(samples: list[Tensor], model: nn.Module) -> Scores:
    """Nats a token over the held-out samples."""
    nats = []
    for ids in samples:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        nats += [
            cross_entropy(part.float(), labels, reduction="none")
            for part, labels in zip(logits.split(512), ids[1:].split(512), strict=True)
        ]
    return {"cross_entropy": {"text": torch.cat(nats).mean().item()}}


def main() -> None:
    defaults = {"steps": 40, "batch": 1, "length": 2048, "samples": 12, "learning_rate": 5e-4}
    options = parser(__doc__.splitlines()[0], **defaults).parse_args()
    _, tokenizer = load()
    part = partial(token_samples, None, tokenizer, [options.length])
    training = list(part())
    held_out = list(part(samples=options.samples, part="validation"))
    print(f"{len(training)} training and {len(held_out)} held-out samples", flush=True)
    experiment(
        options,
        lambda: load()[0],
        partial(train_rows, options, training),
        partial(score, held_out),
    )


if __name__ == "__main__":
    main()
