"""The front door: validation, choosing a backend, and the dense backend against the reference."""

import logging
import math

import pytest
import torch

from hf_sparse_attention import functional
from hf_sparse_attention.backends import BACKENDS, available_backends, select
from hf_sparse_attention.functional import (
    KERNEL_MIN_LENGTH,
    attend,
    attend_dense,
    block_skip_attention,
)
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

Q, K, V = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 6)
NEVER = SkipRule.never()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q[0]}, r"q: expected 4 dimensions .* got \[4, 9, 8\]"),
        ({"q": Q.long()}, "q: expected a floating dtype, got torch.int64"),
        ({"k": K.half()}, "k: expected q's dtype .* torch.float32 .* got torch.float16"),
        ({"v": V[:, :, 1:]}, r"v: expected \[B, Hkv, Lk\] as in k .* got \[2, 2, 8, 6\]"),
        ({"k": K[..., 1:]}, r"k: expected q's batch and head size .* got \[2, 2, 9, 7\]"),
        ({"q": Q[:, :3]}, "q: expected a multiple of k's 2 heads, got 3 query heads"),
        ({"scale": math.nan}, "scale: expected a finite number, got nan"),
        ({"window": 0}, "window: expected at least 1 key, got 0"),
        ({"window": 3, "causal": False}, "window: expected causal=True"),
        ({"softcap": -1.0}, "softcap: expected a positive number, got -1.0"),
        ({"key_valid": torch.ones(2, 8, dtype=torch.bool)}, r"key_valid: expected shape \[2, 9\]"),
        ({"key_valid": torch.ones(2, 9)}, "key_valid: expected torch.bool, got torch.float32"),
        (
            {"q_offset": torch.zeros(3, dtype=torch.int64)},
            r"q_offset: expected shape \[1\] or \[2\]",
        ),
        ({"sinks": torch.zeros(2)}, r"sinks: expected shape \[4\], got \[2\]"),
        ({"geometry": BlockGeometry(0, 64)}, "geometry: expected blocks of at least 1x1, got 0x64"),
        ({"geometry": BlockGeometry(order="zigzag")}, "order: expected one of sink_diagonal"),
        ({"geometry": BlockGeometry(split_k=100)}, "split_k: expected a multiple of block_k 64"),
        ({"rule": SkipRule.blasst(torch.ones(3, 4))}, r"log_lambda: expected shape \[2, 4\]"),
        ({"rule": SkipRule(torch.zeros(1, 1).double())}, "log_lambda: expected torch.float32"),
        (
            {"rule": SkipRule.bsfa(torch.ones(1, 4, 7))},
            r"block_threshold: expected shape \[2, 4, 1\]",
        ),
        (
            {"backend": "cudnn"},
            "backend: expected one of auto, cpu, cuda, triton, reference, dense, got 'cudnn'",
        ),
    ],
)
def test_bad_input_names_expected_and_got(change, message):
    arguments = {"q": Q, "k": K, "v": V, "rule": NEVER} | change
    with pytest.raises((ValueError, TypeError), match=message):
        block_skip_attention(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SkipRule.blasst(-0.1), r"lambda: expected values in \[0, 1\), got"),
        (lambda: SkipRule.blasst(math.nan), r"lambda: expected values in \[0, 1\), got"),
        (lambda: SkipRule.bsfa(math.nan), "threshold: expected finite values or -inf, got NaN"),
        (lambda: SkipRule.budget(-1), "max_dropped_mass: expected values >= 0, got -1.0"),
        (lambda: BlockGeometry.from_name("64"), "geometry: expected '<rows>x<keys>'"),
    ],
)
def test_bad_rules_are_refused_where_they_are_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("lam", [1.0, 5.0, math.inf])
def test_lambda_is_clamped_below_one(lam):
    assert SkipRule.blasst(lam).log_lambda.item() < 0


def test_lambda_zero_never_skips():
    result = block_skip_attention(Q, K, V, rule=SkipRule.blasst(0.0), geometry=BlockGeometry(2, 2))
    assert result.counts[..., 1].sum() == 0


def test_geometry_names():
    assert BlockGeometry.from_name("64x128") == BlockGeometry(64, 128)
    assert BlockGeometry(64, 1).name == "64x1"


