"""How many heads would skip the block in which the needle lies, by depth and lambda.

    python -m benchmarks.needle_blocks [--lengths 2048] [--per-depth 3]

SmolLM2-135M-Instruct reads the samples of the stress test `needle_depths` densely. For the last
block row (the end of the question) and for the step that decodes the answer's first token, the gap
of the needle's block tells for every lambda whether it would be skipped.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from benchmarks.cpu_attention import machine
from benchmarks.table_format import HERE
from examples.demo_model import smollm2
from hf_sparse_attention.calibration.observation_reference import BlockRow, Blocks
from hf_sparse_attention.evaluation.samples import Sample
from hf_sparse_attention.evaluation.tasks.depths import needle_depth_samples, token_span
from hf_sparse_attention.types import BlockGeometry, Phase

OUTPUT = HERE / "results" / "needle_blocks.json"
GEOMETRY = BlockGeometry(64, 64)
LAMBDAS = (1e-3, 1e-2, 1e-1, 3e-1)


def needle_gaps(q: Tensor, k: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The gaps of key block `block`: in the last block row `[Hq]`, in decode `[Hkv]`.

    q `[1, Hq, L, D]`, k `[1, Hkv, L, D]`.
    """
    length, kv_heads = q.shape[2], k.shape[1]
    start = (length - 1) // GEOMETRY.block_q * GEOMETRY.block_q
    keys = k[0].repeat_interleave(q.shape[1] // kv_heads, 0).transpose(1, 2)
    scores = q[0, :, start:] * q.shape[-1] ** -0.5 @ keys
    hidden = torch.arange(length) > torch.arange(start, length)[:, None]
    scores = scores.masked_fill(hidden, -math.inf)
    newest = scores[:, -1].view(kv_heads, -1, length)  # the group's heads vote together
    return _gap("prefill", scores, start, block), _gap("decode", newest, length - 1, block)


def _gap(phase: Phase, scores: Tensor, position: int, block: int) -> Tensor:
    row = BlockRow(
        phase=phase,
        heads=slice(0, len(scores)),
        start=position,
        position=position,
        kv_len=scores.shape[-1],
        scores=scores,
        lse=scores.logsumexp(-1),
        first=0,
        full=False,
    )
    blocks = Blocks.of(row, GEOMETRY)
    return blocks.gaps()[:, blocks.order.index(block)]


class Reader:
    """The model, and the q and k of the last prompt that it read."""

    def __init__(self) -> None:
        AttentionInterface.register("record_qk", self._record)
        folder = smollm2()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="record_qk"
        )
        self.block, self.found = 0, []

    def _record(self, _module: nn.Module, q: Tensor, k: Tensor, v: Tensor, _mask: Any, **_: Any):
        self.found.append(needle_gaps(q, k, self.block))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    def read(self, sample: Sample) -> dict[str, Any]:
        """The share of the heads of all layers that would skip the needle's block."""
        needle = sample.prompt[: sample.prompt.index(sample.answers[0]) + len(sample.answers[0])]
        needle = needle[needle.rindex("One of the special") :]
        first, last = token_span(self.tokenizer, sample.prompt, needle)
        self.block, self.found = first // GEOMETRY.block_k, []
        ids = self.tokenizer(sample.prompt, return_tensors="pt").input_ids
        self.model(ids, use_cache=False, logits_to_keep=1)
        shares = {
            phase: [
                torch.cat([gap[i] for gap in self.found]).lt(math.log(lam)).double().mean().item()
                for lam in LAMBDAS
            ]
            for i, phase in enumerate(("question", "decode"))
        }
        return {
            "depth": sample.depth,
            "length": sample.length,
            "block": self.block,
            "in_one_block": first // GEOMETRY.block_k == last // GEOMETRY.block_k,
        } | shares


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--per-depth", type=int, default=3)
    args = parser.parse_args()
    reader, rows = Reader(), []
    with torch.inference_mode():
        for length in args.lengths:
            for sample in needle_depth_samples(
                reader.tokenizer, length, per_depth=args.per_depth, block=GEOMETRY.block_k
            ):
                rows.append(reader.read(sample))
                print(rows[-1], flush=True)
    result: dict[str, Any] = {
        "machine": machine(),
        "lambdas": LAMBDAS,
        "blocks": GEOMETRY.name,
        "rows": rows,
    }
    OUTPUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
