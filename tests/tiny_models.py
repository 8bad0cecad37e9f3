"""Tiny, randomly initialised models for comparisons with eager attention.

`initializer_range` is large on purpose: with the stock 0.02 attention is all but uniform, and a
wrong scale or a dropped mask would not show (`test_models_mutations.py` proves that here they do).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCABULARY = 97
WINDOW = 24

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _small(**changes: Any) -> dict[str, Any]:
    return {**_SMALL, **changes}


def llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_small()))


def llama_mha() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_small(num_key_value_heads=4)))


def llama_mqa() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_small(num_key_value_heads=1)))


def qwen3() -> Any:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_small(head_dim=16)))


def mistral() -> Any:
    return hf.MistralForCausalLM(hf.MistralConfig(**_small(sliding_window=WINDOW, head_dim=16)))


def gemma2() -> Any:
    config = hf.Gemma2Config(
        **_small(sliding_window=WINDOW, head_dim=16, attn_logit_softcapping=2.0)
    )
    return hf.Gemma2ForCausalLM(config)


def gemma3() -> Any:
    kinds = ["sliding_attention", "full_attention"]
    config = hf.Gemma3TextConfig(**_small(sliding_window=WINDOW, head_dim=16, layer_types=kinds))
    return hf.Gemma3ForCausalLM(config)


def gemma4() -> Any:
    """Head sizes that differ by layer, so that its config refuses to name one."""
    kinds = ["sliding_attention", "full_attention"]
    config = hf.Gemma4TextConfig(
        **_small(sliding_window=WINDOW, layer_types=kinds),
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
    )
    return hf.Gemma4ForCausalLM(config)


def gpt_oss() -> Any:
    config = hf.GptOssConfig(
        **_small(sliding_window=WINDOW, head_dim=16, num_local_experts=2, num_experts_per_tok=1)
    )
    model = hf.GptOssForCausalLM(config)
    for layer in model.model.layers:  # sinks of a size that matters
        torch.nn.init.normal_(layer.self_attn.sinks, mean=1.0, std=1.0)
    return model


def deepseek_v3() -> Any:
    config = hf.DeepseekV3Config(
        **_small(
            num_key_value_heads=4,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            moe_intermediate_size=32,
            q_lora_rank=24,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
        )
    )
    return hf.DeepseekV3ForCausalLM(config)


def phi() -> Any:
    return hf.PhiForCausalLM(hf.PhiConfig(**_small(partial_rotary_factor=0.5)))


def phimoe() -> Any:
    """A window whose size no keyword carries."""
    return hf.PhimoeForCausalLM(
        hf.PhimoeConfig(**_small(sliding_window=WINDOW, num_local_experts=2))
    )


def llama4() -> Any:
    """Chunked attention, which no block-skipping backend knows: dense."""
    config = hf.Llama4TextConfig(
        **_small(
            attention_chunk_size=WINDOW,
            head_dim=16,
            num_local_experts=2,
            intermediate_size_mlp=96,
            layer_types=["chunked_attention", "full_attention"],
            no_rope_layers=[1, 0],
        )
    )
    return hf.Llama4ForCausalLM(config)


def llava() -> Any:
    vision = hf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        initializer_range=0.3,
        projection_dim=32,
    )
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**_small()), image_token_index=96
    )
    return hf.LlavaForConditionalGeneration(config)


def bert() -> Any:
    names = {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"}
    return hf.BertForMaskedLM(hf.BertConfig(**names))


def modernbert() -> Any:
    """Global layers, and local ones with a bidirectional window (dense)."""
    names = {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"}
    config = hf.ModernBertConfig(
        **names, local_attention=WINDOW, global_attn_every_n_layers=2, initializer_cutoff_factor=2.0
    )
    return hf.ModernBertForMaskedLM(config)


def bart() -> Any:
    config = hf.BartConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=512,
        init_std=0.3,
        pad_token_id=0,
        forced_eos_token_id=None,
    )
    return hf.BartForConditionalGeneration(config)


def t5() -> Any:
    """A position bias in every layer: dense."""
    config = hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        initializer_factor=1.0,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return hf.T5ForConditionalGeneration(config)


Builder = Callable[[], Any]

DECODERS: dict[str, Builder] = {
    builder.__name__: builder
    for builder in (
        llama,
        llama_mha,
        llama_mqa,
        qwen3,
        mistral,
        gemma2,
        gemma3,
        gemma4,
        gpt_oss,
        deepseek_v3,
        phi,
        phimoe,
        llama4,
    )
}
ENCODERS: dict[str, Builder] = {"bert": bert, "modernbert": modernbert}


def build(builder: Builder, implementation: str = "eager") -> Any:
    """The model, always with the same weights, in evaluation mode."""
    torch.manual_seed(0)
    model = builder().eval()
    model.set_experts_implementation("eager")  # the others have no float64
    model.set_attn_implementation(implementation)
    return model


def token_ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """`[batch, length]` without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY - 1, (batch, length), generator=generator)


def padded(lengths: list[int], side: str, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of a ragged batch, padded on `side`."""
    total = max(lengths)
    ids = token_ids(len(lengths), total, seed)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        empty = slice(0, total - length) if side == "left" else slice(length, total)
        ids[row, empty] = 0
        mask[row, empty] = 0
    return ids, mask
