"""The pieces of `optimize_for_cpu`: linear layers, the growing cache, cores."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear as plain_linear
from transformers.cache_utils import DynamicCache, DynamicLayer

from hf_sparse_attention.growing_cache import GrowingLayer
from hf_sparse_attention.optimization import machine
from hf_sparse_attention.optimization.cache import give_room
from hf_sparse_attention.optimization.linear import (
    FEW_ROWS,
    Int8Linear,
    PrepackedLinear,
    dequantized,
    dynamic_int8,
)

needs_bf16 = pytest.mark.skipif(machine.lacks_bf16() is not None, reason="a CPU without bfloat16")
needs_int8 = pytest.mark.skipif(machine.lacks_int8() is not None, reason="a CPU without int8")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)]


def layer(out: int, columns: int, bias: bool, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, out, bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 70), (1, 0)], ids=str)
def test_a_packed_layer_is_the_layer(
    shape: tuple[int, int], dtype: torch.dtype, bias: bool
) -> None:
    plain = layer(75, 33, bias, dtype)
    packed = PrepackedLinear(plain)
    x = torch.randn(*shape, 33).to(dtype)
    # Sums of 33 products in another order: each step rounds by at most half an ulp of the sum.
    bound = 33 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    size = plain_linear(x.abs(), plain.weight.abs()) + 1
    assert ((packed(x) - plain(x)).abs() <= bound * size).all()
    assert torch.equal(packed.weight, plain.weight)
    assert packed.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(copy.deepcopy(packed)(x), packed(x))


def errors_allowed(plain: nn.Linear, x: Tensor, many_rows: bool) -> Tensor:
    """By the roundings: of weights, of rows where they are rounded, and of bfloat16 results."""
    w, x = plain.weight.double(), x.double()
    weights = plain_linear(x.abs(), (w.abs().amax(1) / 127 / 2)[:, None].expand_as(w))
    own = x.abs().amax(-1, keepdim=True) / 127
    rows = own / 2 * (w.abs() + w.abs().amax(1, keepdim=True) / 127 / 2).sum(1)
    size = plain_linear(x.abs(), w.abs())
    return weights + many_rows * rows + 3 * torch.finfo(torch.bfloat16).eps * size


@needs_int8
@pytest.mark.parametrize("many_rows", [dequantized, dynamic_int8], ids=lambda f: f.__name__)
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 130])
def test_an_int8_layer_is_off_by_its_roundings(
    rows: int, many_rows: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> None:
    plain = layer(48, 192, False, torch.bfloat16)
    x = torch.randn(rows, 192).bfloat16()
    exact = plain_linear(x.double(), plain.weight.double())
    error = (Int8Linear(plain, many_rows)(x[None])[0].double() - exact).abs()
    rounded = many_rows is dynamic_int8 and rows > FEW_ROWS
    assert (error <= errors_allowed(plain, x, rounded)).all()
    assert (error > 0).any()


@needs_int8
@pytest.mark.parametrize("many_rows", [dequantized, dynamic_int8], ids=lambda f: f.__name__)
def test_int8_layers_take_zeros_and_a_bias(many_rows: Any) -> None:
    plain = layer(48, 64, True, torch.bfloat16)
    plain.weight[3] = 0
    made = Int8Linear(plain, many_rows)
    for rows in (2, 20):
        assert torch.equal(made(torch.zeros(rows, 64).bfloat16()), plain.bias.expand(rows, -1))


@pytest.mark.parametrize(
    ("out", "columns", "dtype", "fits"),
    [
        (48, 64, torch.bfloat16, True),
        (50, 64, torch.bfloat16, False),
        (48, 70, torch.bfloat16, False),
        (48, 64, torch.float32, False),
    ],
    ids=str,
)
def test_sizes_that_the_int8_kernel_cannot_take(
    out: int, columns: int, dtype: torch.dtype, fits: bool
) -> None:
    assert Int8Linear.is_fit(layer(out, columns, False, dtype)) is fits


def test_one_graph_serves_all_sizes() -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(dynamic_int8, dynamic=True, fullgraph=True, backend=counter)
    for rows, out, columns in ((40, 80, 192), (9, 48, 64), (64, 64, 64), (200, 64, 128)):
        x = torch.randn(rows, columns).bfloat16()
        weight = torch.randint(-127, 128, (out, columns), dtype=torch.int8)
        scale = torch.rand(out).bfloat16()
        with torch.no_grad():
            assert torch.equal(compiled(x, weight, scale), dynamic_int8(x, weight, scale))
    assert counter.frame_count == 1


def test_optimized_layers_stay_where_they_are() -> None:
    packed = PrepackedLinear(layer(16, 64, True))
    packed.to("cpu").float()
    with pytest.raises(RuntimeError, match="load the model anew"):
        packed.to(torch.float16)
    with pytest.raises(RuntimeError, match=r"meta.*load the model anew"):
        packed.to("meta")
    with pytest.raises(RuntimeError, match="not trainable"):
        packed(torch.randn(2, 64, requires_grad=True))


def states(length: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, length, 8), torch.randn(batch, 3, length, 8)


def test_room_is_given_to_empty_layers_only() -> None:
    empty, used = DynamicCache(), DynamicCache()
    used.update(*states(5), 0)
    for cache in (empty, used, None):
        give_room(cache)
    empty.update(*states(5), 0)
    assert type(empty.layers[0]) is GrowingLayer
    assert type(used.layers[0]) is DynamicLayer


@pytest.mark.parametrize(
    ("quota", "at_most"), [("150000 100000", 2), ("max 100000", None), ("", None)], ids=repr
)
def test_cores_are_those_that_we_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, at_most: int | None
) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(quota)
    monkeypatch.setattr(machine, "_CGROUP_QUOTA", file)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(6), raising=False)
    monkeypatch.setattr(machine, "_siblings", lambda cpu: str(cpu // 2))  # three cores
    assert machine.usable_cores() == (at_most or 3)
