"""Trains the small retrieval model: Qwen3's architecture, four layers, under a million parameters.

    python examples/retrieval/train.py --out examples/retrieval/checkpoint

Contexts grow from 64 to 1024 tokens; the first steps also copy strings, which is what makes a young
model look back at all. Matrices take Muon, everything else AdamW. About 20 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tasks import IGNORE, TASKS, VOCABULARY, accuracy, batch
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

#: (context length, steps, sequences a step, tasks)
CURRICULUM = (
    (64, 150, 64, ("copy",)),
    (64, 500, 64, tuple(TASKS)),
    (128, 250, 32, tuple(TASKS)),
    (256, 250, 16, tuple(TASKS)),
    (512, 250, 8, tuple(TASKS)),
    (1024, 400, 8, tuple(TASKS)),
)
STEPS = sum(stage[1] for stage in CURRICULUM)
MUON_RATE, ADAM_RATE = 2e-2, 2e-3


def make_model(seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def make_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=ADAM_RATE, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def rate(step: int) -> float:
    """Share of the full learning rate: up in 50 steps, down a cosine in the last third."""
    late = max(0.0, 3 * step / STEPS - 2)
    return min(1.0, (step + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * late)) / 2)


def train(model: Qwen3ForCausalLM, seed: int) -> None:
    rng = np.random.default_rng([seed, 1])
    optimizers = make_optimizers(model)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    done = 0
    progress = tqdm(total=STEPS, unit="step", mininterval=5)
    for length, steps, size, tasks in CURRICULUM:
        for _ in range(steps):
            samples = batch(rng, tasks, length, size)
            logits = model(input_ids=samples.input_ids, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), samples.labels[:, 1:].flatten(), ignore_index=IGNORE
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)
            done += 1
            progress.update()
            if done % 20 == 0:
                progress.set_postfix(length=length, loss=f"{loss.item():.3f}")
        scores = {task: round(accuracy(model, task, length, 8), 3) for task in TASKS}
        progress.write(f"{length} tokens, step {done}: {scores}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = make_model(options.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    start = time.process_time()
    train(model, options.seed)
    model.eval()
    report = {
        "seed": options.seed,
        "cpu_minutes": round((time.process_time() - start) / 60, 1),
        "accuracy": {
            str(n): {task: accuracy(model, task, n) for task in TASKS} for n in (256, 512, 1024)
        },
    }
    print(json.dumps(report, indent=2))
    model.to(torch.bfloat16).save_pretrained(options.out)
    (options.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
