"""`optimize_for_cpu`: the model stays what it was, or the call refuses and nothing has happened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import build, padded, token_ids
from torch import nn

import hf_sparse_attention as hsa
from hf_sparse_attention.growing_cache import GrowingLayer
from hf_sparse_attention.optimization import Timing, linear, machine, steps, trial
from hf_sparse_attention.optimization.linear import Int8Linear, PrepackedLinear

LENGTH = 160
DATA = [token_ids(1, LENGTH + trial.DECODED, seed)[0] for seed in (3, 4)]

kernel_is_there = hsa.available_backends().get("cpu", "absent") is None
needs_kernel = pytest.mark.skipif(not kernel_is_there, reason="the kernel is not built")
needs_bf16 = pytest.mark.skipif(machine.lacks_bf16() is not None, reason="a CPU without bfloat16")
needs_int8 = pytest.mark.skipif(machine.lacks_int8() is not None, reason="a CPU without int8")


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def every_step_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of models this small are noise: here each run is faster than the one before."""
    run, runs = trial.Trial.run, iter(range(1, 100))

    def faster(self: Any, model: Any) -> Any:
        _, logits = run(self, model)
        return Timing(1 / (n := 2 ** next(runs)), 1 / n), logits

    monkeypatch.setattr(trial.Trial, "run", faster)
    monkeypatch.setattr(steps, "compiled_dynamic_int8", lambda: linear.dynamic_int8)


def optimized(model: Any, dtype: Any = "fp32", **changes: Any) -> hsa.optimization.CpuOptimization:
    options = {"data": DATA, "prompt_length": LENGTH, "progress": False, **changes}
    return hsa.optimize_for_cpu(model, dtype, **options)


def kept(result: hsa.optimization.CpuOptimization) -> list[str]:
    return [step.name for step in result.steps if step.kept]


def generated(model: Any, **options: Any) -> torch.Tensor:
    ids, mask = padded([300, 271], "left")
    return model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **options)


@pytest.mark.usefixtures("every_step_pays")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "qwen3"])
def test_generates_what_it_did(name: str) -> None:
    builder = tiny_models.DECODERS[name]
    model = build(builder, "sdpa")
    expected = generated(model), generated(model, num_beams=2)
    found = kept(optimized(model))
    assert {"growing cache", "prepacked weights"} <= set(found)
    assert "fused projections" in found or not kernel_is_there
    assert torch.equal(generated(model), expected[0])
    assert torch.equal(generated(model, num_beams=2), expected[1])


@needs_kernel
@pytest.mark.usefixtures("every_step_pays")
def test_attention_is_ours_as_the_model_has_it() -> None:
    plain = build(tiny_models.llama, "sdpa")
    assert "attention within a budget" in kept(optimized(plain, max_kl=1.0))
    assert plain.config._attn_implementation == "blasst"

    chosen = build(tiny_models.llama)
    hsa.set_sparse_attention(chosen, "blasst", threshold_scale_factor=0.5)
    assert not [name for name in kept(optimized(chosen)) if "attention" in name]

    calibrated = build(tiny_models.llama)
    calibrated.config.sparse_attention_config = chosen.config.sparse_attention_config
    result = optimized(calibrated, max_kl=1.0, max_perplexity_ratio=2.0)
    assert "attention as calibrated" in kept(result)
    config = hsa.set_sparse_attention(calibrated)
    assert config.threshold_scale_factor == hsa.set_sparse_attention(chosen).threshold_scale_factor


@needs_bf16
@pytest.mark.usefixtures("every_step_pays")
def test_bf16_converts_weights_and_not_rotary_frequencies() -> None:
    model = build(tiny_models.llama, "sdpa")
    result = optimized(model, torch.bfloat16, max_kl=1.0, max_perplexity_ratio=2.0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.dtype == model.config.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert 0 < result.difference.kl < 1.0
    assert generated(model).shape == (2, 308)


@needs_int8
@pytest.mark.usefixtures("every_step_pays")
def test_int8_takes_the_layers_that_fit() -> None:
    model = build(tiny_models.llama, "sdpa")
    result = optimized(model, "int8", max_kl=5.0, max_perplexity_ratio=5.0)
    assert {"int8 weights", "int8 products in prefill", "prepacked weights"} <= set(kept(result))
    assert isinstance(model.model.layers[0].mlp.gate_proj, Int8Linear)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear or not kernel_is_there
    assert isinstance(model.model.layers[0].mlp.down_proj, PrepackedLinear)  # 96 columns
    assert generated(model).shape == (2, 308)


def fingerprint(model: Any) -> dict[str, Any]:
    """All that a refused call must leave as it was."""
    with torch.no_grad():
        logits = model(token_ids(1, 30)).logits
    return {
        "logits": logits,
        "types": [type(module) for module in model.modules()],
        "dtypes": [p.dtype for p in model.parameters()],
        "identities": [id(p) for p in model.parameters()],
        "grads": [p.requires_grad for p in model.parameters()],
        "config": model.config.to_dict(),
        "config object": id(model.config),
        "attention": model.config._attn_implementation,
        "hooks": len(model._forward_pre_hooks),
        "own attributes": sorted(vars(model)),
        "threads": torch.get_num_threads(),
    }


@needs_int8
@pytest.mark.usefixtures("every_step_pays")
def test_a_broken_quantization_is_refused_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tiny_models.llama, "sdpa")
    before = fingerprint(model)
    make = Int8Linear.__init__

    def broken(self: Int8Linear, *args: Any) -> None:
        make(self, *args)
        self.scale *= 1.5

    monkeypatch.setattr(Int8Linear, "__init__", broken)
    with pytest.raises(ValueError, match=r"int8 weights: changes .* too much .*as it was"):
        optimized(model, "int8", threads=torch.get_num_threads() + 1, max_perplexity_ratio=1.2)
    after = fingerprint(model)
    assert torch.equal(after.pop("logits"), before.pop("logits"))
    assert after == before


