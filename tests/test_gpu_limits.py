"""How large inputs may be: what both kernels for GPUs refuse, and where 32 bits would not do.

Expanded tensors and untouched memory stand in for inputs that no machine of a test has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cuda_source
import pytest
import torch
import triton_source
from torch import Tensor

from hf_sparse_attention.backends import cuda, kernel, triton
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

# Where NumPy, which interprets, warns: infinities are how a row that sees nothing is spelt.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Forward = Callable[..., tuple[Tensor, ...]]
BACKENDS = {"cuda": cuda, "triton": triton}


@pytest.fixture(params=list(BACKENDS))
def forward(request: pytest.FixtureRequest) -> Forward:
    """The op of one of the two, emulated or interpreted, with a rule."""
    if request.param == "triton":
        op = triton_source.load().forward
    else:
        op = getattr(torch.ops, kernel.namespace_of(cuda_source.load())).forward
    rule = (torch.full((1, 1), -1.0), None, None)
    options = (0.125, True, 0, 0.0, 64, 64, 1, 1024, True, True, False)
    return lambda q, k, v: op(q, k, v, None, None, None, *rule, *options)


def expanded(*shape: int) -> Tensor:
    return torch.zeros((1, 1, 1, 8), dtype=torch.bfloat16).expand(*shape, 8)


TOO_LARGE = {
    "batch": ((65536, 1, 9), (65536, 1, 9)),
    "heads": ((1, 8192, 9), (1, 8192, 9)),
    "heads in decode": ((1, 8192, 1), (1, 8192, 9)),
    "keys": ((1, 1, 1), (1, 1, 2**31 - 1024)),
    "queries and keys": ((1, 1, 2**30), (1, 1, 2**30)),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_refused_with_what_was_expected(forward: Forward, name: str) -> None:
    q, k = (expanded(*shape) for shape in TOO_LARGE[name])
    message = "block_skip_attention .*: expected .* got"
    with pytest.raises((RuntimeError, ValueError), match=message):
        forward(q, k, k)


@pytest.mark.parametrize("name", ["batch", "heads"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backends_say_so_before(
    backend: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_SPARSE_ATTENTION_EMULATE", "1")
    q, k = (expanded(*shape) for shape in TOO_LARGE[name])
    call, rule = AttentionCall(q, k, k, scale=0.125), SkipRule.blasst(0.5)
    reason = BACKENDS[backend].supports(call, rule, BlockGeometry())
    assert reason == "launched are batches up to 65535, and up to 8191 heads"
    small = replace(call, q=q[:1, :1], k=k[:1, :1], v=k[:1, :1])
    assert BACKENDS[backend].supports(small, rule, BlockGeometry()) is None


FAR = 2**31 + 64


def far_from(x: Tensor, stride: str) -> Tensor:
    """A copy of `x` `[1, 2, L, D]` whose heads, or whose rows, lie beyond 2^31 elements."""
    length, size = x.shape[2:]
    steps = {"head": (FAR, size), "row": (size, FAR // (length - 1) // 8 * 8 + 8)}[stride]
    end = steps[0] + (length - 1) * steps[1] + size
    there = torch.empty(end, dtype=x.dtype).as_strided(x.shape, (0, *steps, 1))
    return there.copy_(x)


@pytest.mark.slow  # 4 GiB each, mostly never touched
@pytest.mark.parametrize("q_len", [70, 2], ids=["prefill", "decode"])
@pytest.mark.parametrize("stride", ["head", "row"])
def test_offsets_beyond_2_to_the_31(forward: Forward, stride: str, q_len: int) -> None:
    made: list[Any] = [torch.randn(1, 2, n, 32).bfloat16() for n in (q_len, 150, 150)]
    for i, x in enumerate(made):
        inputs = [*made]
        inputs[i] = far_from(x, stride)
        for found, expected in zip(forward(*inputs), forward(*made), strict=True):
            assert torch.equal(found, expected)
