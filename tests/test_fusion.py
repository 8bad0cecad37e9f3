"""`fuse_attention`: the model's own results, as exactly as itself, and nothing else touched."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from comparisons import assert_as_exact_as, never_skipping, two_precisions
from tiny_models import build, padded, token_ids
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention

import hf_sparse_attention as hsa
from hf_sparse_attention import fusion
from hf_sparse_attention.fusion import fuse_attention, unfuse_attention

pytestmark = pytest.mark.usefixtures("cpu_kernel")

FUSED = ["llama", "llama_mha", "llama_mqa", "qwen3", "mistral", "gemma2", "gemma3", "phimoe"]
LEFT_ALONE = {
    "gemma4": "rotates q and k otherwise",
    "gpt_oss": "rotates q and k otherwise",
    "llama4": "rotates q and k otherwise",
    "phi": "its forward is another one",
    "bart": "rotates q and k otherwise",
    "bert": "found none",
    "deepseek_v3": "found none",
}
BUILDERS = {**tiny_models.DECODERS, "bert": tiny_models.bert, "bart": tiny_models.bart}


@torch.no_grad()
def prefill(model: Any) -> Tensor:
    ids, mask = padded([70, 41], "left")
    return model(ids, attention_mask=mask).logits * mask[..., None]


@torch.no_grad()
def decode(model: Any, kind: Callable[[Any], Any] = lambda c: DynamicCache(config=c)) -> Tensor:
    cache, ids = kind(model.config), token_ids(2, 80)
    model(ids[:, :70], past_key_values=cache)
    steps = [ids[:, i : i + 1] for i in range(70, 78)]
    return torch.cat([model(x, past_key_values=cache).logits for x in steps], 1)


def decode_static(model: Any) -> Tensor:
    return decode(model, lambda config: StaticCache(config=config, max_cache_len=96))


def fused(builder: Callable[[], Any]) -> Any:
    model = never_skipping(builder)
    assert len(fuse_attention(model)) == 2
    return model


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that ran fused, one after the other."""
    seen: list[str] = []
    run = fusion._Fused.run

    def spy(self: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(module).__name__)
        return run(self, module, *args, **kwargs)

    monkeypatch.setattr(fusion._Fused, "run", spy)
    return seen


