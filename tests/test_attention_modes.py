"""Training, checkpointing, autocast, dropout and attention weights."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from comparisons import assert_as_exact_as, never_skipping, skipping
from tiny_models import build, padded, token_ids
from torch import Tensor

import hf_sparse_attention as hsa

FAMILIES = ["llama", "mistral", "gemma2", "gpt_oss"]


def gradients(model: Any, **checkpointing: Any) -> Tensor:
    """Every parameter's gradient of a loss over a ragged batch, in one vector."""
    ids, mask = padded([50, 37], "left")
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1:] = labels[:, 1:].masked_fill(mask[:, :-1] == 0, -100)  # padding predicts nothing
    model(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_eagers(name: str) -> None:
    builder = tiny_models.DECODERS[name]
    eager, exact = gradients(build(builder)), gradients(build(builder, "exact").double())
    assert_as_exact_as(gradients(never_skipping(builder)), eager, exact)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    plain = gradients(skipping(tiny_models.llama))
    checkpointed = gradients(skipping(tiny_models.llama), use_reentrant=reentrant)
    assert torch.equal(checkpointed, plain)


def test_a_skipped_blocks_keys_get_no_gradient_but_training_goes_on() -> None:
    model = skipping(tiny_models.llama)
    with hsa.collect_stats(model) as stats:
        grads = gradients(model)
    assert grads.isfinite().all()
    assert 0 < stats.sparsity("prefill") < 1


def test_dropout_runs_dense_and_is_counted() -> None:
    model = never_skipping(tiny_models.llama)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    ids = token_ids(1, 40)
    with torch.no_grad(), hsa.collect_stats(model) as stats:
        assert torch.equal(model(ids).logits, model(ids).logits)
        assert not stats.dense()  # evaluation has no dropout
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
    assert list(stats.dense("prefill")) == [
        "attention dropout cannot be combined with block skipping"
    ]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_autocast_is_as_close_as_eager_is(name: str) -> None:
    builder = tiny_models.DECODERS[name]

    def run(model: Any) -> Tensor:
        ids, mask = padded([60, 45], "left")
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids, attention_mask=mask).logits
        return logits[mask.bool()].double()

    with torch.no_grad():
        exact = run_exactly(builder)
    eager, ours = run(build(builder)), run(never_skipping(builder))
    error = (eager - exact).abs().mean()
    assert error > 0
    assert (ours - exact).abs().mean() <= 1.5 * error


def run_exactly(builder: Any) -> Tensor:
    ids, mask = padded([60, 45], "left")
    return build(builder, "exact").double()(ids, attention_mask=mask).logits[mask.bool()]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "llava"])
def test_output_attentions_equal_eagers(name: str) -> None:
    builder = getattr(tiny_models, name)
    ids, mask = padded([50, 37], "left")
    rows = mask.bool()[:, None, :, None]
    model = never_skipping(builder)
    with torch.no_grad(), hsa.collect_stats(model) as stats:
        expected = build(builder)(ids, attention_mask=mask, output_attentions=True)
        ours = model(ids, attention_mask=mask, output_attentions=True)
    for a, b in zip(ours.attentions, expected.attentions, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a * rows, b * rows, atol=1e-5)
    assert "output_attentions" in next(iter(stats.dense("prefill")))


def test_output_attentions_of_a_packed_batch() -> None:
    ids, positions = token_ids(1, 40), torch.cat([torch.arange(25), torch.arange(15)])[None]
    arguments = {"position_ids": positions, "use_cache": False, "output_attentions": True}
    with torch.no_grad():
        expected = build(tiny_models.mistral)(ids, **arguments)
        ours = never_skipping(tiny_models.mistral)(ids, **arguments)
    for a, b in zip(ours.attentions, expected.attentions, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_generate_with_output_attentions() -> None:
    ids = token_ids(1, 20)
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_attentions": True}
    ours = never_skipping(tiny_models.llama).generate(ids, do_sample=False, **options)
    assert [step[0].shape[-1] for step in ours.attentions] == [20, 21, 22]
