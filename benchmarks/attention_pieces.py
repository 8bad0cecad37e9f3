"""What surrounds attention in a layer, piece by piece: which fusions pay, and which would not.

Each piece as transformers runs it in eager mode, and as it could be run. Run by
`python -m benchmarks.attention_subgraph --parts pieces`; the results are checked against each other
before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.cpu_attention import SEED, measure
from hf_sparse_attention.backends import cpu
from hf_sparse_attention.int8_keys import Int8Keys
from hf_sparse_attention.packed_linear import PackedLinear

HEAD_SIZE, KEYS = 64, 8192
Ways = dict[str, Callable[[], Any]]


def case(
    shape: str, sizes: dict[str, int], dtype: torch.dtype, tokens: int, rounds: int
) -> dict[str, Any]:
    """All pieces for `tokens` new tokens behind `KEYS` of them; `sizes` as in a Llama's config."""
    torch.manual_seed(SEED)
    made = {
        "projections": _projections(sizes, dtype, tokens),
        "rotary": _rotary(sizes, dtype, tokens),
        "cache": _cache(sizes, dtype, tokens),
    }
    # A token's pieces take microseconds: many at a time, so that the clock does not count.
    repeat = 200 if tokens == 1 else 1
    pieces = {}
    for piece, ways in made.items():
        loops = {name: partial(_repeat, run, repeat) for name, run in ways.items()}
        times = measure(loops, rounds, torch.get_num_threads())
        pieces[piece] = {name: [t / repeat for t in each] for name, each in times.items()}
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "length": tokens,
        "threads": torch.get_num_threads(),
        "keys": KEYS,
        "seconds": pieces,
    }


def _repeat(run: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        run()  # its result is freed at once, as in a model


def _projections(sizes: dict[str, int], dtype: torch.dtype, tokens: int) -> Ways:
    hidden = sizes["hidden_size"]
    counts = [sizes["num_attention_heads"], *[sizes["num_key_value_heads"]] * 2]
    layers = [nn.Linear(hidden, n * HEAD_SIZE, bias=False).to(dtype) for n in counts]
    joined = torch.cat([layer.weight for layer in layers]).detach()
    packed, x = PackedLinear(layers), torch.randn(1, tokens, hidden).to(dtype)
    ways: Ways = {
        "q, k, v one by one": lambda: torch.cat([layer(x) for layer in layers], -1),
        "one product": lambda: linear(x, joined),
        "one product, prepacked": lambda: packed(x),
    }
    _assert_close(ways, dtype, hidden)
    return ways | {"q, k, v one by one": lambda: [layer(x) for layer in layers]}


def _rotary(sizes: dict[str, int], dtype: torch.dtype, tokens: int) -> Ways:
    counts = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    heads = torch.randn(1, tokens, sum(counts), HEAD_SIZE).to(dtype).transpose(1, 2)
    angle = torch.randn(1, tokens, HEAD_SIZE)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def eager() -> tuple[Tensor, Tensor]:
        q, k = heads.split(counts, dim=1)
        return apply_rotary_pos_emb(q, k, cos, sin)

    def once() -> Tensor:
        fresh = heads.clone()
        cpu.rotate_(fresh, cos, sin, None, 0.0)
        return fresh

    _assert_close({"eager": lambda: torch.cat(eager(), 1), "one pass": once}, dtype, 2)
    spare = heads.clone()
    return {
        "eager": eager,
        "one pass in place": lambda: cpu.rotate_(spare, cos, sin, None, 0.0),
        "a copy, for comparison": heads.clone,
    }


def _cache(sizes: dict[str, int], dtype: torch.dtype, tokens: int) -> Ways:
    heads = sizes["num_key_value_heads"]
    room = torch.randn(2, 1, heads, KEYS + tokens, HEAD_SIZE).to(dtype)
    held = room[:, :, :, :KEYS].clone()  # K and V
    new = torch.randn(2, 1, heads, tokens, HEAD_SIZE).to(dtype)
    place = torch.arange(KEYS, KEYS + tokens)
    copy, start = Int8Keys.of(room[0]), torch.tensor(KEYS)
    return {
        "joined anew (dynamic)": lambda: [torch.cat([held[i], new[i]], 2) for i in (0, 1)],
        "written in place (growing)": lambda: [
            room[i, :, :, KEYS : KEYS + tokens].copy_(new[i]) for i in (0, 1)
        ],
        "index_copy (static)": lambda: [room[i].index_copy_(2, place, new[i]) for i in (0, 1)],
        "int8 copy of K besides": lambda: copy.append(new[0], start),
    }


def _assert_close(ways: Ways, dtype: torch.dtype, terms: int) -> None:
    """That all ways give the same up to rounding, where each value is a sum of `terms` products.

    Each rounds its result and what it is made of a few times; float32 sums drift apart as the root
    of the number of terms.

    Raises:
        AssertionError: they don't.
    """
    first, *others = [run() for run in ways.values()]
    eps = max(4 * torch.finfo(dtype).eps, terms**0.5 * torch.finfo(torch.float32).eps)
    for other in others:
        off = (other.double() - first.double()).abs().max().item()
        assert off <= eps * first.abs().max().item(), f"off by {off:.2e}"
