"""The comparisons of `test_models.py` can fail: each mutation of the call turns them red."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import scenarios
import tiny_models
import torch
from comparisons import assert_as_exact_as, never_skipping, two_precisions

from hf_sparse_attention import attention
from hf_sparse_attention.types import AttentionCall

Mutation = Callable[[AttentionCall], AttentionCall]


def scale_times_3(call: AttentionCall) -> AttentionCall:
    return replace(call, scale=call.scale * 3)


def padding_dropped(call: AttentionCall) -> AttentionCall:
    return replace(call, key_valid=None)


def not_causal(call: AttentionCall) -> AttentionCall:
    return replace(call, causal=False, window=None)


def window_off_by_one(call: AttentionCall) -> AttentionCall:
    return replace(call, window=call.window and call.window + 1)


def window_dropped(call: AttentionCall) -> AttentionCall:
    return replace(call, window=None)


def q_offset_off_by_one(call: AttentionCall) -> AttentionCall:
    return replace(call, q_offset=None if call.q_offset is None else call.q_offset - 1)


def q_offset_dropped(call: AttentionCall) -> AttentionCall:
    return replace(call, q_offset=None, key_valid=None)


def softcap_dropped(call: AttentionCall) -> AttentionCall:
    return replace(call, softcap=None)


def sinks_dropped(call: AttentionCall) -> AttentionCall:
    return replace(call, sinks=None)


def mask_dropped(call: AttentionCall) -> AttentionCall:
    return replace(call, mask=None, causal=True)


def first_key_lost(call: AttentionCall) -> AttentionCall:
    valid = call.key_valid
    if valid is None:
        valid = torch.ones(call.k.shape[0], call.k.shape[2], dtype=torch.bool)
    first = torch.nn.functional.one_hot(valid.int().argmax(1), valid.shape[1]).bool()
    return replace(call, key_valid=valid & ~first)


@pytest.mark.parametrize(
    ("mutation", "name", "scenario"),
    [
        (scale_times_3, "llama", "no_padding"),
        (scale_times_3, "gemma3", "dynamic_cache"),
        (padding_dropped, "llama", "left_padding"),
        (padding_dropped, "qwen3", "dynamic_cache"),
        (not_causal, "phi", "no_padding"),
        (not_causal, "llama", "chunked_prefill"),
        (window_off_by_one, "mistral", "no_padding"),
        (window_off_by_one, "gemma2", "whole_cache"),
        (window_off_by_one, "phimoe", "chunked_prefill"),
        (window_dropped, "gpt_oss", "left_padding"),
        (q_offset_off_by_one, "llama", "static_cache"),
        (q_offset_off_by_one, "mistral", "chunked_prefill"),
        (q_offset_dropped, "llama", "static_cache_without_padding"),
        (softcap_dropped, "gemma2", "no_padding"),
        (sinks_dropped, "gpt_oss", "no_padding"),
        (mask_dropped, "llama", "user_bool_mask"),
        (mask_dropped, "llama", "user_additive_mask"),
        (first_key_lost, "deepseek_v3", "no_padding"),
    ],
)
def test_mutation_turns_red(
    mutation: Mutation, name: str, scenario: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What runs dense (a user's mask) goes another way than what skips.
    for name_of_run in ("attend", "attend_dense"):
        run_call = getattr(attention, name_of_run)
        monkeypatch.setattr(
            attention,
            name_of_run,
            lambda call, *args, run_call=run_call, **kwargs: run_call(
                mutation(call), *args, **kwargs
            ),
        )
    builder, run = tiny_models.DECODERS[name], scenarios.ALL[scenario]
    eager, exact = two_precisions(builder, run)
    with torch.no_grad():
        ours = run(never_skipping(builder))
    with pytest.raises(AssertionError, match="off by"):
        assert_as_exact_as(ours, eager, exact)
