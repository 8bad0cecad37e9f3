"""The Triton kernels, interpreted on the CPU, against float64: decisions, numbers, edge cases."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from typing import Any

import gradient_checks
import pytest
import torch
import triton_source
from kernel_checks import check, structured
from torch import Tensor
from torch._subclasses import FakeTensorMode

from hf_sparse_attention.backends import reference
from hf_sparse_attention.types import (
    ORDERS,
    AttentionCall,
    AttentionResult,
    BlockGeometry,
    SkipRule,
    unpack_bits,
)

# Where NumPy, which interprets, warns: infinities are how a row that sees nothing is spelt.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ORDER_NUMBERS = {"ascending": 0, "sink_diagonal": 1, "descending": 2}

#: Rules under which the inputs below skip some blocks and keep some.
RULES = {
    "never": SkipRule.never(),
    "blasst": SkipRule.blasst(0.6),
    "bsfa": SkipRule.bsfa(6.0),
    "bsfa without sink": SkipRule.bsfa(5.5, keep_sink=False),
    "budget": SkipRule.budget(20.0),
    "blasst and budget": replace(SkipRule.blasst(0.9), max_dropped_mass=torch.full((1, 1), 10.0)),
}


def run(
    call: AttentionCall, rule: SkipRule, geometry: BlockGeometry, **wanted: bool
) -> AttentionResult:
    def float32(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.float()

    results = triton_source.load().forward(
        call.q,
        call.k,
        call.v,
        call.key_valid,
        call.q_offset,
        float32(call.sinks),
        float32(rule.log_lambda),
        float32(rule.block_threshold),
        float32(rule.max_dropped_mass),
        call.scale,
        call.causal,
        call.window or 0,
        call.softcap or 0.0,
        geometry.block_q,
        geometry.block_k,
        ORDER_NUMBERS[geometry.order],
        geometry.split_k,
        rule.keep_sink,
        wanted.get("skips", True),
        wanted.get("dropped_mass", True),
        call.int8_keys,
    )
    return AttentionResult(*results)


def make_call(
    kind: str = "needle",
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    q_len: int = 150,
    kv_len: int = 150,
    head_size: int = 32,
    v_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    **features: Any,
) -> AttentionCall:
    torch.manual_seed(7)
    q, k = structured(kind, batch, heads, kv_heads, q_len, kv_len, head_size)
    v = torch.randn(batch, kv_heads, kv_len, v_size or head_size)
    if features.pop("with_sinks", False):
        features["sinks"] = torch.randn(heads)
    return AttentionCall(q.to(dtype), k.to(dtype), v.to(dtype), scale=head_size**-0.5, **features)


def padded(batch: int, kv_len: int) -> Tensor:
    """The first request is padded left, the last right and with a hole."""
    valid = torch.ones(batch, kv_len, dtype=torch.bool)
    valid[0, : kv_len // 4] = False
    valid[-1, -kv_len // 8 :] = False
    valid[-1, kv_len // 3 : kv_len // 3 + 40] = False
    return valid


CALLS: dict[str, dict[str, Any]] = {
    "odd length": {"q_len": 131, "kv_len": 131},
    "shorter than a block": {"q_len": 9, "kv_len": 9},
    "chunk": {"q_len": 70, "kv_len": 190},
    "bidirectional": {"causal": False, "kind": "noise"},
    "padding": {"batch": 2, "key_valid": padded(2, 150)},
    "window": {"window": 50, "kind": "local"},
    "softcap and sinks": {"softcap": 8.0, "with_sinks": True},
    "group of 4": {"heads": 4, "kv_heads": 1, "q_len": 80, "kv_len": 80},
    "static cache": {"q_offset": torch.tensor([20]), "q_len": 70, "kv_len": 150},
    "more queries than keys": {"q_len": 120, "kv_len": 80},
    "decode": {"heads": 4, "kv_heads": 2, "q_len": 1, "kv_len": 300},
    "decode of 3, padded": {"batch": 2, "q_len": 3, "kv_len": 150, "key_valid": padded(2, 150)},
    "decode, windowed": {"q_len": 2, "kv_len": 300, "window": 90, "with_sinks": True},
    "decode, static cache": {"q_len": 1, "kv_len": 300, "q_offset": torch.tensor([130])},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CALLS)
def test_decisions_and_numbers(name: str, rule: str) -> None:
    call = make_call(**CALLS[name])
    geometry = BlockGeometry(32, 32, split_k=64)
    check(call, RULES[rule], geometry, run(call, RULES[rule], geometry))


def test_the_inputs_above_do_skip() -> None:
    """Else the tests above would prove little. The reference decides as they do, and is quicker."""
    for rule in set(RULES) - {"never"}:
        shares = []
        for features in CALLS.values():
            blocks = BlockGeometry(32, 32, split_k=64)
            result = reference.run(make_call(**features), RULES[rule], blocks)
            assert result.counts is not None
            visited, skipped = result.counts.sum(dim=(0, 1)).tolist()
            shares.append(skipped / max(visited, 1))
        assert sum(0 < share < 1 for share in shares) >= 6, (rule, shares)


@pytest.mark.parametrize(
    ("geometry", "order"), list(itertools.product(["64x64", "64x128", "128x64"], ORDERS))
)
def test_geometries(geometry: str, order: Any) -> None:
    call = make_call(q_len=300, kv_len=300)
    blocks = BlockGeometry.from_name(geometry, order)
    for rule in ("blasst", "bsfa", "budget"):
        check(call, RULES[rule], blocks, run(call, RULES[rule], blocks))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("q_len", [130, 1], ids=["prefill", "decode"])
def test_low_precision(dtype: torch.dtype, q_len: int) -> None:
    call = make_call(q_len=q_len, kv_len=130, dtype=dtype)
    geometry = BlockGeometry(64, 64, split_k=64)
    result = run(call, RULES["blasst"], geometry)
    check(call, RULES["blasst"], geometry, result, weights_dtype=dtype)


@pytest.mark.parametrize("sizes", [(80, 80), (96, 64), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("q_len", [70, 1], ids=["prefill", "decode"])
def test_head_sizes(sizes: tuple[int, int], q_len: int) -> None:
    call = make_call(q_len=q_len, kv_len=100, head_size=sizes[0], v_size=sizes[1])
    geometry = BlockGeometry(32, 32)
    check(call, RULES["blasst"], geometry, run(call, RULES["blasst"], geometry))


def test_thresholds_by_request_head_and_row() -> None:
    call = make_call(batch=2, heads=2, kv_heads=2)
    rule = SkipRule(
        log_lambda=torch.tensor([[-0.2, -5.0], [-1.0, -30.0]]),
        block_threshold=torch.linspace(1.0, 6.0, 2 * 2 * 5).reshape(2, 2, 5),
    )
    geometry = BlockGeometry(32, 32)
    check(call, rule, geometry, run(call, rule, geometry))


def test_any_strides() -> None:
    """transformers hands over transposed views."""
    call = make_call()
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (call.q, call.k, call.v)]
    geometry = BlockGeometry(32, 32)
    expected = run(call, RULES["blasst"], geometry)
    found = run(replace(call, q=views[0], k=views[1], v=views[2]), RULES["blasst"], geometry)
    assert torch.equal(found.out, expected.out)


def test_lambda_of_one_never_drops_the_largest() -> None:
    call = make_call()
    rule = SkipRule(log_lambda=torch.full((1, 1), 3.0))
    geometry = BlockGeometry(32, 32)
    check(call, rule, geometry, run(call, rule, geometry))


@pytest.mark.parametrize("rule", ["blasst", "bsfa", "budget"])
@pytest.mark.parametrize("q_len", [100, 1], ids=["prefill", "decode"])
def test_nan_is_never_skipped(rule: str, q_len: int) -> None:
    call = make_call(q_len=q_len, kv_len=140)
    call.k[:, :, 40] = torch.nan
    geometry = BlockGeometry(32, 32)
    result = run(call, RULES[rule], geometry)
    assert result.skips is not None
    assert not unpack_bits(result.skips, 5)[..., 1].any()
    # Rows that see key 40: all of them, as the query rows are the last ones.
    assert result.out[:, -1].isnan().all()


def test_what_is_not_asked_for_changes_nothing() -> None:
    call = make_call()
    geometry = BlockGeometry(32, 32)
    full = run(call, RULES["blasst"], geometry)
    bare = run(call, RULES["blasst"], geometry, skips=False, dropped_mass=False)
    assert torch.equal(bare.out, full.out)
    assert full.counts is not None
    assert bare.counts is not None
    assert torch.equal(bare.counts, full.counts)
    assert full.skips is not None
    assert unpack_bits(full.skips, 5).sum() == full.counts[..., 1].sum()


@pytest.mark.parametrize("rule", ["never", "blasst", "bsfa", "budget"])
@pytest.mark.parametrize("name", CALLS)
def test_gradients(name: str, rule: str) -> None:
    """Those of the masked dense graph in float64, over the blocks that this forward kept."""
    check_gradients(make_call(**CALLS[name]), RULES[rule], BlockGeometry(32, 32, split_k=64))


def check_gradients(call: AttentionCall, rule: SkipRule, geometry: BlockGeometry) -> None:
    result = run(call, rule, geometry)
    assert result.lse is not None
    dout, dlse = torch.randn_like(result.out), torch.randn_like(result.lse)
    found = triton_source.load().backward(
        dout,
        dlse,
        call.q,
        call.k,
        call.v,
        result.out,
        result.lse,
        result.skips,
        call.key_valid,
        call.q_offset,
        call.sinks,
        call.scale,
        call.causal,
        call.window or 0,
        call.softcap or 0.0,
        geometry.block_q,
        geometry.block_k,
    )
    gradients = dict(zip(("q", "k", "v", "sinks"), found, strict=True))
    if call.sinks is None:
        assert gradients.pop("sinks").numel() == 0
    gradient_checks.check(call, geometry, result, gradients, dout, dlse)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, "float32, bfloat16 or float16, got torch.float64"),
        ({"head_size": 320}, "head sizes up to 256, got 320"),
    ],
    ids=["dtype", "head size"],
)
def test_refused_with_a_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(make_call(q_len=9, kv_len=9, **changes), RULES["never"], BlockGeometry(32, 32))
    with pytest.raises(ValueError, match="block_k: expected 16, 32, 64 or 128, got 1"):
        run(make_call(q_len=9, kv_len=9), RULES["never"], BlockGeometry(64, 1))


def test_rows_may_vote_by_a_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do where Triton 3.6 and 3.7 cannot compile the other way."""
    kernels = triton_source.load()
    geometry = BlockGeometry(32, 32)
    for name in ("chunk", "padding"):
        call = make_call(**CALLS[name])
        for rule in ("blasst", "budget"):
            monkeypatch.setattr(kernels.launch, "votes_by_scan", lambda _: False)
            expected = run(call, RULES[rule], geometry)
            monkeypatch.setattr(kernels.launch, "votes_by_scan", lambda _: True)
            found = run(call, RULES[rule], geometry)
            assert torch.equal(found.out, expected.out)
            assert torch.equal(found.skips, expected.skips)
            assert torch.equal(found.counts, expected.counts)


