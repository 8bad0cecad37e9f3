"""A whole model: time to first token and perplexity, transformers' sdpa against this package.

    python -m benchmarks.end_to_end [--length 8192] [--dtype float32 bfloat16] [--rounds 2]

SmolLM2-135M-Instruct reads the beginning of the bundled book. The contestants take turns, round by
round; what is reported is the median over the rounds of each round's ratio of wall times, and the
ratio of perplexities over the same tokens. That ratio also gates the comparison: a way of attention
whose perplexity is off by more than 10% is a defect, not a contestant.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.cpu_attention import machine
from examples.demo_model import smollm2
from hf_sparse_attention import SparseAttentionConfig, collect_stats, set_sparse_attention
from hf_sparse_attention.types import BlockGeometry

HERE = Path(__file__).parent
BOOK = HERE.parent / "calibration_data" / "alice_in_wonderland.txt"
#: lambda of each contestant, at the benchmark's length, and its geometry.
SETTINGS = {
    "no skipping": (0.0, "64x64"),
    "blasst 64x64, lambda 0.01": (0.01, "64x64"),
    "blasst 64x64, lambda 0.1": (0.1, "64x64"),
    "blasst 64x1, lambda 0.001": (0.001, "64x1"),
    "blasst 64x1, lambda 0.01": (0.01, "64x1"),
}


def use(model: PreTrainedModel, name: str, length: int) -> None:
    """Gives `model` the attention called `name`."""
    if name == "sdpa":
        model.set_attn_implementation("sdpa")
        return
    lam, geometry = SETTINGS[name]
    factor = {"a": lam * length, "b": 0.0}
    config = SparseAttentionConfig(
        method="blasst",
        geometry=BlockGeometry.from_name(geometry),
        threshold_scale_factor={"prefill": factor, "decode": factor},
        min_length=0,
    )
    set_sparse_attention(model, config)


class Stopwatch:
    """transformers' sdpa, timed: what share of a forward attention is."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = sdpa_attention_forward(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return result


def attention_share(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """The share of attention in the time to first token with sdpa."""
    watch = Stopwatch()
    AttentionInterface.register("timed_sdpa", watch)
    model.set_attn_implementation("timed_sdpa")
    _, seconds = read(model, ids)
    return watch.seconds / seconds


def read(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The prompt's last hidden states, and the seconds until its next token is known."""
    start = time.perf_counter()
    hidden = model.model(ids, use_cache=True).last_hidden_state
    model.lm_head(hidden[:, -1:]).argmax(-1)
    return hidden, time.perf_counter() - start


def perplexity(model: PreTrainedModel, hidden: torch.Tensor, ids: torch.Tensor) -> float:
    """Of the tokens after the first."""
    losses = [
        cross_entropy(model.lm_head(states).float(), labels, reduction="sum").item()
        for states, labels in zip(hidden[0, :-1].split(512), ids[0, 1:].split(512), strict=True)
    ]
    return math.exp(sum(losses) / (ids.shape[1] - 1))


def compare(dtype: torch.dtype, length: int, rounds: int) -> list[dict]:
    """Every contestant at one dtype. The first round is also the gate."""
    folder = smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    tokens = AutoTokenizer.from_pretrained(folder)(BOOK.read_text(), return_tensors="pt").input_ids
    ids = tokens[:, 1000 : 1000 + length]
    rows = {
        name: {"name": name, "dtype": str(dtype), "length": length, "seconds": []}
        for name in ("sdpa", *SETTINGS)
    }
    for i in range(rounds):
        for name, row in rows.items():
            use(model, name, length)
            with collect_stats(model, dropped_mass=False) as stats:
                hidden, seconds = read(model, ids)
            row["seconds"].append(seconds)
            if i > 0:
                continue
            row["sparsity"] = stats.sparsity("prefill")
            row["perplexity"] = perplexity(model, hidden, ids)
            row["perplexity_ratio"] = row["perplexity"] / rows["sdpa"]["perplexity"]
            assert abs(row["perplexity_ratio"] - 1) < 0.1, f"{name}: {row['perplexity']}"
    rows["sdpa"]["attention_share"] = attention_share(model, ids)
    for row in rows.values():
        each = [a / b for a, b in zip(rows["sdpa"]["seconds"], row["seconds"], strict=True)]
        row["speedup_over_sdpa"] = statistics.median(each)
        print(
            f"{row['dtype']} {row['name']:27s} {statistics.median(row['seconds']):6.2f} s"
            f"  {row['speedup_over_sdpa']:5.2f}x  sparsity {row['sparsity']:5.1%}"
            f"  perplexity ratio {row['perplexity_ratio']:.4f}",
            flush=True,
        )
    print(f"share of attention with sdpa: {rows['sdpa']['attention_share']:.1%}", flush=True)
    return list(rows.values())


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], help="rows of others are kept"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "end_to_end.json")
    args = parser.parse_args()
    threads = torch.get_num_threads()
    result: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    dtypes = [f"torch.{name}" for name in args.dtype]
    rows = [row for row in result.get("rows", []) if row["dtype"] not in dtypes]
    result |= {"machine": machine(), "threads": threads, "model": "SmolLM2-135M-Instruct"}
    torch.set_num_threads(threads)
    for name in args.dtype:
        rows += compare(getattr(torch, name), args.length, args.rounds)
    result["rows"] = rows
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {args.output}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