@pytest.mark.usefixtures("every_step_pays")
@pytest.mark.parametrize("factor", [1.2, torch.nan], ids=["off", "nan"])
def test_a_step_that_nobody_asked_for_is_left_out_if_it_is_off(
    monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    def broken(model: nn.Module) -> str:
        for name, layer in linear.linear_layers(model).items():
            layer.weight.data = layer.weight.data * factor
            linear.put(model, name, PrepackedLinear(layer))
        return "broken"

    monkeypatch.setattr(steps, "pack_weights", broken)
    model = build(tiny_models.llama, "sdpa")
    expected = generated(model)
    (step,) = (s for s in optimized(model).steps if s.name == "prepacked weights")
    assert not step.kept
    assert "too far off" in step.reason
    assert torch.equal(generated(model), expected)


def test_a_step_that_does_not_pay_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trial.Trial.run
    monkeypatch.setattr(
        trial.Trial, "run", lambda self, model: (Timing(1.0, 1.0), run(self, model)[1])
    )
    model = build(tiny_models.llama, "sdpa")
    result = optimized(model)
    assert kept(result) == ["growing cache"]  # free
    assert "does not pay here (1.00x)" in result.table()
    assert model.config._attn_implementation == "sdpa"
    assert not any(isinstance(module, PrepackedLinear) for module in model.modules())


def test_an_interrupted_call_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: nn.Module) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "pack_weights", interrupted)
    model = build(tiny_models.llama, "sdpa")
    before = fingerprint(model)
    with pytest.raises(KeyboardInterrupt):
        optimized(model)
    after = fingerprint(model)
    assert torch.equal(after.pop("logits"), before.pop("logits"))
    assert after == before


def test_a_second_call_does_nothing_or_says_why_not() -> None:
    model = build(tiny_models.llama, "sdpa")
    result = optimized(model)
    assert optimized(model) is result
    assert optimized(model, "auto") is result
    with pytest.raises(ValueError, match=r"optimised .*fp32.*int8 load the model anew"):
        optimized(model, "int8")


def test_the_report_is_json_and_a_table() -> None:
    result = optimized(build(tiny_models.llama, "sdpa"))
    told = json.loads(json.dumps(result.to_dict()))
    assert told["steps"][0]["name"] == "threads"
    lines = result.table().splitlines()
    assert len(lines) == len(result.steps) + 6
    assert f"{LENGTH} tokens in, 128 out" in lines[-1]


def quantised() -> Any:
    model = build(tiny_models.llama)
    model.config.quantization_config = {"quant_method": "torchao"}
    return model


@pytest.mark.parametrize(
    ("make", "dtype", "options", "error", "message"),
    [
        (lambda: build(tiny_models.llama).train(), "auto", {}, ValueError, "got it in training"),
        (lambda: build(tiny_models.llama).to("meta"), "auto", {}, ValueError, "on the CPU.*meta"),
        (lambda: build(tiny_models.llama).double(), "auto", {}, ValueError, "got torch.float64"),
        (quantised, "int8", {}, ValueError, "a quantization of its own"),
        (lambda: build(tiny_models.llama), "int4", {}, ValueError, "expected one of auto, fp32"),
        (lambda: nn.Linear(2, 2), "auto", {}, TypeError, "expected a transformers model"),
        (lambda: build(tiny_models.bert), "auto", {}, ValueError, "causal language model"),
        (lambda: build(tiny_models.t5), "auto", {}, ValueError, "causal language model"),
        (lambda: build(tiny_models.llama), "auto", {"prompt_length": 8}, ValueError, "at least 64"),
        (lambda: build(tiny_models.llama), "auto", {"data": ["text"]}, TypeError, "a tokenizer"),
        (
            lambda: build(tiny_models.llama),
            "auto",
            {"data": [DATA[0] + 90]},
            ValueError,
            "another model's tokenizer",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_is_not_for_is_refused(
    make: Any, dtype: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        optimized(make(), dtype, **options)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_dtype_that_this_cpu_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(machine, "lacks_bf16", lambda: "no such instructions")
    with pytest.raises(ValueError, match="bfloat16: no such instructions"):
        optimized(build(tiny_models.llama), dtype)
    assert "bfloat16" not in kept(optimized(build(tiny_models.llama), "auto"))


@pytest.mark.usefixtures("every_step_pays")
def test_saving(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = build(tiny_models.llama, "sdpa")
    optimized(model)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    for name, tensor in build(tiny_models.llama).state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@needs_int8
@pytest.mark.usefixtures("every_step_pays")
def test_int8_weights_say_that_they_cannot_be_saved(tmp_path: Path) -> None:
    model = build(tiny_models.llama, "sdpa")
    optimized(model, "int8", max_kl=5.0, max_perplexity_ratio=5.0)
    with pytest.raises(RuntimeError, match="save the model before"):
        model.save_pretrained(tmp_path)


@pytest.mark.usefixtures("every_step_pays")
def test_the_cache_grows_in_place_under_generate() -> None:
    model = build(tiny_models.llama, "sdpa")
    optimized(model)
    out = model(token_ids(1, 80), use_cache=True)
    assert all(type(layer) is GrowingLayer for layer in out.past_key_values.layers)
    address = out.past_key_values.layers[0].keys.data_ptr()
    cache = model(token_ids(1, 1), past_key_values=out.past_key_values).past_key_values
    assert cache.layers[0].keys.data_ptr() == address
    assert cache.get_seq_length() == 81
    assert model(token_ids(1, 8), use_cache=False).past_key_values is None
