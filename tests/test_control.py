"""Changing a live model, what is kept, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
from tiny_models import build, token_ids

import hf_sparse_attention as hsa
from hf_sparse_attention import attention
from hf_sparse_attention import settings as settings_module
from hf_sparse_attention.methods.blasst import DEFAULT_MAX_DROPPED_MASS
from hf_sparse_attention.types import BlockGeometry

CALIBRATED = {"prefill": {"a": 2.0, "b": 3.0}, "decode": {"a": 0.5, "b": 4.0}}


def implementations(model: Any) -> str:
    return str(model.config._attn_implementation)


def calibrated() -> hsa.SparseAttentionConfig:
    return hsa.SparseAttentionConfig(
        threshold_scale_factor=CALIBRATED,
        target_sparsity=0.5,
        min_length=0,
        geometry=BlockGeometry(8, 8),
    )


def spy(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each attention ran with."""
    calls: list[dict[str, Any]] = []
    run = attention.attend

    def watch(call: Any, rule: Any, geometry: Any, backend: str = "auto", **more: Any) -> Any:
        calls.append({"rule": rule, "geometry": geometry, "backend": backend})
        return run(call, rule, geometry, backend, **more)

    monkeypatch.setattr(attention, "attend", watch)
    return calls


@torch.no_grad()
def forward(model: Any, length: int = 40) -> torch.Tensor:
    return model(token_ids(1, length)).logits


def test_from_sdpa_to_blasst_and_back() -> None:
    model = build(tiny_models.llama, "sdpa")
    expected = forward(model)
    hsa.set_sparse_attention(model, "blasst", threshold_scale_factor=0, min_length=0)
    assert implementations(model) == "blasst"
    assert torch.allclose(forward(model), expected, atol=1e-3)
    model.set_attn_implementation("sdpa")
    assert torch.equal(forward(model), expected)


def test_no_method_means_blasst_at_first() -> None:
    model = build(tiny_models.llama, "sdpa")
    assert hsa.set_sparse_attention(model, max_dropped_mass=0.05).method == "blasst"


def test_what_is_not_mentioned_stays() -> None:
    model = build(tiny_models.llama)
    hsa.set_sparse_attention(model, calibrated())
    hsa.set_sparse_attention(model, target_sparsity={"prefill": 0.7})
    hsa.set_sparse_attention(model, max_dropped_mass={"decode": 0.02}, backend="reference")
    config = hsa.set_sparse_attention(model, min_length=9)
    assert config.target_sparsity == {"prefill": 0.7, "decode": 0.5}
    assert config.max_dropped_mass == {"decode": 0.02}
    assert config.threshold_scale_factor == CALIBRATED
    assert (config.backend, config.min_length) == ("reference", 9)
    assert config.geometry == BlockGeometry(8, 8)


def test_numbers_reach_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spy(monkeypatch)
    model = build(tiny_models.llama)
    hsa.set_sparse_attention(
        model, "blasst", threshold_scale_factor=4.0, max_dropped_mass=0.25, min_length=0
    )
    forward(model, 40)
    hsa.set_sparse_attention(model, threshold_scale_factor=2.0)
    forward(model, 40)
    lambdas = [float(call["rule"].log_lambda.exp()) for call in calls]
    assert lambdas == pytest.approx([0.1, 0.1, 0.05, 0.05])
    assert all(float(call["rule"].max_dropped_mass) == 0.25 for call in calls)


def test_a_factor_of_zero_never_skips() -> None:
    model = build(tiny_models.llama)
    hsa.set_sparse_attention(model, "blasst", threshold_scale_factor=0, min_length=0)
    with hsa.collect_stats(model) as stats:
        forward(model, 200)
    assert stats.sparsity("prefill") == 0


def test_models_from_one_config_object_do_not_share_settings() -> None:
    config = tiny_models.llama().config
    config._attn_implementation = "eager"
    first, second = hf.LlamaForCausalLM(config), hf.LlamaForCausalLM(config)
    hsa.set_sparse_attention(first, "blasst", max_dropped_mass=0.2)
    assert implementations(first) == "blasst"
    assert implementations(second) == "eager"
    assert not hasattr(second.config, "sparse_attention_config")
    assert first.model.layers[0].self_attn.config is first.config
    hsa.set_sparse_attention(second, "blasst", max_dropped_mass=0.4)
    assert hsa.set_sparse_attention(first).max_dropped_mass == {"prefill": 0.2, "decode": 0.2}


def test_a_copied_model_keeps_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tiny_models.llama)
    hsa.set_sparse_attention(model, "blasst", threshold_scale_factor=4.0, min_length=0)
    twin = copy.deepcopy(model)
    hsa.set_sparse_attention(model, threshold_scale_factor=8.0)
    calls = spy(monkeypatch)
    forward(twin, 40)
    assert float(calls[0]["rule"].log_lambda.exp()) == pytest.approx(0.1)


