"""`Int8Keys` and `Int8KeyCache` beyond the CPU's own kernel: who makes a copy, and who reads it.

GPUs are stood in for by Triton's kernels, interpreted on the CPU, and by the device "meta", on
which nothing can be read.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from test_int8_keys import assert_same
from tiny_models import build, token_ids
from torch import Tensor
from transformers import StaticCache

import hf_sparse_attention as hsa
from hf_sparse_attention import Int8KeyCache, Int8Keys, block_skip_attention, int8_keys
from hf_sparse_attention.backends import cpu, kernel, triton
from hf_sparse_attention.types import SkipRule

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.usefixtures("universal_variant"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of infinities
]


@pytest.fixture
def proved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each decode call proves; no cache is too small to be worth a look."""
    kernels = kernel.load("universal").triton_kernels
    find = kernels.launch.proved_blocks
    found: list[int] = []

    def spy(*args: Any) -> Tensor | None:
        bits = find(*args)
        if bits is not None:
            found.append(int(((bits[..., None] >> torch.arange(16)) & 1).sum()))
        return bits

    monkeypatch.setattr(kernels.prove, "LEAST_KEY_BYTES", 0)
    monkeypatch.setattr(kernels.launch, "proved_blocks", spy)
    return found


@pytest.fixture
def no_cpu_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available", lambda: "no compiler")


@pytest.mark.usefixtures("no_cpu_kernel")
def test_triton_makes_a_copy_and_reads_it(proved: list[int]) -> None:
    torch.manual_seed(3)
    q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 400, 16), torch.randn(1, 2, 400, 8)
    q[..., 0], k[..., 0] = 8.0, 20.0 * (torch.arange(400) < 30)
    copy = Int8Keys(1, 2, 500, 16)
    copy.append(k[:, :, :300], 0)
    copy.append(k[:, :, 300:], torch.tensor(300))
    got, want = (
        block_skip_attention(
            q, k, v, rule=SkipRule.blasst(0.01), backend="triton", int8_keys=x, return_skips=True
        )
        for x in (copy, None)
    )
    assert_same(got, want)
    assert proved == [10], "of 7 blocks a head, all but the first and the newest"


def generate(cache_type: type, backend: str) -> Tensor:
    model = build(tiny_models.llama, "blasst")
    hsa.set_sparse_attention(model, threshold_scale_factor=190.0, min_length=0, backend=backend)
    cache = cache_type(model.config, max_cache_len=220)
    return model.generate(
        token_ids(1, 200),
        past_key_values=cache,
        max_new_tokens=3,
        do_sample=False,
        disable_compile=True,
    )


@pytest.mark.usefixtures("no_cpu_kernel")
def test_a_model_generates_the_same_tokens(
    proved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_copy = generate(Int8KeyCache, "triton")
    assert sum(proved) > 0
    assert torch.equal(generate(StaticCache, "triton"), with_copy)


def test_opcheck() -> None:
    op = getattr(torch.ops, triton._namespace()).append_int8_keys.default
    copy = torch.zeros(1, 2, 2, 64 * 28, dtype=torch.uint8)
    torch.library.opcheck(op, (torch.randn(1, 2, 5, 16), torch.tensor([3]), copy))


def test_a_position_on_a_gpu_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    stand_in = SimpleNamespace(
        NAME="stand-in",
        available=lambda: None,
        append_int8_keys=lambda _k, position, _copy: calls.append(position),
    )
    monkeypatch.setitem(int8_keys._COPIERS, "meta", (stand_in,))
    copy = Int8Keys(1, 2, 600, 16, device="meta")
    k = torch.empty(1, 2, 5, 16, device="meta")
    copy.append(k, torch.empty(1, dtype=torch.int64, device="meta"))
    copy.append(k, 595)
    assert [x.device.type for x in calls] == ["meta", "meta"]
    for bad, position in ((k, 596), (k, -1), (k.expand(1, 2, 5, 16)[..., :8], 0)):
        with pytest.raises(ValueError, match=r"expected \[B, Hkv, n, D\] as in \[1, 2, 600, 16\]"):
            copy.append(bad, position)
    with pytest.raises(ValueError, match=r"on meta and at most 600 keys, got .* on cpu"):
        copy.append(torch.empty(1, 2, 5, 16), 0)
    with pytest.raises(ValueError, match=r"expected a copy of k \[1, 2, 5, 16\] on cpu"):
        copy.data_for(torch.empty(1, 2, 5, 16))


def test_where_nothing_makes_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="nothing makes them on meta: expected one of cpu, cuda"):
        Int8Keys(1, 2, 600, 16, device="meta")
    monkeypatch.setattr(cpu, "available", lambda: "no compiler")
    monkeypatch.setattr(triton, "available", lambda: "no Triton")
    with pytest.raises(RuntimeError, match="on cpu: cpu: no compiler; triton: no Triton"):
        Int8Keys(1, 2, 600, 16)
    cache = Int8KeyCache(build(tiny_models.llama).config, max_cache_len=64)
    cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    assert cache.layers[0].int8_keys is None, "it is a plain static cache"
