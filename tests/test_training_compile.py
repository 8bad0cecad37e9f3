"""Training under `torch.compile(fullgraph=True)`: eager's gradients, in one graph each way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny_models
import torch
from comparisons import EAGER_IS_GOOD, never_skipping
from tiny_models import build, padded
from torch import Tensor
from torch._dynamo.utils import counters

import hf_sparse_attention as hsa

pytestmark = pytest.mark.usefixtures("cpu_kernel")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def skipping_keys(builder: Callable[[], Any]) -> Any:
    """The model under the kernel's finest geometry: random scores leave no 64x64 block out."""
    model = build(builder)
    hsa.set_sparse_attention(model, hsa.SparseAttentionConfig(geometry="64x1"))
    hsa.set_sparse_attention(model, threshold_scale_factor=100.0, min_length=0, backend="cpu")
    return model


def gradients(model: Any, run: Any, lengths: list[int]) -> dict[str, Tensor]:
    model.zero_grad()
    ids, mask = padded(lengths, "left")
    run(ids, attention_mask=mask, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(model: Any, compiled: Any, lengths: list[int]) -> None:
    """Up to what float32 rounding does to gradients (as in the comparisons with eager)."""
    expected = gradients(model, model, lengths)
    for name, found in gradients(model, compiled, lengths).items():
        scale = expected[name].abs().max()
        assert torch.allclose(found, expected[name], rtol=0, atol=EAGER_IS_GOOD * scale), name


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["never", "skipping", "windowed"])
def test_gradients_are_eagers(kind: str, backend: str) -> None:
    builder = tiny_models.mistral if kind == "windowed" else tiny_models.llama
    model = (never_skipping if kind == "never" else skipping_keys)(builder).train()
    if kind != "never":
        with hsa.collect_stats(model) as stats:
            gradients(model, model, [100, 81])
        assert stats.sparsity("prefill") > 0
    assert_same_gradients(model, torch.compile(model, fullgraph=True, backend=backend), [100, 81])
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_one_graph_for_all_lengths() -> None:
    model = skipping_keys(tiny_models.llama).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([100, 81], [140, 140]):
        assert_same_gradients(model, compiled, lengths)
    assert counters["stats"]["unique_graphs"] == 1
