"""What an evaluation compares: how it is written, and the sliding window among it."""

import itertools

import pytest
import torch
from tiny_models import gemma3, llama

from hf_sparse_attention import collect_stats
from hf_sparse_attention.calibration.attach import attached
from hf_sparse_attention.evaluation.settings import FORMS, Setting, parse_settings
from hf_sparse_attention.evaluation.window import SlidingWindow, blocks_in_window
from hf_sparse_attention.types import BlockGeometry


@pytest.mark.parametrize("text", FORMS)
def test_every_form_can_be_read_and_written(text):
    assert Setting.parse(text).name == text
    assert Setting.parse(f" {text} ") == Setting.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "blast:0.5", "blasst", "blasst:1.5", "blasst:0.5:heads", "blasst:0.5:head:head"),
        *("bsfa:16", "bsfa:k=0", "bsfa:k=x", "budget:-1", "budget:nan", "window:0", "dense:1"),
        *("window:k=1.5", "budget:0.1:head"),
    ],
)
def test_other_forms_are_refused_and_the_valid_ones_named(text):
    with pytest.raises(ValueError, match="expected") as error:
        Setting.parse(text)
    for form in FORMS:
        assert form in str(error.value)


def test_dense_comes_first_and_nothing_twice():
    names = [x.name for x in parse_settings(["blasst:0.5", "dense", Setting("blasst", 0.5)])]
    assert names == ["dense", "blasst:0.5"]


def counted_one_by_one(q_len, kv_len, window, rows, block_k):
    found = set()
    for n in range(q_len):
        position = kv_len - q_len + n
        for key in range(max(0, position - window + 1), position + 1):
            found.add((n // rows, key // block_k))
    return len(found)


@pytest.mark.parametrize(
    ("q_len", "kv_len", "rows", "block_k"),
    [(130, 130, 64, 64), (130, 130, 64, 1), (100, 260, 64, 128), (1, 300, 1, 64), (3, 77, 1, 1)],
    ids=lambda x: str(x),
)
@pytest.mark.parametrize("window", [1, 7, 64, 65, 400])
def test_blocks_in_a_window(q_len, kv_len, rows, block_k, window):
    found = blocks_in_window(q_len, kv_len, window, rows, block_k)
    assert found == counted_one_by_one(q_len, kv_len, window, rows, block_k)


@pytest.mark.parametrize("share", [0.3, 0.7])
@pytest.mark.parametrize("geometry", ["64x64", "64x1"])
def test_a_window_leaves_out_the_share_of_blocks_asked_for(share, geometry):
    model, blocks = llama().eval(), BlockGeometry.from_name(geometry)
    window = SlidingWindow(model, Setting("window", share), blocks)
    with torch.no_grad(), attached(model, window), collect_stats(model) as stats:
        cache = model(torch.randint(3, 97, (1, 512)), use_cache=True).past_key_values
        model(torch.randint(3, 97, (1, 1)), past_key_values=cache, use_cache=True)
    # The widest window that keeps no more: one key more would be too much. In 512 tokens there are
    # 36 blocks of 64 x 64 (one more or less is 1/36), and 8 for the one position that decodes.
    step = {"prefill": 8 / 36, "decode": 1 / 8} if geometry == "64x64" else {}
    for phase in ("prefill", "decode"):
        assert share <= stats.sparsity(phase) + 1e-9 <= share + step.get(phase, 0.01)


@pytest.mark.parametrize("make", [llama, gemma3], ids=["llama", "gemma3"])
def test_a_window_is_what_the_mask_of_a_window_does(make):
    """Against eager attention under a mask that is written out; Gemma 3 has windows of its own."""
    model = make().eval()
    ids = torch.randint(3, 97, (1, 200))
    window = SlidingWindow(model, Setting("window", level=1), BlockGeometry(64, 16))  # 16 keys
    distance = torch.arange(200)[:, None] - torch.arange(200)
    allowed = (distance >= 0) & (distance < 16)
    with torch.no_grad():
        with attached(model, window):
            found = model(ids, use_cache=False).logits
        model.set_attn_implementation("eager")
        mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]
        masks = {"full_attention": mask, "sliding_attention": mask}
        expected = model(
            ids, attention_mask=masks if make is gemma3 else mask, use_cache=False
        ).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_window_refuses_padding():
    model = llama().eval()
    window = SlidingWindow(model, Setting("window", 0.5), BlockGeometry())
    mask = torch.ones(2, 100, dtype=torch.int64)
    mask[0, :10] = 0
    with torch.no_grad(), attached(model, window), pytest.raises(ValueError, match="padding"):
        model(torch.randint(3, 97, (2, 100)), attention_mask=mask)


def test_families_share_a_line():
    named = itertools.groupby(map(Setting.parse, FORMS), lambda x: x.family)
    assert [family for family, _ in named] == [
        *("dense", "never", "blasst", "blasst, by layer", "blasst, by head"),
        *("bsfa", "budget", "window"),
    ]
