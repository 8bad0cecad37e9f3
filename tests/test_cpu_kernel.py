"""The CPU kernel against float64: every feature, hypothesis-driven shapes, and mutations of it."""

from __future__ import annotations

import math
from dataclasses import replace

import kernel_checks
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_sparse_attention.backends import cpu
from hf_sparse_attention.types import (
    LARGEST_LAMBDA,
    AttentionCall,
    AttentionResult,
    BlockGeometry,
    SkipRule,
)

pytestmark = pytest.mark.usefixtures("cpu_kernel")

GEOMETRIES = ["64x64", "64x128", "64x1", "16x8"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RULES = {
    "never": SkipRule.never(),
    "blasst": SkipRule.blasst(0.1),
    "bsfa": SkipRule.bsfa(2.0),
    "bsfa_any": SkipRule.bsfa(2.0, keep_sink=False),
    "budget": SkipRule.budget(0.1),
    "both": SkipRule(
        log_lambda=torch.full((1, 1), -0.5), max_dropped_mass=torch.full((1, 1), 0.05)
    ),
}
HEAD_SIZES = pytest.mark.parametrize(
    ("heads", "sizes"),
    [
        ((2, 2), (64, 64)),
        ((6, 2), (192, 128)),
        ((5, 1), (80, 80)),
        ((3, 3), (96, 96)),
        ((4, 2), (256, 256)),
        ((2, 1), (512, 512)),
        ((2, 1), (1, 1)),
        ((2, 1), (33, 7)),
        ((14, 2), (34, 130)),
    ],
    ids=str,
)


def run(call: AttentionCall, rule: SkipRule, geometry: BlockGeometry) -> AttentionResult:
    assert cpu.supports(call, rule, geometry) is None
    return cpu.run(call, rule, geometry, return_skips=True, return_dropped_mass=True)


def make_call(
    kind: str = "noise",
    shape: tuple[int, ...] = (2, 4, 2, 150, 220, 64),
    v_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    **options,
) -> AttentionCall:
    """A call of `shape` (B, Hq, Hkv, Lq, Lk, D)."""
    q, k = kernel_checks.structured(kind, *shape)
    v = torch.randn(*k.shape[:3], v_size or k.shape[3])
    scale = options.pop("scale", shape[-1] ** -0.5)
    return AttentionCall(q.to(dtype), k.to(dtype), v.to(dtype), scale=scale, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_rules(geometry: str, rule: str, dtype: torch.dtype) -> None:
    geometry = BlockGeometry.from_name(geometry)
    skipped = 0
    for kind in ("sink", "local"):
        for shape in ((1, 2, 1, 150, 420, 64), (1, 4, 2, 2, 700, 64)):
            call = make_call(kind, shape, dtype=dtype)
            result = run(call, RULES[rule], geometry)
            kernel_checks.check(call, RULES[rule], geometry, result)
            skipped += int(result.counts[..., 1].sum())
    assert (skipped > 0) == (rule != "never")


FEATURES = {
    "plain": {},
    "bidirectional": {"causal": False},
    "window": {"window": 70},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.tensor([3.0, -4.0, 30.0, -math.inf])},
    "holes": {"key_valid": torch.rand(2, 220, generator=torch.Generator().manual_seed(1)) < 0.6},
    "left_padding": {"key_valid": torch.arange(220) >= torch.tensor([[13], [130]])},
    "right_padding": {"key_valid": torch.arange(220) < torch.tensor([[220], [99]])},
    "no_keys": {"key_valid": torch.arange(220) < torch.tensor([[0], [200]])},
    "offset": {"q_offset": torch.tensor([0])},
    "offsets": {"q_offset": torch.tensor([-20, 60])},
    "offset_beyond": {"q_offset": torch.tensor([150, 500])},
    "bidirectional_window": {"causal": False, "window": 50},
    "negative_scale": {"scale": -0.2},
    "zero_scale": {"scale": 0.0},
    "all": {
        "window": 90,
        "softcap": 5.0,
        "sinks": torch.tensor([3.0, -4.0, 0.0, 1.0]),
        "key_valid": torch.arange(220) >= torch.tensor([[13], [50]]),
        "q_offset": torch.tensor([60, 70]),
    },
}


@pytest.mark.parametrize("order", ["sink_diagonal", "ascending", "descending"])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, order: str) -> None:
    for q_len, geometry in ((150, "64x64"), (70, "64x1"), (3, "64x64"), (3, "64x1")):
        call = make_call("sink", (2, 4, 2, q_len, 220, 32), **FEATURES[feature])
        geometry = replace(BlockGeometry.from_name(geometry, order), split_k=64)
        for rule in (SkipRule.blasst(0.2), SkipRule.bsfa(1.5), SkipRule.budget(0.2)):
            kernel_checks.check(call, rule, geometry, run(call, rule, geometry))


@HEAD_SIZES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sizes(dtype: torch.dtype, heads: tuple[int, int], sizes: tuple[int, int]) -> None:
    for q_len, kv_len in ((100, 130), (1, 777), (5, 65)):
        call = make_call("needle", (1, *heads, q_len, kv_len, sizes[0]), sizes[1], dtype)
        for geometry in (BlockGeometry(), BlockGeometry(64, 1)):
            rule = SkipRule.blasst(0.05)
            kernel_checks.check(call, rule, geometry, run(call, rule, geometry))


