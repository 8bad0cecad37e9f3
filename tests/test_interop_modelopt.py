"""ModelOpt's own code reads what we write, and decides as our reference does on its blocks.

Skipped where nvidia-modelopt is not installed: `pip install 'hf-sparse-attention[modelopt]'`.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from test_interop_export import CONFIG

from hf_sparse_attention.backends import reference
from hf_sparse_attention.config_schema import CONFIG_KEY
from hf_sparse_attention.interop import export
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule, unpack_bits

pytest.importorskip(
    "modelopt", reason="nvidia-modelopt is not installed: hf-sparse-attention[modelopt]"
)
pytestmark = pytest.mark.slow  # importing ModelOpt takes about ten seconds

KEY = export(CONFIG, "modelopt").content[CONFIG_KEY]
GROUP = KEY["config_groups"]["group_0"]


@pytest.fixture(scope="module")
def serving():
    from modelopt.torch.sparsity.attention_sparsity.plugins import sparse_attn_config

    return sparse_attn_config


def test_its_serving_loader_accepts_the_key(serving):
    found, preset = serving.load_from_checkpoint_metadata(
        SimpleNamespace(sparse_attention_config=KEY)
    )
    assert preset == "CHECKPOINT_CALIBRATED_SOFTMAX_SKIP"
    layer = serving.match_sparse_config("model.layers.1.self_attn.attn", found)
    assert layer["enable"]
    assert layer["threshold_scale_factor"] == GROUP["threshold_scale_factor"]
    assert layer["target_sparse_ratio"] == {"prefill": 0.5, "decode": 0.4}
    ignored = serving.match_sparse_config("model.layers.0.self_attn.attn", found)
    assert ignored == {"enable": False}


@pytest.mark.parametrize("kv_len", [2048, 32768])
@pytest.mark.parametrize(("phase", "q_len"), [("prefill", 512), ("decode", 1)])
def test_its_runtime_evaluates_the_fit_as_we_do(serving, phase, q_len, kv_len):
    from modelopt.torch.sparsity.attention_sparsity.methods.triton_skip_softmax import (
        TritonSkipSoftmaxMethod,
    )

    found, _ = serving.load_from_checkpoint_metadata(SimpleNamespace(sparse_attention_config=KEY))
    layer = serving.match_sparse_config("model.layers.1.self_attn", found)
    method = TritonSkipSoftmaxMethod()
    method.calibration_params = layer["threshold_scale_factor"]
    method.target_sparse_ratio = layer["target_sparse_ratio"]
    assert method.get_inference_threshold(q_len, kv_len) == pytest.approx(
        CONFIG.scale_factor(phase) / kv_len, rel=1e-12
    )


def test_its_decisions_are_ours_on_its_blocks():
    """From our key to the blocks it skips: those that our reference skips at 128x128, ascending."""
    from modelopt.torch.sparsity.attention_sparsity.config import (
        SKIP_SOFTMAX_DEFAULT,
        SparseAttentionAttributeConfig,
    )
    from modelopt.torch.sparsity.attention_sparsity.methods.flash_skip_softmax import (
        FlashSkipSoftmax,
    )

    settings = SparseAttentionAttributeConfig(**SKIP_SOFTMAX_DEFAULT["sparse_cfg"]["*attn*"])
    method = FlashSkipSoftmax(settings.model_dump())
    method.calibration_params = GROUP["threshold_scale_factor"]
    method.target_sparse_ratio = GROUP["target_sparsity"]

    torch.manual_seed(0)
    length, scale = 1024, 64**-0.5
    q, k = torch.randn(2, 1, 2, length, 64).unbind()
    k = k * torch.linspace(4, 1, length)[:, None]  # later keys matter less, on the whole
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    scores = (scale * q @ k.mT).masked_fill(~visible, torch.finfo(torch.float32).min)
    kept, stats = method.calculate_sparsity(scores)
    theirs = ~kept[:, :, ::128, ::128]

    rule = SkipRule.blasst(CONFIG.scale_factor("prefill") / length)
    result = reference.run(
        AttentionCall(q, k, q, scale), rule, BlockGeometry(128, 128, "ascending"), return_skips=True
    )
    ours = unpack_bits(result.skips, length // 128)
    below = torch.ones(8, 8, dtype=torch.bool).tril()
    assert 0.1 < ours[..., below].float().mean() < 0.9
    assert torch.equal(theirs[..., below], ours[..., below])
    visited, skipped = result.counts.sum((0, 1)).tolist()
    assert stats["sparsity"] == [pytest.approx(skipped / visited)]


def test_our_notes_on_its_fallbacks_are_true():
    from modelopt.torch.sparsity.attention_sparsity.methods.triton_skip_softmax import (
        TritonSkipSoftmaxMethod,
    )

    method = TritonSkipSoftmaxMethod()
    method.calibration_params = {"prefill": {"a": 5.0, "b": 0.0}}
    method.target_sparse_ratio = {"prefill": 0.5}
    for q_len in (512, 1):  # b <= 0 is no fit; decode has none
        assert math.isclose(method.get_inference_threshold(q_len, 4096), 0.1)