@pytest.mark.parametrize(
    ("triton", "capability", "expected"),
    [("3.6.0", 10, True), ("3.7.1", 10, True), ("3.8.0", 10, False), ("3.6.0", 9, False)],
)
def test_where_rows_vote_by_a_scan(
    monkeypatch: pytest.MonkeyPatch, triton: str, capability: int, expected: bool
) -> None:
    start = triton_source.load().start
    monkeypatch.setattr(start.triton, "__version__", triton)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (capability, 0))
    assert start.votes_by_scan.__wrapped__(torch.device("cuda")) is expected
    assert start.votes_by_scan.__wrapped__(torch.device("cpu")) is False


@pytest.mark.parametrize("sizes", [(80, 80), (64, 64), (192, 128), (256, 256)], ids=str)
def test_gradients_of_head_sizes(sizes: tuple[int, int]) -> None:
    call = make_call(q_len=70, kv_len=100, head_size=sizes[0], v_size=sizes[1])
    geometry = BlockGeometry(32, 32)
    check_gradients(call, RULES["blasst"], geometry)


def test_gradients_in_bfloat16() -> None:
    call = make_call(q_len=100, kv_len=130, head_size=64, dtype=torch.bfloat16)
    check_gradients(call, RULES["blasst"], BlockGeometry(64, 64))


