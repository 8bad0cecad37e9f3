"""The mask function, against the 4D mask that "sdpa" would get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    create_causal_mask,
    eager_mask,
    or_masks,
    sdpa_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from hf_sparse_attention.backends.dense import visibility
from hf_sparse_attention.masks import CODED, read_mask, sparse_attention_mask
from hf_sparse_attention.types import AttentionCall

PLAIN = hf.LlamaConfig()
WITH_WINDOW = hf.MistralConfig(sliding_window=5)


def seen(mask: Tensor | None, q_len: int, kv_len: int, window: int | None = None) -> Tensor:
    """The keys each query sees, bool `[B|1, 1, Lq, Lk]`, as the attention function reads `mask`."""
    reading = read_mask(mask, q_len, kv_len, causal=True)
    if reading.mask is not None:
        return reading.mask
    q, k = torch.zeros(1, 1, q_len, 1), torch.zeros(1, 1, kv_len, 1)
    call = AttentionCall(
        q,
        k,
        k,
        scale=1.0,
        causal=reading.causal,
        q_offset=reading.q_offset,
        key_valid=reading.key_valid,
        window=window if reading.windowed else None,
    )
    visible = visibility(call, 0, q_len)
    if reading.sequences is None:
        return visible
    same = reading.sequences[:, None, :, None] == reading.sequences[:, None, None, :]
    return visible & same


@settings(deadline=None, max_examples=150)
@given(
    data=st.data(),
    window=st.none() | st.integers(1, 12),
    q_len=st.integers(1, 12),
    past=st.integers(0, 12),
    unwritten=st.integers(0, 6),
    dropped=st.integers(0, 12),
    tensor_offset=st.booleans(),
)
def test_reads_back_as_the_4d_mask(
    data: st.DataObject,
    window: int | None,
    q_len: int,
    past: int,
    unwritten: int,
    dropped: int,
    tensor_offset: bool,
) -> None:
    """Over padding, caches that are longer than what is written, and ones that dropped old keys."""
    kv_offset = min(dropped, past)
    kv_len = past + q_len + unwritten - kv_offset
    padding = data.draw(st.none() | st.lists(st.booleans(), min_size=1, max_size=past + q_len))
    attention_mask = None
    if padding is not None:  # two requests, the second without padding
        attention_mask = torch.tensor([padding, [True] * len(padding)])
    function = causal_mask_function
    if window is not None:
        function = sliding_window_causal_mask_function(window)
    arguments: dict[str, Any] = {
        "batch_size": 2,
        "q_length": q_len,
        "kv_length": kv_len,
        "q_offset": torch.tensor(past) if tensor_offset else past,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": attention_mask,
        "local_size": window,
    }
    mask = sparse_attention_mask(**arguments, config=PLAIN)
    assert mask is None or mask.shape == (2, 1, 1, kv_len)
    expected = sdpa_mask(**arguments, allow_is_causal_skip=False)
    assert torch.equal(seen(mask, q_len, kv_len, window).expand(2, -1, -1, -1), expected)


def test_none_only_for_plain_causal() -> None:
    assert sparse_attention_mask(2, 8, 8, config=PLAIN) is None
    assert sparse_attention_mask(2, 1, 8, q_offset=7, config=PLAIN) is None
    ones = torch.ones(2, 8, dtype=torch.bool)
    assert sparse_attention_mask(2, 8, 8, attention_mask=ones, config=PLAIN) is None
    holed = ones.clone()
    holed[0, 3] = False
    assert (
        sparse_attention_mask(2, 8, 8, attention_mask=holed, config=PLAIN).dtype == CODED["causal"]
    )
    assert (
        sparse_attention_mask(2, 8, 9, config=PLAIN).dtype == CODED["causal"]
    )  # an unwritten slot
    assert sparse_attention_mask(2, 8, 8, config=WITH_WINDOW).dtype == CODED["causal"]
    windowed = sliding_window_causal_mask_function(5)
    assert (
        sparse_attention_mask(2, 8, 8, mask_function=windowed, config=PLAIN).dtype
        == CODED["windowed"]
    )


UNKNOWN = {
    "or_overlay": or_masks(causal_mask_function, lambda b, h, q, k: (q < 3) & (k < 3)),
    "and_overlay": and_masks(causal_mask_function, sliding_window_overlay(3)),
    "chunked": chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)),
    "nested": and_masks(sliding_window_causal_mask_function(3), causal_mask_function),
    "own": lambda b, h, q, k: k <= q,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_recognised_becomes_the_4d_mask(name: str) -> None:
    arguments: dict[str, Any] = {
        "batch_size": 2,
        "q_length": 8,
        "kv_length": 8,
        "mask_function": UNKNOWN[name],
        "local_size": 4,
    }
    mask = sparse_attention_mask(**arguments, config=PLAIN)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, sdpa_mask(**arguments, allow_is_causal_skip=False))


def test_a_request_for_a_real_mask_is_kept() -> None:
    mask = sparse_attention_mask(2, 8, 8, allow_is_causal_skip=False, config=PLAIN)
    assert mask.dtype == torch.bool
    assert mask.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("model_type", ["deepseek_v4", "minimax_m3_vl_text"])
def test_models_that_read_masks_get_real_ones(model_type: str) -> None:
    config = hf.LlamaConfig()
    config.model_type = model_type
    mask = sparse_attention_mask(2, 8, 8, config=config, dtype=torch.float64)
    assert torch.equal(mask, eager_mask(2, 8, 8, dtype=torch.float64))


def test_bidirectional_is_a_bool_mask_without_memory() -> None:
    valid = torch.tensor([[True] * 8, [True] * 5 + [False] * 3])
    function = bidirectional_mask_function
    mask = sparse_attention_mask(2, 6, 8, mask_function=function, attention_mask=valid)
    assert mask.shape == (2, 1, 6, 8)
    assert mask.stride(2) == 0
    reading = read_mask(mask, 6, 8, causal=True)
    assert not reading.causal
    assert torch.equal(reading.key_valid, valid)
    assert sparse_attention_mask(2, 6, 8, mask_function=function).all()


@pytest.mark.parametrize(("window", "pattern"), [(None, "packed"), (3, "packed_windowed")])
def test_packed_sequences_are_numbered(window: int | None, pattern: str) -> None:
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0], [0, 1, 0, 1, 2, 3, 4, 5]])
    numbers = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 1, 1, 1]])
    function = causal_mask_function
    if window is not None:
        function = sliding_window_causal_mask_function(window)
    make = getattr(masking_utils, "packed_sequence_compatibility_function", None)
    if make is None:
        pytest.skip("this transformers makes packed masks otherwise; they run dense")
    packed = make(function, positions, numbers)
    arguments: dict[str, Any] = {
        "batch_size": 2,
        "q_length": 8,
        "kv_length": 8,
        "mask_function": packed,
        "allow_is_causal_skip": False,
    }
    mask = sparse_attention_mask(**arguments, config=PLAIN)
    assert mask.dtype == CODED[pattern]
    assert torch.equal(seen(mask, 8, 8, window), sdpa_mask(**arguments))


def test_a_coded_mask_survives_a_second_pass() -> None:
    """`generate()` makes the mask of a static cache itself, and the model then makes it again."""
    config = hf.LlamaConfig(attn_implementation="blasst")
    embeds = torch.zeros(2, 8, 4)
    valid = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    mask = create_causal_mask(config, embeds, valid, None)
    assert mask.dtype == CODED["causal"]
    assert create_causal_mask(config, embeds, mask, None) is mask


def test_one_query_of_a_static_cache_stands_at_the_last_visible_key() -> None:
    visible = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]]).bool()
    reading = read_mask(visible[:, None, None, :], 1, 6, causal=True)
    assert reading.causal
    assert reading.q_offset.tolist() == [4, 4]
    assert torch.equal(reading.key_valid, visible)
    assert not read_mask(visible[:, None, None, :], 1, 6, causal=False).causal  # cross-attention


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 6, dtype=torch.bool), r"expected \[B, 1, 4, 6\], got \[2, 6\]"),
        (torch.ones(2, 1, 4, 5, dtype=torch.bool), r"got \[2, 1, 4, 5\]"),
        (torch.ones(2, 1, 3, 6, dtype=torch.bool), r"got \[2, 1, 3, 6\]"),
        (torch.ones(2, 1, 4, 6, dtype=torch.int64), "expected bool or floating point"),
        (torch.ones(2, 1, 4, 6, dtype=torch.uint8), "expected bool or floating point"),
    ],
)
def test_bad_masks_are_named(mask: Tensor, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        read_mask(mask, 4, 6, causal=True)
