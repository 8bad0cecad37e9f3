"""`torch.compile(fullgraph=True)`: no graph breaks, and no new graphs for lengths or thresholds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models
import torch
from comparisons import never_skipping
from tiny_models import build, padded, token_ids
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import hf_sparse_attention as hsa
from examples.demo_model import smollm2


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


def grown(model: Any, run: Any, cache: Any, tokens: int = 12) -> torch.Tensor:
    """The logits of single tokens behind a prompt, `model` reading the prompt, `run` the tokens."""
    ids = token_ids(2, 70 + tokens)
    model(ids[:, :70], past_key_values=cache)
    rows = [run(ids[:, i : i + 1], past_key_values=cache).logits for i in range(70, 70 + tokens)]
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize(("how", "most"), [("dynamic", 1), ("marked", 1), ("by itself", 2)])
def test_a_cache_that_grows_does_not_recompile(how: str, most: int) -> None:
    model = never_skipping(tiny_models.llama)
    compiled = torch.compile(
        model, fullgraph=True, dynamic=True if how == "dynamic" else None, backend="eager"
    )
    cache = DynamicCache(config=model.config)

    def run(*args: Any, **kwargs: Any) -> Any:
        if how == "marked" and cache.get_seq_length() == 70:
            for layer in cache.layers:
                torch._dynamo.mark_dynamic(layer.keys, 2)
                torch._dynamo.mark_dynamic(layer.values, 2)
        return compiled(*args, **kwargs)

    ours = grown(model, run, cache)
    eager = build(tiny_models.llama)
    assert torch.allclose(ours, grown(eager, eager, DynamicCache(config=model.config)), atol=1e-3)
    assert graphs() <= most


def test_windows_on_a_cache_that_grows_take_two_graphs() -> None:
    """A sliding layer counts in a Python int, and behaves otherwise once it is full."""
    model, eager = never_skipping(tiny_models.gemma3), build(tiny_models.gemma3)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    ours = grown(model, compiled, DynamicCache(config=model.config))
    assert torch.allclose(ours, grown(eager, eager, DynamicCache(config=model.config)), atol=1e-3)
    assert graphs() <= 2


@needs_kernel
def test_a_decoder_layer_by_itself_is_one_graph() -> None:
    model = skipping_keys()
    layer = model.model.layers[0]
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for length in (300, 260, 340):
        x = torch.randn(2, length, 64)
        tables = model.model.rotary_emb(x, torch.arange(length)[None])
        expected = layer(x, position_embeddings=tables)
        assert torch.equal(compiled(x, position_embeddings=tables), expected)
    assert graphs() == 1


@needs_kernel
def test_bsfa_is_one_graph_for_all_lengths() -> None:
    model = build(tiny_models.llama)
    config = hsa.calibrate(
        model,
        [token_ids(1, 400, seed=5)],
        method="bsfa",
        levels=[1],
        geometries="64x64",
        progress=False,
    )
    hsa.set_sparse_attention(model, config, min_length=0, backend="cpu")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for lengths in ([300, 281], [380, 380]):
        ids, mask = padded(lengths, "left")
        with hsa.collect_stats(model) as stats:
            expected = model(ids, attention_mask=mask).logits
        assert stats.sparsity("prefill") > 0
        assert torch.equal(compiled(ids, attention_mask=mask).logits, expected)
    assert graphs() == 1


def test_packed_sequences_are_right_compiled() -> None:
    """They run dense then: that they are packed is only known from the mask's values."""
    model = never_skipping(tiny_models.llama)
    packed = {
        "input_ids": token_ids(1, 90),
        "position_ids": torch.cat([torch.arange(40), torch.arange(50)])[None],
        "use_cache": False,
    }
    expected = build(tiny_models.llama)(**packed).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(**packed).logits, expected, atol=1e-3)


@needs_kernel
def test_without_mask_and_cache_a_compiled_model_is_dense() -> None:
    """transformers then takes the batch for a packed one; with a mask blocks are skipped."""
    model = skipping_keys()
    ids = token_ids(2, 190)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    dense = build(tiny_models.llama)(ids, use_cache=False).logits
    assert torch.allclose(compiled(ids, use_cache=False).logits, dense, atol=1e-3)
    ours = compiled(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    assert torch.allclose(ours, model(ids, use_cache=False).logits, atol=1e-3)
    assert not torch.allclose(ours, dense, atol=1e-1)


@pytest.mark.slow
@needs_kernel
def test_smollm2_is_one_graph_each_for_prompts_and_tokens() -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    hsa.set_sparse_attention(model, "blasst", threshold_scale_factor=20.0, backend="cpu")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (300, 420):
        ids = torch.randint(10, 40000, (1, length), generator=torch.Generator().manual_seed(0))
        cache = StaticCache(config=model.config, max_cache_len=512)
        expected = model(ids, past_key_values=cache).logits
        cache.reset()
        ours = compiled(ids, past_key_values=cache).logits
        assert torch.allclose(ours, expected, atol=1e-3 * expected.abs().max())
        for token in (5, 6, 7):
            new = torch.tensor([[token]])
            other = copy.deepcopy(cache)
            expected = model(new, past_key_values=other).logits
            ours = compiled(new, past_key_values=cache).logits
            assert torch.allclose(ours, expected, atol=1e-3 * expected.abs().max())
    assert graphs() <= 2