FEATURES = {
    "plain": {},
    "window": {"window": 20},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)},
    "bidirectional": {"causal": False},
    "padded": {"key_valid": torch.arange(130)[None].expand(2, -1) > torch.tensor([[7], [90]])},
    "holes": {"key_valid": torch.arange(130)[None].expand(2, -1) % 5 != 2},
    "offset": {"q_offset": torch.tensor([3, 20])},
    "all together": {
        "window": 33,
        "softcap": 3.0,
        "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64),
        "key_valid": torch.arange(130)[None].expand(2, -1) > 9,
        "q_offset": torch.tensor([12]),
    },
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
@pytest.mark.parametrize("q_len", [130, 40, 1])
def test_dense_is_the_reference_that_never_skips(features, q_len, monkeypatch):
    generator = torch.Generator().manual_seed(q_len)
    q = torch.randn(2, 4, q_len, 16, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 2, 130, 16, generator=generator, dtype=torch.float64)
    v = torch.randn(2, 2, 130, 12, generator=generator, dtype=torch.float64)
    # Few elements a step, so that the rows are really cut into several steps.
    monkeypatch.setattr("hf_sparse_attention.backends.dense._MASK_ELEMENTS", 2 * 130 * 17)
    want = block_skip_attention(q, k, v, rule=NEVER, backend="reference", **features)
    got = block_skip_attention(q, k, v, rule=NEVER, backend="dense", **features)
    torch.testing.assert_close(got.out, want.out, rtol=1e-12, atol=1e-12)
    assert got.out.is_contiguous()


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_dense_takes_any_mask(kind):
    generator = torch.Generator().manual_seed(0)
    visible = torch.rand(2, 1, 9, 9, generator=generator) < 0.6
    visible[0, 0, 4] = False
    mask = visible if kind == "bool" else torch.zeros(2, 1, 9, 9).masked_fill(~visible, -math.inf)
    call = AttentionCall(Q, K, V, scale=0.3, causal=False, mask=mask)
    got = attend(call, NEVER, BlockGeometry())
    scores = (0.3 * Q @ K.repeat_interleave(2, 1).transpose(2, 3)).masked_fill(~visible, -math.inf)
    weights = scores.softmax(-1).nan_to_num()
    want = (weights @ V.repeat_interleave(2, 1)).transpose(1, 2)
    assert got.backend == "dense"
    torch.testing.assert_close(got.out, want)
    assert (got.out[0, 4] == 0).all() or kind == "additive"


def test_a_named_backend_never_falls_back():
    call = AttentionCall(Q, K, V, scale=1.0, mask=torch.ones(1, 1, 9, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="'reference' cannot run this call: an arbitrary mask"):
        attend(call, NEVER, BlockGeometry(), "reference")


def test_auto_says_once_why_a_backend_was_passed_over(monkeypatch, caplog):
    monkeypatch.setattr(functional, "_said", set())
    monkeypatch.setattr(BACKENDS["cpu"], "available", lambda: "it is off in this test")
    call = AttentionCall(Q, K, V, scale=1.0)
    with caplog.at_level(logging.WARNING, "hf_sparse_attention"):
        for _ in range(3):
            attend(call, SkipRule.blasst(0.5), BlockGeometry())
    said = [r.getMessage() for r in caplog.records]
    assert said == ["backend 'cpu' is not used: it is off in this test; 'reference' runs instead"]


@pytest.mark.usefixtures("cpu_kernel")
def test_dense_on_purpose_runs_the_fastest_that_can():
    def chosen(length: int, backend: str = "auto", **changes) -> str:
        q, k, v = (torch.randn(1, heads, length, 16) for heads in (4, 2, 2))
        call = AttentionCall(**{"q": q, "k": k, "v": v, "scale": 0.25, **changes})
        result = attend_dense(call, backend)
        expected = attend(call, NEVER, BlockGeometry(), "dense")
        torch.testing.assert_close(result.out, expected.out)
        return result.backend

    assert chosen(KERNEL_MIN_LENGTH) == "cpu"
    assert chosen(KERNEL_MIN_LENGTH, "cpu", window=9) == "cpu"
    assert chosen(KERNEL_MIN_LENGTH - 1) == "dense"
    assert chosen(KERNEL_MIN_LENGTH, "dense") == chosen(KERNEL_MIN_LENGTH, "reference") == "dense"
    mask = torch.ones(1, 1, KERNEL_MIN_LENGTH, KERNEL_MIN_LENGTH, dtype=torch.bool).tril()
    assert chosen(KERNEL_MIN_LENGTH, "cpu", mask=mask) == "dense"
    assert chosen(KERNEL_MIN_LENGTH, q=torch.randn(1, 4, 64, 16, requires_grad=True)) == "cpu"


def test_never_skipping_does_not_need_the_slow_reference(monkeypatch):
    monkeypatch.setattr(BACKENDS["cpu"], "available", lambda: "it is off in this test")
    call = AttentionCall(Q, K, V, scale=1.0)
    assert select(call, NEVER, BlockGeometry())[0].NAME == "dense"
    assert select(call, SkipRule.blasst(0.1), BlockGeometry())[0].NAME == "reference"


def test_available_backends_names_them_all():
    assert list(available_backends()) == ["cpu", "cuda", "triton", "reference", "dense"]
    assert available_backends()["reference"] is None
