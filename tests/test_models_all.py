"""Every text model of the installed transformers that a generic tiny config can build.

Each either gives eager's logits or is refused by name: nothing in between.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import padded
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

import hf_sparse_attention as hsa
from hf_sparse_attention.masks import MASK_READERS

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 24,
    "vocab_size": 97,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
AUTO = {
    **dict.fromkeys(MODEL_FOR_MASKED_LM_MAPPING_NAMES, hf.AutoModelForMaskedLM),
    **dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, hf.AutoModelForCausalLM),
}
#: Float32 eager itself is 2% off float64: layers are applied over and over.
CHAOTIC = {"hrm_text": 0.1}
MOST_PARAMETERS = 30_000_000


def has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except RuntimeError:  # differs by layer
        return False


def tiny(model_type: str) -> Any:
    """A small model of that type, or a skip where generic sizes do not make one."""
    try:
        config_class = CONFIG_MAPPING[model_type]
        stock = config_class()
        sizes = {name: value for name, value in SIZES.items() if has(stock, name)}
        if kinds := getattr(stock, "layer_types", None):
            sizes["layer_types"] = (list(dict.fromkeys(kinds)) * 2)[:2]
        config = config_class(**sizes)
        with torch.device("meta"):
            outline = AUTO[model_type].from_config(config, attn_implementation="eager")
        if sum(p.numel() for p in outline.parameters()) > MOST_PARAMETERS:
            pytest.skip("too large under generic sizes")
        torch.manual_seed(0)
        return AUTO[model_type].from_config(config, attn_implementation="eager").eval()
    except Exception as error:
        pytest.skip(f"generic sizes do not make one: {error}")


@pytest.mark.parametrize("model_type", AUTO)
def test_equals_eager_or_is_refused(model_type: str) -> None:
    model = tiny(model_type)
    ids, mask = padded([70, 41, 58], "left")
    with torch.no_grad():
        try:
            expected = model(ids, attention_mask=mask).logits[mask.bool()]
        except Exception as error:
            pytest.skip(f"eager does not run: {error}")
        try:
            hsa.set_sparse_attention(model, "blasst", threshold_scale_factor=0, min_length=0)
            ours = model(ids, attention_mask=mask).logits[mask.bool()]
        except (ValueError, NotImplementedError) as error:
            assert any(x in str(error) for x in ("does not go through", "not supported"))  # noqa: PT017
            return
    off = float((ours - expected).abs().max() / expected.abs().max())
    assert off < CHAOTIC.get(model_type, 1e-3)


def test_models_that_compute_with_coded_masks_are_known() -> None:
    """In modules that call the interface, a mask may only be passed on, compared with None or cut.

    Whoever does arithmetic with it must ask for a real mask, or be in `MASK_READERS`.
    """
    found = set()
    for file in Path(hf.__file__).parent.glob("models/*/modeling_*.py"):
        source = file.read_text("utf-8")
        if "create_causal_mask" not in source and "create_masks_for_generate" not in source:
            continue
        if "allow_is_causal_skip" in source or "get_interface(" not in source:
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and "get_interface(" in ast.unparse(node):
                found |= {file.parent.name for x in ast.walk(node) if _reads_dtype_or_joins(x)}
    assert found <= MASK_READERS | ONLY_UNDER_EAGER


#: They add the mask themselves, but only if the implementation is "eager".
ONLY_UNDER_EAGER = {"decision_transformer", "gpt2"}


def _reads_dtype_or_joins(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute) and node.attr in ("dtype", "masked_fill", "to"):
        return isinstance(node.value, ast.Name) and node.value.id in (
            "attention_mask",
            "causal_mask",
        )
    if isinstance(node, ast.BinOp):
        names = (node.left, node.right)
        return any(isinstance(x, ast.Name) and x.id == "attention_mask" for x in names)
    return False