@pytest.mark.parametrize("run", [prefill, decode, decode_static], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", FUSED)
def test_as_exact_as_the_model_itself(name: str, run: Any, runs: list[str]) -> None:
    builder = BUILDERS[name]
    assert_as_exact_as(run(fused(builder)), *two_precisions(builder, run))
    assert runs


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_not_understood_is_left_alone(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build(BUILDERS[name])
    kinds = [type(module) for module in model.modules()]
    with caplog.at_level(logging.WARNING):
        assert fuse_attention(model) == []
    assert LEFT_ALONE[name] in caplog.text
    assert kinds == [type(module) for module in model.modules()]


def test_bfloat16_is_at_least_as_exact() -> None:
    """One rounding in place of three, and the norm's."""
    model = build(tiny_models.qwen3).bfloat16()
    x = torch.randn(2, 50, 64).bfloat16()
    tables = model.model.rotary_emb(x, torch.arange(50)[None])
    model.set_attn_implementation("blasst")
    hsa.set_sparse_attention(model, threshold_scale_factor=0)

    def keys_of(model: Any, x: Tensor, tables: Any) -> Tensor:
        cache = DynamicCache(config=model.config)
        attention = model.model.layers[0].self_attn
        attention(x, position_embeddings=tables, attention_mask=None, past_key_values=cache)
        return cache.layers[0].keys

    with torch.no_grad():
        own = keys_of(model, x, tables)
        exact = keys_of(copy.deepcopy(model).double(), x.double(), [t.double() for t in tables])
        fuse_attention(model)
        ours = keys_of(model, x, tables)
    off = [(keys.double() - exact).pow(2).mean().sqrt() for keys in (ours, own)]
    assert off[0] < off[1]


def test_undone_nothing_is_left() -> None:
    model = never_skipping(tiny_models.llama)
    kinds = [type(module) for module in model.modules()]
    names, expected = list(model.state_dict()), prefill(model)
    fuse_attention(model)
    assert list(model.state_dict()) == names
    assert isinstance(model.model.layers[0].self_attn, LlamaAttention)
    unfuse_attention(model)
    assert kinds == [type(module) for module in model.modules()]
    assert not any(hasattr(module, fusion._ATTRIBUTE) for module in model.modules())
    assert torch.equal(prefill(model), expected)


def test_saved_and_loaded_it_is_the_model(tmp_path: Any) -> None:
    model = fused(tiny_models.llama)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for name, weight in build(tiny_models.llama).state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)


def test_a_copy_has_weights_of_its_own() -> None:
    model = fused(tiny_models.llama)
    expected = prefill(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    assert torch.equal(prefill(other), expected)
    assert not torch.equal(prefill(model), expected)


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(2)


def new_parameter(model: Any) -> None:
    linear = model.model.layers[1].self_attn.o_proj
    linear.weight = nn.Parameter(linear.weight.detach() * 2)


def loaded(model: Any) -> None:
    model.load_state_dict({name: x * 1.5 for name, x in model.state_dict().items()})


def merged_adapter(model: Any) -> None:
    """As peft does it: the layer is wrapped, its weight changed behind torch's back, unwrapped."""
    attention = model.model.layers[1].self_attn
    linear = attention.v_proj
    attention.v_proj = nn.Sequential(linear)
    linear.weight.data += 0.5
    attention.v_proj = linear


def norm_weight(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].self_attn.q_norm.weight.mul_(3)


@pytest.mark.parametrize(
    "change",
    [in_place, new_parameter, loaded, merged_adapter, norm_weight],
    ids=lambda f: f.__name__,
)
def test_changed_weights_are_noticed(change: Callable[[Any], None]) -> None:
    model = fused(tiny_models.qwen3)
    before = prefill(model)
    change(model)
    ours = prefill(model)
    unfuse_attention(model)
    expected = prefill(model)
    assert torch.allclose(ours, expected, atol=1e-3)
    assert not torch.allclose(before, expected, atol=1e-1)


def adapter(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.v_proj = nn.Sequential(layer.self_attn.v_proj)


def hook(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda *_: None)


def training(model: Any) -> None:
    model.train()


def eager(model: Any) -> None:
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("change", [adapter, hook, training, eager], ids=lambda f: f.__name__)
def test_what_is_not_plain_inference_runs_as_before(
    change: Callable[[Any], None], runs: list[str]
) -> None:
    model = fused(tiny_models.llama)
    change(model)
    prefill(model)
    assert runs == []


def test_gradients_and_autocast_run_as_before(runs: list[str]) -> None:
    model = fused(tiny_models.llama)
    ids = token_ids(1, 20)
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids)
    assert runs == []


def test_compiled_it_is_the_models_own_graph(runs: list[str]) -> None:
    model = fused(tiny_models.llama)
    expected = prefill(model)
    assert runs
    runs.clear()
    torch.compiler.reset()
    with torch.no_grad():
        ids, mask = padded([70, 41], "left")
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        ours = compiled(ids, attention_mask=mask).logits * mask[..., None]
    assert runs == []
    assert torch.allclose(ours, expected, atol=1e-3)


def test_settings_and_stats_go_on_as_before() -> None:
    """Targets are named by class, and skipping is counted by module."""
    model = build(tiny_models.llama)
    blocks = hsa.SparseAttentionConfig(geometry="64x1", targets=["LlamaAttention"])
    hsa.set_sparse_attention(model, blocks)
    hsa.set_sparse_attention(model, threshold_scale_factor=100.0, min_length=0, backend="cpu")
    shares = []
    for _ in range(2):
        with hsa.collect_stats(model) as stats:
            prefill(model)
        shares.append(stats.sparsity("prefill"))
        fuse_attention(model)
        hsa.set_sparse_attention(model, threshold_scale_factor=100.0)
    assert 0 < shares[0] == pytest.approx(shares[1], abs=0.02)