@st.composite
def problems(draw) -> tuple[AttentionCall, SkipRule, BlockGeometry]:
    """A call of any kind, with a rule of any shape, and a geometry."""
    batch, kv_heads, group = (draw(st.integers(1, 2)) for _ in range(3))
    q_len = draw(st.sampled_from([1, 2, 8, 9, 31, 64, 65, 100]))
    kv_len = q_len + draw(st.sampled_from([0, 0, 1, 63, 64, 150, 600]))
    head, v_head = draw(st.sampled_from([4, 16, 31, 64])), draw(st.sampled_from([5, 16, 64]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    causal = draw(st.booleans())
    options = {
        "causal": causal,
        "window": draw(st.none() | st.integers(1, 200)) if causal else None,
        "softcap": draw(st.none() | st.just(4.0)),
        "sinks": torch.randn(kv_heads * group) if draw(st.booleans()) else None,
        "dtype": draw(st.sampled_from(DTYPES)),
    }
    if draw(st.booleans()):
        valid = torch.rand(batch, kv_len) < draw(st.sampled_from([0.5, 0.9, 1.0]))
        valid[:, : draw(st.integers(0, kv_len))] = False
        options["key_valid"] = valid
    if draw(st.booleans()):
        options["q_offset"] = torch.randint(0, kv_len + 1, (draw(st.sampled_from([1, batch])),))
    kind = draw(st.sampled_from(["noise", "sink", "local", "needle"]))
    shape = (batch, kv_heads * group, kv_heads, q_len, kv_len, head)
    call = make_call(kind, shape, v_head, **options)
    geometry = BlockGeometry(
        draw(st.sampled_from([1, 17, 64])),
        draw(st.sampled_from([1, 4, 32, 64, 128, 192])),
        draw(st.sampled_from(["sink_diagonal", "sink_diagonal", "ascending", "descending"])),
        draw(st.sampled_from([64, 100, 1024])),
    )
    rows = q_len if call.phase == "decode" else -(-q_len // geometry.block_q)

    def condition(low: float, high: float, *sizes: int) -> torch.Tensor | None:
        if not draw(st.booleans()):
            return None
        full = draw(st.booleans())
        return low + (high - low) * torch.rand([n if full else 1 for n in sizes])

    heads = kv_heads * group
    rule = SkipRule(
        condition(-4.0, -0.01, batch, heads),
        condition(-2.0, 4.0, batch, heads, rows),
        condition(0.0, 0.5, batch, heads),
        draw(st.booleans()),
    )
    return call, rule, geometry


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems())
def test_any_call(problem: tuple[AttentionCall, SkipRule, BlockGeometry]) -> None:
    call, rule, geometry = problem
    kernel_checks.check(call, rule, geometry, run(call, rule, geometry))


@pytest.mark.parametrize("shape", [(1, 4, 2, 192, 192, 32), (1, 4, 2, 2, 500, 32)], ids=str)
def test_extreme_lambdas(shape: tuple[int, ...]) -> None:
    call, geometry = make_call("sink", shape), BlockGeometry(64, 1)
    assert run(call, SkipRule.blasst(0.0), geometry).counts[..., 1].sum() == 0
    most = run(call, SkipRule.blasst(LARGEST_LAMBDA), geometry)
    kernel_checks.check(call, SkipRule.blasst(1.0), geometry, most)
    assert most.counts[..., 1].sum() > most.counts[..., 0].sum() / 2
    # log(lambda) = 0 cannot come from SkipRule.blasst; the kernel clamps it all the same.
    clamped = run(call, SkipRule(log_lambda=torch.zeros(1, 1)), geometry)
    assert torch.equal(clamped.skips, most.skips)


def test_budget_zero_skips_nothing() -> None:
    call = make_call("sink")
    assert run(call, SkipRule.budget(0.0), BlockGeometry()).counts[..., 1].sum() == 0


@pytest.mark.parametrize("q_len", [150, 3])
@pytest.mark.parametrize("mutation", ["scale", "mask", "block", "skip_bit", "certificate", "value"])
def test_the_oracle_sees_mutations(mutation: str, q_len: int) -> None:
    geometry, rule = BlockGeometry(), SkipRule.blasst(0.1)
    valid = torch.arange(320) >= torch.tensor([[0], [70]])
    call = make_call("sink", (2, 4, 2, q_len, 320, 64), key_valid=valid)
    ran = call
    if mutation == "scale":
        ran = replace(call, scale=3 * call.scale)
    elif mutation == "mask":
        ran = replace(call, key_valid=None)
    elif mutation == "block":
        ran = replace(call, k=call.k.roll(geometry.block_k, 2), v=call.v.roll(geometry.block_k, 2))
    elif mutation == "value":
        ran = replace(call, v=call.v * (1 + 1e-3))
    result = run(ran, rule, geometry)
    if mutation == "skip_bit":
        result.skips[0, 0, -1, 0] ^= 0b100
    elif mutation == "certificate":
        assert result.dropped_mass.max() > 0
        result.dropped_mass[:] *= 1.01
    with pytest.raises(AssertionError):
        kernel_checks.check(call, rule, geometry, result)
    kernel_checks.check(call, rule, geometry, run(call, rule, geometry))


@pytest.mark.parametrize("q_len", [150, 2])
def test_a_padded_request_decides_as_it_would_alone(q_len: int) -> None:
    rule, geometry = SkipRule.blasst(0.1), BlockGeometry()
    alone = make_call("sink", (1, 2, 1, q_len, 300, 32))
    padded = replace(
        alone,
        k=torch.nn.functional.pad(alone.k, (0, 0, 77, 0)),
        v=torch.nn.functional.pad(alone.v, (0, 0, 77, 0)),
        key_valid=torch.arange(377)[None] >= 77,
    )
    a, b = run(alone, rule, geometry), run(padded, rule, geometry)
    assert torch.equal(a.out, b.out)
    assert torch.equal(a.skips, b.skips[..., : a.skips.shape[-1]])
    assert torch.equal(a.counts, b.counts)
    assert a.counts[..., 1].sum() > 0