@pytest.mark.parametrize("name", ["padding", "decode of 3, padded", "decode, static cache"])
def test_nothing_waits_for_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the kernels no value is looked at: fake tensors, which have none, would refuse."""
    kernels = triton_source.load()
    started: list[str] = []
    monkeypatch.setattr(kernels.launch, "start", lambda x, *_, **__: started.append(x.fn.__name__))
    backward = sys.modules[f"{kernels.__name__}.launch_backward"]
    monkeypatch.setattr(backward, "start", lambda x, *_, **__: started.append(x.fn.__name__))
    monkeypatch.setattr(kernels.launch, "join_kernel", NoKernel())
    real = make_call(with_sinks=True, **CALLS[name])
    with FakeTensorMode() as mode:
        tensors = {x: mode.from_tensor(y) for x, y in vars(real).items() if torch.is_tensor(y)}
        call = replace(real, **tensors)
        rule = SkipRule(
            torch.full((1, 1), -1.0), torch.full((1, 1, 1), 2.0), torch.full((1, 1), 0.1)
        )
        geometry = BlockGeometry(32, 32, split_k=64)
        result = run(call, rule, geometry)
        kernels.backward(
            *(result.out, result.lse, call.q, call.k, call.v, result.out, result.lse),
            *(result.skips, call.key_valid, call.q_offset, call.sinks, call.scale),
            *(call.causal, 0, 0.0, 32, 32),
        )
    assert started == [f"{call.phase}_kernel", "dq_kernel", "dkv_kernel"]


class NoKernel:
    """Is started and does nothing."""

    def __getitem__(self, _grid: Any) -> Any:
        return lambda *_, **__: None