def test_saved_and_loaded_by_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tiny_models.llama)
    hsa.set_sparse_attention(model, calibrated(), target_sparsity=0.25)
    model.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())["sparse_attention_config"]
    assert kept["config_groups"]["group_0"]["algorithm"] == "skip_softmax"
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="blasst").eval()
    calls = spy(monkeypatch)
    assert torch.allclose(forward(loaded), forward(model), atol=1e-5)
    assert calls[0]["geometry"] == BlockGeometry(8, 8)
    assert calls[0]["rule"].log_lambda == calls[-1]["rule"].log_lambda


def test_a_vision_language_model_is_saved_where_its_layers_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tiny_models.llava)
    hsa.set_sparse_attention(model, calibrated())
    model.save_pretrained(tmp_path)
    loaded = hf.LlavaForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation={"text_config": "blasst"}
    ).eval()
    calls = spy(monkeypatch)
    forward(loaded)
    assert calls[0]["geometry"] == BlockGeometry(8, 8)


def test_uncalibrated_models_run_the_budget_and_say_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(settings_module, "_said", set())
    calls = spy(monkeypatch)
    model = build(tiny_models.llama, "blasst")
    forward(model, 600)
    forward(build(tiny_models.llama, "blasst"), 600)
    assert calls[0]["rule"].log_lambda is None
    assert float(calls[0]["rule"].max_dropped_mass) == pytest.approx(DEFAULT_MAX_DROPPED_MASS)
    said = [r.message for r in caplog.records if "not calibrated" in r.message]
    assert len(said) == 1
    assert "calibrate" in said[0]


def test_short_requests_run_dense_and_are_counted() -> None:
    model = build(tiny_models.llama, "blasst")
    with hsa.collect_stats(model) as stats:
        forward(model, settings_module.DEFAULT_MIN_LENGTH - 1)
        forward(model, settings_module.DEFAULT_MIN_LENGTH)
    reason = f"fewer keys than min_length {settings_module.DEFAULT_MIN_LENGTH}"
    assert stats.dense("prefill") == {reason: 2}
    assert stats.counts("prefill")


@pytest.mark.parametrize("loaded", [True, False], ids=["by_name", "by_number"])
def test_ignored_layers_stay_dense(loaded: bool) -> None:
    config = hsa.SparseAttentionConfig(
        threshold_scale_factor=1.0, min_length=0, ignore=["model.layers.0.self_attn"]
    )
    model = build(tiny_models.llama)
    if loaded:
        hsa.set_sparse_attention(model, config)
    else:  # as a checkpoint would be: the layers do not know their names
        model.config.sparse_attention_config = config.to_dict()
        model.set_attn_implementation("blasst")
    with hsa.collect_stats(model) as stats:
        forward(model)
    assert stats.dense("prefill", layer=0) == {"the layer is on the config's ignore list": 1}
    assert list(stats.counts("prefill")) == [1]


def test_other_classes_than_the_targets_stay_dense() -> None:
    config = hsa.SparseAttentionConfig(min_length=0, targets=["MistralAttention"])
    model = build(tiny_models.llama)
    hsa.set_sparse_attention(model, config)
    with hsa.collect_stats(model) as stats:
        forward(model)
    assert stats.dense("prefill") == {"LlamaAttention is not among the targets MistralAttention": 2}


def test_bsfa_calibrated_and_run(tmp_path: Path) -> None:
    model = build(tiny_models.llama)
    small = BlockGeometry(8, 8, split_k=32)
    config = hsa.calibrate(
        model, [token_ids(1, 96)], method="bsfa", levels=[1, 3], geometries=small, progress=False
    )
    hsa.set_sparse_attention(model, config, level=1, min_length=0)
    assert implementations(model) == "bsfa"
    with hsa.collect_stats(model) as stats:
        few = forward(model, 96)
    assert 0.1 < stats.sparsity("prefill") < 0.9
    hsa.set_sparse_attention(model, level=3)
    with hsa.collect_stats(model) as more:
        forward(model, 96)
    assert more.sparsity("prefill") < stats.sparsity("prefill")

    config.save_pretrained(tmp_path)
    other = build(tiny_models.llama)
    hsa.load_thresholds(other, tmp_path)
    hsa.set_sparse_attention(other, level=1, min_length=0)
    assert torch.equal(forward(other, 96), few)
    with pytest.raises(ValueError, match="kv_heads: expected 1, got 2"):
        hsa.load_thresholds(build(tiny_models.llama_mqa), tmp_path)


