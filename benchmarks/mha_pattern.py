"""The attention pattern of the oneDNN Graph Compiler's paper (arXiv 2301.01333), as BERT has it.

Bidirectional attention over short sequences with a padding mask, against the chain of primitives
that a framework runs without a compiler (matmul, scale and mask, softmax, matmul), that chain
compiled by Inductor, and SDPA. Run by `python -m benchmarks.attention_subgraph --parts pattern`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cpu_attention import GATE, SEED, measure, ratios
from hf_sparse_attention.functional import attend_dense
from hf_sparse_attention.types import AttentionCall

HEAD_SIZE = 64
#: Batch, length, heads.
SIZES = [(2, 128, 12), (32, 128, 12), (8, 256, 12), (2, 384, 16), (16, 384, 16), (32, 512, 12)]


def primitives(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The chain: `[B, H, N, D]` to `[B, N, H, D]`."""
    scores = q @ k.transpose(2, 3) * HEAD_SIZE**-0.5 + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous()


def cases(dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Every size at one dtype."""
    return [_case(dtype, *size, rounds) for size in SIZES]


def _case(dtype: torch.dtype, batch: int, length: int, heads: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(SEED)
    # As projections give them: each position's heads side by side.
    q, k, v = (
        torch.randn(batch, length, heads, HEAD_SIZE).to(dtype).transpose(1, 2) for _ in range(3)
    )
    lengths = torch.randint(length // 2, length + 1, (batch,))
    valid = torch.arange(length) < lengths[:, None]
    bias = torch.zeros(batch, 1, 1, length, dtype=dtype)
    bias = bias.masked_fill(~valid[:, None, None], torch.finfo(dtype).min)
    mask = valid[:, None, None, :].expand(-1, 1, length, -1)
    call = AttentionCall(q, k, v, scale=HEAD_SIZE**-0.5, causal=False, key_valid=valid)
    torch.compiler.reset()
    compiled = torch.compile(primitives, dynamic=False)
    contestants = {
        "primitives": lambda: primitives(q, k, v, bias),
        "inductor": lambda: compiled(q, k, v, bias),
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).contiguous(),
        "own": lambda: attend_dense(call).out,
    }
    case: dict[str, Any] = {
        "shape": f"B={batch} H={heads}",
        "length": length,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "errors": _gated(call, {name: run() for name, run in contestants.items()}),
    }
    case["seconds"] = measure(contestants, rounds, case["threads"])
    case["speedup_over"] = {
        name: ratios(case["seconds"], name) for name in ("primitives", "inductor", "sdpa")
    }
    shown = [f"{case['speedup_over'][x]['own']['median']:.2f} x {x}" for x in case["speedup_over"]]
    print(case["dtype"], case["shape"], length, "own:", ", ".join(shown), flush=True)
    return case


def _gated(call: AttentionCall, outputs: dict[str, Tensor]) -> dict[str, float]:
    """Each output's error against float64, in units of the dtype's own; as `cpu_attention.gate`.

    Raises:
        AssertionError: ours is further off than its `GATE`. The primitives round more often.
    """
    assert call.key_valid is not None
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    scores = (q @ k.transpose(2, 3) * call.scale).masked_fill(
        ~call.key_valid[:, None, None], -torch.inf
    )
    weights = scores.softmax(-1)
    exact, terms = (weights @ x for x in (v, v.abs()))
    finite = scores.masked_fill(~call.key_valid[:, None, None], 0.0)
    eps = torch.finfo(call.q.dtype).eps + torch.finfo(torch.float32).eps * finite.abs().max().item()
    unit = eps * terms.max().item()
    errors = {
        name: (out.transpose(1, 2).double() - exact).abs().max().item() / unit
        for name, out in outputs.items()
    }
    assert errors["own"] <= GATE, f"own: error {errors['own']:.1f} units, allowed {GATE}"
    return errors
