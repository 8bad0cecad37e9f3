"""Triton's `append_int8_keys`, interpreted: the copy keeps the promises that the proof rests on."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton_source
from key_shapes import KEY_SHAPES
from test_int8_keys import assert_same
from test_triton_int8_keys import BLASST, GEOMETRY, copy_of, decode_call
from test_triton_kernels import run
from torch import Tensor

from hf_sparse_attention import Int8Keys
from hf_sparse_attention.backends import cpu
from hf_sparse_attention.types import AttentionCall, BlockGeometry

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities


def parts(copy: Tensor, size: int) -> tuple[Tensor, ...]:
    """The copy taken apart: mean `[B, H, D]`, k8 and then a, A, E `[B, H, L]`, in float64."""
    width = -(-size // 4) * 4
    mean = copy[:, :, 0, : 4 * size].contiguous().view(torch.float32)
    k8 = copy[:, :, 1:, : 64 * width].unflatten(-1, (width // 4, 64, 4)).permute(0, 1, 2, 4, 3, 5)
    k8 = k8.flatten(-2).flatten(2, 3)[..., :size].double() - 128
    bounds = copy[:, :, 1:, 64 * width :].contiguous().view(torch.float32).unflatten(-1, (3, 64))
    return mean.double(), k8, *(bounds[..., i, :].flatten(2).double() for i in range(3))


@pytest.mark.parametrize("change", KEY_SHAPES, ids=lambda f: f.__name__)
def test_the_copy_keeps_its_promises(change: Any) -> None:
    torch.manual_seed(1)
    k = change(torch.randn(1, 2, 100, 30))
    mean, k8, a, largest, left = parts(copy_of(k), 30)
    n = k.shape[2]
    k8, a, largest, left = k8[:, :, :n], a[:, :, :n], largest[:, :, :n], left[:, :, :n]
    assert k8.abs().max() <= 127
    assert ((a[..., None] * k8).norm(dim=-1) <= largest).all()
    missed = (k.double() - mean[:, :, None] - a[..., None] * k8).norm(dim=-1)
    known = a > 0
    assert (missed <= left)[known].all()
    assert known.all() == (change.__name__ != "huge") or known.any()
    tight = known & (a[..., None] * k8 != 0).any(-1)
    assert (left[tight] <= (a * 30**0.5)[tight]).all(), "and not by far too large a bound"


@pytest.mark.usefixtures("cpu_kernel")
def test_keys_enter_in_any_pieces() -> None:
    """And the CPU's kernel reads the same copy; its own holds nearly the same."""
    torch.manual_seed(2)
    k = torch.randn(2, 2, 700, 24).transpose(1, 2).contiguous().transpose(1, 2)
    append = triton_source.load().append_int8_keys
    copy = torch.zeros(2, 2, 1 + 12, 64 * 36, dtype=torch.uint8)
    for a, b in itertools.pairwise([0, 63, 64, 65, 130, 700]):
        append(k[:, :, a:b], torch.tensor([a]), copy)
    whole = torch.zeros_like(copy)
    whole[:, :, 0] = copy[:, :, 0]  # the mean is that of the first keys
    append(k, torch.tensor([0]), whole)
    assert torch.equal(copy, whole)
    append(k[:, :, :9], torch.tensor([764]), copy)  # what is beyond the end is left out
    append(k[:, :, :9], torch.tensor([-9]), copy)
    assert torch.equal(copy[:, :, :12], whole[:, :, :12])
    theirs = Int8Keys(2, 2, 768, 24)
    theirs.append(k[:, :, :63], 0)
    for mine, other in zip(parts(copy, 24), parts(theirs.data, 24), strict=True):
        upto = min(mine.shape[2], 63)
        torch.testing.assert_close(mine[:, :, :upto], other[:, :, :upto], atol=1.0, rtol=1e-3)
    call = AttentionCall(torch.randn(2, 4, 1, 24), k, k, scale=0.4, int8_keys=copy)
    got, want = (
        cpu.run(x, BLASST, BlockGeometry(), return_skips=True)
        for x in (call, replace(call, int8_keys=None))
    )
    assert_same(got, want)


def test_refusals() -> None:
    append = triton_source.load().append_int8_keys
    k, position = torch.randn(1, 2, 5, 16), torch.tensor([0])
    copy = torch.zeros(1, 2, 2, 64 * 28, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"position: expected one int64 on cpu, got torch.int32"):
        append(k, position.int(), copy)
    for bad in (copy[:, :1], copy.int(), copy.transpose(0, 1), copy[..., :-4], copy[:, :, :1]):
        with pytest.raises(ValueError, match=r"expected contiguous uint8 \[1, 2, at least 2, 1792"):
            append(k, position, bad)
    call = replace(decode_call(), int8_keys=copy)
    with pytest.raises(ValueError, match=r"int8_keys: expected contiguous uint8 \[1, 1, at least"):
        run(call, BLASST, GEOMETRY)
