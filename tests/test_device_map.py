"""Layers on several devices (`device_map`): as on one device, each with its own thresholds."""

import pytest
import torch
from parallel_runs import run
from tiny_models import llama
from transformers import AutoModelForCausalLM

from hf_sparse_attention.types import PHASES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device_map")
    torch.manual_seed(0)
    llama().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "second_layer", ["disk", pytest.param("cuda", marks=pytest.mark.gpu)], ids=str
)
def test_layers_on_several_devices(folder, tmp_path, second_layer):
    """On the disk a layer's weights are meta tensors between its forwards."""
    places = dict.fromkeys(
        ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"], "cpu"
    )
    places |= {"model.layers.0": "cpu", "model.layers.1": second_layer}
    spread = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="blasst", device_map=places, offload_folder=tmp_path
    )
    weights = spread.model.layers[1].self_attn.q_proj.weight
    assert weights.device.type == {"disk": "meta"}.get(second_layer, second_layer)
    found = run(spread)
    expected = run(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="blasst"))
    for name, result in expected.items():
        torch.testing.assert_close(found[name]["logits"], result["logits"])
        for phase in PHASES:
            counts = found[name]["counts"][phase]
            assert counts.keys() == result["counts"][phase].keys()
            for layer, expected_counts in result["counts"][phase].items():
                assert torch.equal(counts[layer], expected_counts), (name, phase, layer)
