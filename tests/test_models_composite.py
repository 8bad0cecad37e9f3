"""Models that are more than a text decoder: images, encoder-decoders, bidirectional decoders."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
from comparisons import assert_as_exact_as, never_skipping, two_precisions
from tiny_models import padded, token_ids
from torch import Tensor

import hf_sparse_attention as hsa

IMAGE_TOKEN, PATCHES = 96, 16


def with_image(model: Any) -> Tensor:
    ids, mask = padded([70, 55], "left")
    ids[:, 30 : 30 + PATCHES] = IMAGE_TOKEN
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    pixels = pixels.to(next(model.parameters()).dtype)
    return model(ids, attention_mask=mask, pixel_values=pixels).logits[mask.bool()]


@pytest.mark.parametrize("tower", ["tower_stays", "tower_too"])
def test_vision_language_model_equals_eager(tower: str) -> None:
    eager, exact = two_precisions(tiny_models.llava, with_image)
    model = never_skipping(tiny_models.llava)
    assert model.config.vision_config._attn_implementation == "eager"
    if tower == "tower_too":  # what a plain string does
        model.set_attn_implementation("blasst")
        assert model.config.vision_config._attn_implementation == "blasst"
    with torch.no_grad(), hsa.collect_stats(model) as stats:
        assert_as_exact_as(with_image(model), eager, exact)
    assert stats.layers == ([0, 1] if tower == "tower_stays" else [-2, 0, 1])
    assert not stats.dense("prefill")


def gemma3_with_image() -> Any:
    """Image tokens see each other both ways, on top of causal and sliding masks."""
    vision = hf.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    text = tiny_models.gemma3().config
    config = hf.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=PATCHES,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=94,
        eoi_token_index=95,
        initializer_range=0.3,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def with_image_and_types(model: Any) -> Tensor:
    ids = token_ids(1, 60)
    ids[:, 20 : 20 + PATCHES] = IMAGE_TOKEN
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    pixels = pixels.to(next(model.parameters()).dtype)
    types = (ids == IMAGE_TOKEN).long()
    return model(ids, pixel_values=pixels, token_type_ids=types).logits


def test_bidirectional_image_tokens_run_dense_and_right() -> None:
    eager, exact = two_precisions(gemma3_with_image, with_image_and_types)
    model = never_skipping(gemma3_with_image)
    with torch.no_grad(), hsa.collect_stats(model) as stats:
        assert_as_exact_as(with_image_and_types(model), eager, exact)
    assert "an arbitrary attention mask" in next(iter(stats.dense("prefill")))


def seq2seq(model: Any) -> Tensor:
    ids, mask = padded([40, 33], "right")
    decoder_ids, decoder_mask = padded([30, 21], "right", seed=2)
    output = model(
        ids,
        attention_mask=mask,
        decoder_input_ids=decoder_ids,
        decoder_attention_mask=decoder_mask,
    )
    return output.logits[decoder_mask.bool()]


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_encoder_decoder_equals_eager(name: str) -> None:
    builder = getattr(tiny_models, name)
    eager, exact = two_precisions(builder, seq2seq)
    with torch.no_grad():
        assert_as_exact_as(seq2seq(never_skipping(builder)), eager, exact)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_encoder_decoder_generates_eagers_tokens(name: str) -> None:
    builder = getattr(tiny_models, name)
    ids, mask = padded([40, 33], "right")
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 10}
    expected = tiny_models.build(builder).generate(ids, **options)
    assert torch.equal(never_skipping(builder).generate(ids, **options), expected)


def llama_made_bidirectional() -> Any:
    config = tiny_models.llama().config
    config.is_causal = False
    return hf.LlamaForCausalLM(config)


@pytest.mark.parametrize("padding", ["padded", "unpadded"])
def test_decoder_made_bidirectional_equals_eager(padding: str) -> None:
    """Its modules still say that they are causal; the mask knows better."""

    def run(model: Any) -> Tensor:
        ids, mask = padded([70, 41, 58] if padding == "padded" else [70, 70], "left")
        return model(ids, attention_mask=mask).logits[mask.bool()]

    eager, exact = two_precisions(llama_made_bidirectional, run)
    model = never_skipping(llama_made_bidirectional)
    with torch.no_grad(), hsa.collect_stats(model) as stats:
        assert_as_exact_as(run(model), eager, exact)
    assert not stats.dense()