def test_bsfa_without_thresholds_says_how_to_calibrate() -> None:
    model = build(tiny_models.llama)
    with pytest.raises(ValueError, match="calibrate"):
        hsa.set_sparse_attention(model, "bsfa")
    assert implementations(model) == "eager"
    model.set_attn_implementation("bsfa")
    with pytest.raises(ValueError, match="calibrate"):
        forward(model)


def test_switching_by_name_and_back_keeps_the_thresholds() -> None:
    model = build(tiny_models.llama)
    small = BlockGeometry(8, 8, split_k=32)
    sample = token_ids(1, 96)
    config = hsa.calibrate(
        model, [sample], method="bsfa", levels=[1], geometries=small, progress=False
    )
    hsa.set_sparse_attention(model, config, min_length=0)
    before = forward(model, 96)
    model.set_attn_implementation("blasst")
    with hsa.collect_stats(model) as stats:
        forward(model, 96)
    assert stats.dropped_mass("prefill") is not None
    assert not stats.dense()  # min_length came along
    model.set_attn_implementation("bsfa")
    assert torch.equal(forward(model, 96), before)


def test_the_named_function_runs_whatever_the_settings_say() -> None:
    """Two names, one model: the implementation that transformers calls is the one that runs."""
    model = build(tiny_models.llama)
    hsa.set_sparse_attention(model, "blasst", min_length=0)
    model.set_attn_implementation("bsfa")
    with pytest.raises(ValueError, match="bsfa"):
        forward(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "blast"}, "method: expected one of 'blasst', 'bsfa' or a config, got 'blast'"),
        ({"target_sparsity": 0.5}, "target_sparsity: expected a fit"),
        ({"target_sparsity": 1.5}, "target_sparsity"),
        ({"threshold_scale_factor": -1.0}, r"threshold_scale_factor.*got -1.0"),
        ({"threshold_scale_factor": {"prefil": 1.0}}, "prefil"),
        ({"max_dropped_mass": float("nan")}, "max_dropped_mass.*got nan"),
        ({"level": 3}, "level: expected with method 'bsfa' only"),
        ({"min_length": -1}, "min_length"),
        ({"backend": "cuda-9"}, "backend: expected one of auto, .*got 'cuda-9'"),
    ],
)
def test_bad_settings_are_named_and_change_nothing(arguments: dict[str, Any], message: str) -> None:
    model = build(tiny_models.llama)
    with pytest.raises(ValueError, match=message):
        hsa.set_sparse_attention(model, **arguments)
    assert implementations(model) == "eager"
    assert not hasattr(model.config, "sparse_attention_config")


def test_something_else_than_a_model_is_named() -> None:
    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        hsa.set_sparse_attention(torch.nn.Linear(2, 2))


def test_a_wrapped_model_is_found() -> None:
    model = build(tiny_models.llama)
    hsa.set_sparse_attention(torch.nn.DataParallel(model), "blasst", max_dropped_mass=0.1)
    assert implementations(model) == "blasst"


def test_a_peft_model_is_found() -> None:
    import peft

    model = peft.get_peft_model(build(tiny_models.llama), peft.LoraConfig(task_type="CAUSAL_LM"))
    hsa.set_sparse_attention(model, "blasst", threshold_scale_factor=0, min_length=0)
    with hsa.collect_stats(model) as stats:
        forward(model)
    assert stats.counts("prefill")


FOREIGN: dict[str, tuple[type, dict[str, Any]]] = {
    "bloom": (hf.BloomConfig, {"hidden_size": 32, "n_layer": 1, "n_head": 2}),
    "falcon": (hf.FalconConfig, {"hidden_size": 32, "num_attention_heads": 2}),
    "mpt": (hf.MptConfig, {"d_model": 32, "n_layers": 1, "n_heads": 2}),
    "gptj": (hf.GPTJConfig, {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8}),
    "codegen": (hf.CodeGenConfig, {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8}),
}


def foreign(name: str) -> Any:
    config_class, sizes = FOREIGN[name]
    config = config_class(vocab_size=97, **sizes)
    return hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("name", FOREIGN)
def test_models_outside_the_interface_are_named(name: str) -> None:
    model = foreign(name)
    with pytest.raises(ValueError, match=rf"{type(model).__name__} does not go through"):
        hsa.set_sparse_attention(model, "blasst")
    model.config._attn_implementation_internal = "blasst"  # what from_pretrained would do
    with pytest.raises(ValueError, match="does not go through"):
        forward(model)


def test_a_config_key_that_the_model_consumes_itself_is_left_alone() -> None:
    model = build(tiny_models.llama)
    model.config.sparse_attention_config = {"sparse_topk_blocks": 8}
    with pytest.raises(ValueError, match="sparse attention of its own"):
        hsa.set_sparse_attention(model, "blasst")
    assert model.config.sparse_attention_config == {"sparse_topk_blocks": 8}
