"""The attention function's own arguments: each is served or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_sparse_attention as hsa
from hf_sparse_attention.attention import blasst_attention, bsfa_attention
from hf_sparse_attention.masks import CODED
from hf_sparse_attention.settings import ATTRIBUTE, LayerSettings


class Module(nn.Module):
    """An attention module as bare as some are: no groups, no config, no layer index."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def never_skipping(**attributes: Any) -> Module:
    module = Module(**attributes)
    config = hsa.SparseAttentionConfig(threshold_scale_factor=0, min_length=0)
    setattr(module, ATTRIBUTE, LayerSettings.of(module, config))
    return module


def tensors(
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    q_len: int = 70,
    kv_len: int = 70,
    **more: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dim, v_dim, dtype = more.get("dim", 16), more.get("v_dim", 16), more.get("dtype")
    q = torch.randn(batch, q_len, heads, dim, dtype=dtype).transpose(1, 2)  # as models hand it over
    k = torch.randn(batch, kv_len, kv_heads, dim, dtype=dtype).transpose(1, 2)
    v = torch.randn(batch, kv_len, kv_heads, v_dim, dtype=dtype).transpose(1, 2)
    return q, k, v


def expected(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float | None = None
) -> Tensor:
    """`[B, Lq, Hq, Dv]` in float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.repeat_interleave(group, 1).transpose(2, 3)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ v.repeat_interleave(group, 1)).transpose(1, 2)


def causal(q_len: int, kv_len: int) -> Tensor:
    return torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)


def check(out: Tensor, exact: Tensor, tolerance: float = 1e-5) -> None:
    assert out.shape == exact.shape
    assert out.is_contiguous()
    assert torch.allclose(out.double(), exact, atol=tolerance)


@pytest.mark.parametrize("q_len", [1, 5, 30, 70])
def test_no_mask_is_bottom_right_causal(q_len: int) -> None:
    q, k, v = tensors(q_len=q_len)
    out, weights = blasst_attention(never_skipping(), q, k, v, None)
    assert weights is None
    check(out, expected(q, k, v, causal(q_len, 70)))


def test_the_keyword_is_causal_beats_the_module() -> None:
    q, k, v = tensors(q_len=30)
    both_ways = expected(q, k, v, None)
    check(blasst_attention(never_skipping(), q, k, v, None, is_causal=False)[0], both_ways)
    check(blasst_attention(never_skipping(is_causal=False), q, k, v, None)[0], both_ways)
    module = never_skipping(is_causal=False)
    out = blasst_attention(module, q, k, v, None, is_causal=True)[0]
    check(out, expected(q, k, v, causal(30, 70)))


def test_scaling_dropout_and_keywords_of_other_layers() -> None:
    q, k, v = tensors()
    options = {"position_ids": None, "use_cache": True, "num_items_in_batch": 3}
    out, _ = blasst_attention(never_skipping(), q, k, v, None, 0.0, 0.5, **options)
    check(out, expected(q, k, v, causal(70, 70), scale=0.5))


@pytest.mark.parametrize(("dim", "v_dim", "heads"), [(192, 128, 2), (24, 16, 4), (16, 32, 4)])
def test_heads_of_two_sizes(dim: int, v_dim: int, heads: int) -> None:
    q, k, v = tensors(heads=heads, kv_heads=heads, dim=dim, v_dim=v_dim)
    out, _ = blasst_attention(never_skipping(), q, k, v, None)
    check(out, expected(q, k, v, causal(70, 70)))


def test_more_queries_than_keys() -> None:
    """Cross-attention has that; causal rows before the first key see nothing and give zeros."""
    q, k, v = tensors(q_len=40, kv_len=10)
    check(
        blasst_attention(never_skipping(is_causal=False), q, k, v, None)[0], expected(q, k, v, None)
    )
    out, _ = blasst_attention(never_skipping(), q, k, v, None)
    assert not out[:, :30].any()
    check(out[:, 30:].contiguous(), expected(q[:, :, 30:], k, v, causal(10, 10)))


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 0), (0, 8)])
def test_nothing_in_nothing_out(q_len: int, kv_len: int) -> None:
    out, _ = blasst_attention(never_skipping(), *tensors(q_len=q_len, kv_len=kv_len), None)
    assert out.shape == (2, q_len, 4, 16)


def test_learned_queries_for_a_batch_of_keys() -> None:
    _, k, v = tensors()
    q = torch.randn(1, 4, 9, 16)
    out, _ = blasst_attention(never_skipping(is_causal=False), q, k, v, None)
    check(out, expected(q.expand(2, -1, -1, -1), k, v, None))


def test_a_mask_of_one_row_for_the_whole_batch() -> None:
    q, k, v = tensors(q_len=1)
    visible = torch.rand(1, 1, 1, 70) < 0.5
    check(blasst_attention(never_skipping(), q, k, v, visible)[0], expected(q, k, v, visible))


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "plain"])
def test_mixed_dtypes(autocast: bool) -> None:
    q, k, v = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out, _ = blasst_attention(never_skipping(), q, k, v.bfloat16(), None)
    assert out.dtype == torch.bfloat16
    exact = expected(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal(70, 70))
    check(out, exact, tolerance=2 * 2.0**-8 * float(exact.abs().max()))


def test_float64_runs_in_float64() -> None:
    q, k, v = tensors(dtype=torch.float64)
    out, _ = blasst_attention(never_skipping(), q, k, v, None)
    check(out, expected(q, k, v, causal(70, 70)), tolerance=1e-12)


@pytest.mark.parametrize("given", ["none", "bool", "additive"])
def test_position_bias_joins_the_mask(given: str) -> None:
    q, k, v = tensors(q_len=9, kv_len=12, kv_heads=4)
    bias, visible = torch.randn(1, 4, 9, 12), causal(9, 12).expand(2, 1, 9, 12)
    mask = {
        "none": None,
        "bool": visible,
        "additive": torch.zeros(2, 1, 9, 12).masked_fill(~visible, torch.finfo(torch.float32).min),
    }[given]
    out, _ = blasst_attention(never_skipping(), q, k, v, mask, position_bias=bias)
    scores = q.double() @ k.double().transpose(2, 3) / 4 + bias
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    check(out, (weights @ v.double()).transpose(1, 2))


def test_attention_weights_are_those_of_eager() -> None:
    q, k, v = tensors(q_len=9, kv_len=12, kv_heads=4)
    out, weights = blasst_attention(never_skipping(), q, k, v, None, output_attentions=True)
    scores = q.double() @ k.double().transpose(2, 3) / 4
    exact = scores.masked_fill(~causal(9, 12), -torch.inf).softmax(-1)
    assert torch.allclose(weights.double(), exact, atol=1e-6)
    check(out, (exact @ v.double()).transpose(1, 2))


def test_a_windowed_mask_without_a_window_is_refused() -> None:
    mask = torch.ones(2, 1, 1, 70, dtype=CODED["windowed"])
    with pytest.raises(ValueError, match="Module: expected the keyword sliding_window"):
        blasst_attention(never_skipping(), *tensors(), mask)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"cache": object()}, "paged caches"),
        ({"sinks": torch.zeros(2, 4, 70, 1)}, "sinks that differ from query to query"),
        ({"cu_seq_lens_q": torch.tensor([0, 40, 70])}, "expected position_ids that start anew"),
    ],
)
def test_what_is_not_served_is_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises((NotImplementedError, ValueError), match=message):
        blasst_attention(never_skipping(), *tensors(), None, **keywords)


def test_one_packed_sequence_is_no_packing() -> None:
    q, k, v = tensors()
    lengths = torch.tensor([0, 70])
    out, _ = blasst_attention(never_skipping(), q, k, v, None, cu_seq_lens_q=lengths)
    check(out, expected(q, k, v, causal(70, 70)))


def test_a_bare_module_runs_with_the_defaults() -> None:
    q, k, v = tensors()
    module = Module()
    check(blasst_attention(module, q, k, v, None)[0], expected(q, k, v, causal(70, 70)))
    assert getattr(module, ATTRIBUTE).layer is None
    with pytest.raises(ValueError, match="calibrate"):
        bsfa_attention(Module(), q, k, v, None)


def test_a_named_backend_that_cannot_is_an_error() -> None:
    module = Module()
    config = hsa.SparseAttentionConfig(
        threshold_scale_factor=1.0, min_length=0, geometry="32x32", backend="cpu"
    )
    setattr(module, ATTRIBUTE, LayerSettings.of(module, config))
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run this call: .*32x32"):
        blasst_attention(module, *tensors(), None)
