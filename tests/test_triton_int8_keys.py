"""The int8 copy of K in the Triton kernels, interpreted: it proves only what the exact test finds.

Decode with the copy must give the bits that it gives without, and must not read what is proved.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import triton_source
from kernel_checks import structured
from key_shapes import KEY_SHAPES, plain
from test_int8_keys import assert_same, on_the_edge
from test_triton_kernels import padded, run
from torch import Tensor

from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, SkipRule

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities

BLASST, BSFA = SkipRule.blasst(0.01), SkipRule.bsfa(4.0)
GEOMETRY = BlockGeometry(32, 32, split_k=128)


@pytest.fixture(autouse=True)
def prove(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with a copy of any size worth a look."""
    module = __import__(triton_source.load().__name__ + ".prove", fromlist=["prove"])
    monkeypatch.setattr(module, "LEAST_KEY_BYTES", 0)
    return module


def copy_of(k: Tensor, length: int | None = None) -> Tensor:
    """A copy of all of `k`, with room for `length` keys."""
    batch, heads, kv_len, size = k.shape
    chunks = -(-(length or kv_len) // 64)
    copy = torch.zeros(batch, heads, 1 + chunks, 64 * (-(-size // 4) * 4 + 12), dtype=torch.uint8)
    triton_source.load().append_int8_keys(k, torch.tensor([0]), copy)
    return copy


def decode_call(
    *,
    heads: int = 2,
    kv_heads: int = 1,
    q_len: int = 1,
    kv_len: int = 230,
    size: int = 32,
    dtype: torch.dtype = torch.float32,
    strong: int = 96,
    seed: int = 0,
    **features: Any,
) -> AttentionCall:
    """The keys of every third block outweigh the others by far, from the first one on."""
    torch.manual_seed(seed)
    batch = features.pop("batch", 1)
    q, k = structured("noise", batch, heads, kv_heads, q_len, kv_len, size)
    q[..., 0], k[..., 0] = 8.0, 20.0 * (torch.arange(kv_len) % strong < 32)
    v = torch.randn(batch, kv_heads, kv_len, 16)
    if features.pop("with_sinks", False):
        features["sinks"] = torch.randn(heads)
    return AttentionCall(q.to(dtype), k.to(dtype), v.to(dtype), scale=0.1, **features)


def pair(
    call: AttentionCall, rule: SkipRule, geometry: BlockGeometry, copy: Tensor | None = None
) -> tuple[AttentionResult, AttentionResult]:
    """The call with the copy, and without."""
    copied = replace(call, int8_keys=copy_of(call.k) if copy is None else copy)
    return tuple(run(x, rule, geometry, dropped_mass=False) for x in (copied, call))


class _EnoughError(Exception):
    """There is no need to decode."""


def bits_of(prove: ModuleType, call: AttentionCall, rule: SkipRule, block_k: int) -> Tensor | None:
    """Which blocks are proved: bool `[B, Hkv, Lq, NK]`, or None if nothing is tried."""
    found: list[Tensor | None] = []
    launch = __import__(triton_source.load().__name__ + ".launch", fromlist=["launch"])

    def stop(*args: Any) -> None:
        found.append(prove.proved_blocks(*args))
        raise _EnoughError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "proved_blocks", stop)
        with pytest.raises(_EnoughError):
            run(call, rule, BlockGeometry(block_k, block_k), dropped_mass=False)
    words = found[0]
    if words is None:
        return None
    blocks = -(-call.k.shape[2] // block_k)
    bits = (words[..., None] >> torch.arange(16)) & 1
    return bits.flatten(-2)[..., :blocks].bool()


LOW = torch.bfloat16
CASES: dict[str, dict[str, Any]] = {
    "one head": {"heads": 1, "kv_len": 223},
    "group of 3, bfloat16": {"heads": 3, "dtype": LOW, "size": 80},
    "two groups, float16": {"heads": 4, "kv_heads": 2, "dtype": torch.float16, "size": 16},
    "head size 30, sinks": {"size": 30, "with_sinks": True},
    "two positions": {"q_len": 2, "kv_len": 227},
    "padding": {"batch": 2, "key_valid": padded(2, 230)},
    "window": {"window": 150, "with_sinks": True},
    "static cache": {"q_offset": torch.tensor([201]), "dtype": LOW},
    "bidirectional": {"causal": False},
}


@pytest.mark.parametrize("name", CASES)
def test_the_copy_changes_nothing(name: str, prove: ModuleType) -> None:
    call = decode_call(**CASES[name])
    if name == "static cache":  # whose slots may hold anything until they are written
        call.k[:, :, 202:] = math.nan
    rule = BSFA if name in ("window", "two positions", "bidirectional") else BLASST
    copied = replace(call, int8_keys=copy_of(call.k))
    assert_same(*pair(call, rule, GEOMETRY, copied.int8_keys))
    assert bits_of(prove, copied, rule, 32).any()


def test_larger_blocks_and_several_words(prove: ModuleType) -> None:
    call = decode_call(kv_len=1100, heads=1, strong=320)
    copied = replace(call, int8_keys=copy_of(call.k))
    assert_same(*pair(call, BLASST, BlockGeometry(64, 64), copied.int8_keys))
    proved = bits_of(prove, copied, BLASST, 64)
    assert proved[..., :16].any()
    assert proved[..., 16:17].any(), "in the second word"
    assert bits_of(prove, copied, BLASST, 128).any()


def test_both_rules_must_agree(prove: ModuleType) -> None:
    call = decode_call()
    copied = replace(call, int8_keys=copy_of(call.k))
    for absolute, any_proved in ((4.0, True), (-10.0, False), (math.nan, False), (math.inf, False)):
        rule = replace(BLASST, block_threshold=torch.full((1, 1, 1), absolute))
        assert bool(bits_of(prove, copied, rule, 32).any()) == any_proved, absolute
    assert not bits_of(prove, copied, SkipRule.blasst(0.0), 32).any()


@pytest.mark.parametrize("dtype", [torch.float32, LOW], ids=str)
def test_what_is_proved_is_not_read(dtype: torch.dtype, prove: ModuleType) -> None:
    call = decode_call(dtype=dtype)
    copied = replace(call, int8_keys=copy_of(call.k))
    want = run(call, BLASST, GEOMETRY, dropped_mass=False)
    proved = bits_of(prove, copied, BLASST, 32)[0, 0, 0]
    assert proved.sum() >= 4
    call.k[:, :, proved.repeat_interleave(32)[: call.k.shape[2]]] = math.nan
    assert_same(run(copied, BLASST, GEOMETRY, dropped_mass=False), want)
    assert run(call, BLASST, GEOMETRY).out.isnan().any(), "without the copy K is read"


def check_edges(prove: ModuleType, change: Any, dtype: torch.dtype, seed: int) -> int:
    """Thresholds beside the blocks' own maxima; returns how many blocks were proved.

    Each row's threshold is a block's largest score, or one of its neighbours, so that the decision
    of that block hangs on the last bits. Nothing may be proved of a block that a row must keep.
    """
    torch.manual_seed(seed)
    kind = ("noise", "sink", "needle")[seed % 3]
    q, k = structured(kind, 1, 6, 3, 1, 192, (16, 30, 64)[seed % 3])
    call = AttentionCall(q.to(dtype), change(k).to(dtype), k, scale=0.4)
    call = replace(call, v=call.k, int8_keys=copy_of(call.k))
    rule = on_the_edge(call, BlockGeometry(32, 32))
    keys = call.k.float().repeat_interleave(2, 1)
    tops = (0.4 * call.q.float() @ keys.transpose(2, 3)).unflatten(3, (6, 32)).amax(-1)
    kept = (tops >= rule.block_threshold[..., None]).unflatten(1, (3, 2)).any(2)
    proved = bits_of(prove, call, rule, 32)
    assert not (proved & kept).any()
    return int(proved.sum())


@pytest.mark.parametrize("change", KEY_SHAPES, ids=lambda f: f.__name__)
def test_the_edge(change: Any, prove: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "_cost", lambda *_: 0.0)  # it never gives up
    check_edges(prove, change, torch.float32, KEY_SHAPES.index(change))


def test_the_edge_in_low_precision_and_with_margins_removed(
    prove: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above proves something, and would see a bound that is too small."""
    monkeypatch.setattr(prove, "_cost", lambda *_: 0.0)
    assert sum(check_edges(prove, plain, LOW, seed) for seed in range(2)) > 0
    norm = prove.int8_norm
    monkeypatch.setattr(prove, "int8_norm", lambda squares, *rest: norm(squares, *rest) * 0.0)
    with pytest.raises(AssertionError):
        sum(check_edges(prove, plain, LOW, seed) for seed in range(6))


def test_a_seed_computed_otherwise_has_a_margin(prove: ModuleType) -> None:
    """Where prove's running max exceeds decode's by what rounding allows, no more is proved."""
    call = decode_call(kv_len=190, strong=10**6)
    q, k = call.q.double(), call.k.double()
    tops = (q @ k.transpose(2, 3))[0, :, 0] * call.scale
    seed = torch.cat([tops[:, :32], tops[:, 160:]], 1).amax(1)
    block = tops[:, 32:64].amax(1)
    for ulps in (1, 16):
        gap = (block - seed).float() * (1 - ulps * 2.0**-24)
        rule = SkipRule(log_lambda=gap[None])
        copied = replace(call, int8_keys=copy_of(call.k))
        assert not bits_of(prove, copied, rule, 32)[0, 0, 0, 1], "so near to the bound"


def test_it_gives_up_where_it_does_not_pay(prove: ModuleType) -> None:
    """Two blocks in sixteen are scanned in vain; the others would have been proved."""
    call = decode_call(kv_len=500, strong=10**6, dtype=LOW)
    call.k[:, :, 32:96, 0] = 20.0
    copied = replace(call, int8_keys=copy_of(call.k))
    assert not bits_of(prove, copied, BLASST, 32).any()
    assert bits_of(prove, replace(copied, k=call.k.float(), q=call.q.float()), BLASST, 32).any(), (
        "beside a K of twice the bytes it goes on"
    )


@pytest.mark.parametrize(
    ("options", "rule", "order"),
    [
        ({"softcap": 5.0}, BLASST, "sink_diagonal"),
        ({"scale": -0.1}, BLASST, "sink_diagonal"),
        ({}, SkipRule.budget(0.1), "sink_diagonal"),
        ({}, SkipRule.never(), "sink_diagonal"),
        ({}, BLASST, "ascending"),
    ],
    ids=["softcap", "scale", "budget", "no rule", "order"],
)
def test_where_it_stays_out(
    options: dict, rule: SkipRule, order: Any, prove: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = replace(decode_call(kv_len=100), **options)
    monkeypatch.setattr(prove, "prove_kernel", None)  # it would fail
    assert_same(*pair(call, rule, BlockGeometry(32, 32, order=order)))


def test_the_certificate_and_small_caches_are_left_alone(
    prove: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = decode_call(kv_len=100)
    copied = replace(call, int8_keys=copy_of(call.k))
    monkeypatch.setattr(prove, "prove_kernel", None)
    got, want = (run(x, BLASST, GEOMETRY, dropped_mass=True).dropped_mass for x in (copied, call))
    assert torch.equal(got, want)
    monkeypatch.setattr(prove, "LEAST_KEY_BYTES", 1 << 20)
    assert bits_of(prove, copied, BLASST, 32) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("where", ["q", "a key", "sink key"])
def test_what_is_not_finite_is_not_proved(where: str, bad: float, prove: ModuleType) -> None:
    call = decode_call(kv_len=130)
    (call.q if where == "q" else call.k)[0, 0, {"q": 0, "a key": 40, "sink key": 3}[where], 5] = bad
    copied = replace(call, int8_keys=copy_of(call.k))
    proved = bits_of(prove, copied, BLASST, 32)[0, 0, 0]
    assert not proved[1]
    assert proved.any() == (where == "a key"), "q and the seed concern all blocks"
