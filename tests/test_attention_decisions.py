"""What is skipped does not depend on how a request is fed: padded, cached, packed or in chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import tiny_models
import torch
from comparisons import skipping, skipping_bsfa
from tiny_models import padded, token_ids
from torch import Tensor
from transformers import DynamicCache, StaticCache, masking_utils

from hf_sparse_attention import attention
from hf_sparse_attention.types import AttentionCall, AttentionResult, SkipRule, unpack_bits

#: With the threshold_scale_factor under which enough is skipped: a window or a softcap leaves few
#: scores far below the largest.
FAMILIES = {"llama": 20.0, "mistral": 1e6, "gemma2": 1e6, "gpt_oss": 20.0, "deepseek_v3": 20.0}
Seen = list[tuple[AttentionCall, AttentionResult]]


def model_of(name: str, method: str) -> Any:
    builder = tiny_models.DECODERS[name]
    return skipping(builder, FAMILIES[name]) if method == "blasst" else skipping_bsfa(builder)


@contextmanager
def watching(monkeypatch: pytest.MonkeyPatch, lam: float | None = None) -> Iterator[Seen]:
    """Every call and its result with skip bits; `lam` fixes lambda, which otherwise goes with L."""
    seen: Seen = []
    run = attention.attend

    def watch(call: AttentionCall, rule: SkipRule, *args: Any, **kwargs: Any) -> Any:
        if lam is not None and rule.log_lambda is not None:
            rule = replace(rule, log_lambda=torch.tensor([[math.log(lam)]]))
        result = run(call, rule, *args, **{**kwargs, "return_skips": True})
        seen.append((call, result))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(attention, "attend", watch)
        with torch.no_grad():
            yield seen


def skipped(result: AttentionResult, row: int = 0) -> tuple[int, int]:
    """Blocks visited and skipped in one request, over all heads."""
    visited, skips = result.counts[row].sum(0).tolist()
    return visited, skips


def bits(result: AttentionResult) -> Tensor:
    """bool `[B, H, NQ, 16]`, False beyond the last block."""
    skips = unpack_bits(result.skips, result.skips.shape[-1] * 8)
    return torch.nn.functional.pad(skips, (0, 16 - skips.shape[-1]))


def check_that_some_but_not_all_are_skipped(seen: Seen) -> None:
    visited, skips = torch.stack([r.counts.sum((0, 1)) for _, r in seen]).sum(0).tolist()
    assert 0.02 * visited < skips < 0.98 * visited


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["blasst", "bsfa"])
def test_a_padded_batch_decides_as_its_requests_alone(
    name: str, method: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [96, 41, 75]
    ids, mask = padded(lengths, side)
    model = model_of(name, method)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with watching(monkeypatch) as together:
        model(ids, attention_mask=mask, position_ids=positions)
    check_that_some_but_not_all_are_skipped(together)
    for row in range(len(lengths)):
        with watching(monkeypatch) as alone:
            model(ids[row : row + 1, mask[row].bool()])
        assert [skipped(r, row) for _, r in together] == [skipped(r) for _, r in alone]


def decode(model: Any, cache: Any, mask: Tensor | None = None) -> None:
    """A prefill of 80 tokens and four single ones."""
    ids = token_ids(2, 84)
    if mask is None:
        mask = torch.ones_like(ids)
    for start, end in ((0, 80), (80, 81), (81, 82), (82, 83), (83, 84)):
        model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)


@pytest.mark.parametrize("padding", ["unpadded", "padded"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["blasst", "bsfa"])
def test_a_static_cache_decides_as_a_dynamic_one(
    name: str, method: str, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name, method)
    mask = torch.ones(2, 84, dtype=torch.long)
    if padding == "padded":
        mask[1, :33] = 0
    with watching(monkeypatch) as dynamic:
        decode(model, DynamicCache(config=model.config), mask)
    with watching(monkeypatch) as static:
        decode(model, StaticCache(config=model.config, max_cache_len=120), mask)
    check_that_some_but_not_all_are_skipped(dynamic)
    assert [call.phase for call, _ in static] == [call.phase for call, _ in dynamic]
    for row in range(2):
        assert [skipped(r, row) for _, r in static] == [skipped(r, row) for _, r in dynamic]


@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("method", ["blasst", "bsfa"])
def test_a_prefill_in_chunks_decides_as_a_whole_one(
    name: str, method: str, cache_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At multiples of block_q, and with lambda fixed: it goes with the keys seen so far."""
    model = model_of(name, method)
    ids = token_ids(1, 96)
    with watching(monkeypatch, lam=0.7) as whole:
        model(ids)
    check_that_some_but_not_all_are_skipped(whole)
    cache: Any = DynamicCache(config=model.config)
    if cache_kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=120)
    with watching(monkeypatch, lam=0.7) as chunked:
        for start, end in ((0, 32), (32, 80), (80, 96)):
            model(ids[:, start:end], past_key_values=cache)
    layers = model.config.num_hidden_layers
    for layer, (_, result) in enumerate(whole):
        rows = [bits(r) for _, r in chunked[layer::layers]]
        assert torch.equal(torch.cat(rows, dim=2), bits(result))


@pytest.mark.skipif(
    not hasattr(masking_utils, "packed_sequence_compatibility_function"),
    reason="this transformers makes packed masks otherwise; they run dense",
)
@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("method", ["blasst", "bsfa"])
def test_packed_sequences_decide_as_requests_of_their_own(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name, method)
    lengths = [60, 20, 16]
    ids, positions = token_ids(1, 96), torch.cat([torch.arange(n) for n in lengths])[None]
    with watching(monkeypatch) as packed:
        logits = model(ids, position_ids=positions, use_cache=False).logits
    check_that_some_but_not_all_are_skipped(packed)
    start = 0
    for i, length in enumerate(lengths):
        with watching(monkeypatch) as alone:
            own = model(ids[:, start : start + length], use_cache=False).logits
        assert torch.allclose(logits[:, start : start + length], own, atol=1e-4)
        assert [skipped(r) for _, r in packed[i :: len(lengths)]] == [skipped(r) for _, r in alone]
        start += length


def test_assisted_decoding_counts_as_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    model = skipping(tiny_models.llama)
    cache, ids = DynamicCache(config=model.config), token_ids(1, 85)
    with watching(monkeypatch) as seen:
        model(ids[:, :80], past_key_values=cache)
        model(ids[:, 80:], past_key_values=cache)
    assert [call.phase for call, _ in seen] == ["prefill", "prefill", "decode", "decode"]


@pytest.mark.parametrize("padding", ["unpadded", "padded"])
def test_an_encoder_skips_too(padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = skipping(tiny_models.bert)
    ids, mask = padded([96, 96 if padding == "unpadded" else 50], "right")
    with watching(monkeypatch) as seen:
        model(ids, attention_mask=mask)
    assert all(not call.causal for call, _ in seen)
    check_that_some_but_not_all_are_skipped(seen)
