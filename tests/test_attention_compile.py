"""`torch.compile(fullgraph=True)`: no graph breaks, and no new graphs for lengths or thresholds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models
import torch
from comparisons import never_skipping
from tiny_models import build, padded, token_ids
from torch._dynamo.utils import counters
from transformers import StaticCache

import hf_sparse_attention as hsa


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch.compiler.reset()


needs_kernel = pytest.mark.skipif(
    hsa.available_backends().get("cpu", "absent") is not None,
    reason="the reference cannot be compiled, and the CPU kernel is not built",
)


def skipping_keys() -> Any:
    """The model under the kernel's finest geometry: random scores leave no 64x64 block out."""
    model = build(tiny_models.llama)
    hsa.set_sparse_attention(model, hsa.SparseAttentionConfig(geometry="64x1"))
    hsa.set_sparse_attention(model, threshold_scale_factor=200.0, min_length=0, backend="cpu")
    return model


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("llama", "auto"),
        ("llama", "dense"),
        ("mistral", "auto"),
        pytest.param("gemma2", "auto", marks=pytest.mark.slow),
    ],
)
def test_one_graph_for_all_lengths_and_thresholds(name: str, backend: str) -> None:
    model = never_skipping(tiny_models.DECODERS[name], backend=backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for lengths in ([70, 41], [90, 90], [130, 97]):
        ids, mask = padded(lengths, "left")
        ours = compiled(ids, attention_mask=mask).logits
        assert torch.allclose(ours, model(ids, attention_mask=mask).logits, atol=1e-3)
    for factor in (0.5, 30.0):
        hsa.set_sparse_attention(model, threshold_scale_factor=factor)
        ours = compiled(ids, attention_mask=mask).logits
        assert torch.allclose(ours, model(ids, attention_mask=mask).logits, atol=1e-3)
    assert graphs() == 1


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_decoding_on_a_static_cache_is_one_graph(name: str) -> None:
    builder = tiny_models.DECODERS[name]
    model = never_skipping(builder)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = token_ids(2, 80)

    def decode(model: Any, run: Any) -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=128)
        model(ids[:, :70], past_key_values=cache)
        return torch.cat([run(ids[:, i : i + 1], past_key_values=cache)[0] for i in range(70, 76)])

    expected = decode(build(builder), build(builder))
    assert torch.allclose(decode(model, compiled), expected, atol=1e-3)
    first = graphs()
    # A sliding static layer counts in a Python int, so transformers compiles twice.
    assert first <= (2 if name == "mistral" else 1)
    hsa.set_sparse_attention(model, threshold_scale_factor=30.0)
    decode(model, compiled)
    assert graphs() == first


@needs_kernel
def test_skipping_is_the_same_compiled() -> None:
    model = skipping_keys()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, mask = padded([400, 361], "left")
    with hsa.collect_stats(model) as plain:
        expected = model(ids, attention_mask=mask).logits
    assert 0 < plain.sparsity("prefill") < 1
    assert torch.allclose(compiled(ids, attention_mask=mask).logits, expected, atol=1e-3)


def test_compiling_before_the_settings_are_known_says_what_to_do() -> None:
    model = build(tiny_models.llama, "blasst")
    with pytest.raises(Exception, match="set_sparse_attention"):
        torch.compile(model, fullgraph=True, backend="eager")(token_ids(1, 20))


@pytest.mark.slow
@needs_kernel
def test_inductor_agrees() -> None:
    model = skipping_keys()
    ids, mask = padded([400, 361], "left")
    expected = model(ids, attention_mask=mask).logits
    ours = torch.compile(model, fullgraph=True)(ids, attention_mask=mask).logits
    assert torch.allclose(ours[mask.bool()], expected[mask.bool()], atol=1e-2)


@pytest.mark.slow
def test_generate_compiles_on_a_static_cache() -> None:
    ids, mask = padded([70, 41], "left")
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 8}
    expected = build(tiny_models.llama).generate(ids, **options)
    model = never_skipping(tiny_models.llama)
    model.forward = torch.compile(model.forward, fullgraph=True)
    ours = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(ours, expected)
