"""The reference backend against the plain-Python oracle, its invariants, and mutations of it."""

import math
from dataclasses import replace

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_sparse_attention.backends import reference
from hf_sparse_attention.functional import block_skip_attention
from hf_sparse_attention.types import (
    AttentionCall,
    BlockGeometry,
    SkipRule,
    pack_bits,
    unpack_bits,
)

FEW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def problems(draw) -> tuple[AttentionCall, dict, BlockGeometry]:
    """A small call of any kind, the oracle's rule, and a geometry."""
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    q_len = draw(st.integers(1, 13))
    extra = draw(st.sampled_from([0, 0, 1, 7, 20]))
    causal = draw(st.booleans())
    kv_len = q_len + extra
    batch, head, v_head = draw(st.integers(1, 2)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int, factor: float = 1.0) -> Tensor:
        return factor * torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads = kv_heads * group
    key_valid = q_offset = None
    if draw(st.booleans()):
        key_valid = torch.rand(batch, kv_len, generator=generator) < draw(
            st.sampled_from([0.0, 0.5, 0.9])
        )
        key_valid[:, : draw(st.integers(0, kv_len))] = False
    if causal and draw(st.booleans()):
        q_offset = torch.randint(0, extra + 1, (draw(st.sampled_from([1, batch])),))
    call = AttentionCall(
        normal(batch, heads, q_len, head, factor=3.0),
        normal(batch, kv_heads, kv_len, head),
        normal(batch, kv_heads, kv_len, v_head),
        scale=draw(st.sampled_from([0.5, 1.0])),
        causal=causal,
        q_offset=q_offset,
        key_valid=key_valid,
        window=draw(st.none() | st.integers(1, 9)) if causal else None,
        softcap=draw(st.none() | st.just(2.0)),
        sinks=normal(heads) if draw(st.booleans()) else None,
    )
    block_k = draw(st.sampled_from([1, 2, 4]))
    geometry = BlockGeometry(
        draw(st.sampled_from([1, 3, 4])),
        block_k,
        draw(st.sampled_from(["sink_diagonal", "ascending", "descending"])),
        split_k=block_k * draw(st.sampled_from([1, 2, 3])),
    )
    n_rows = q_len if call.phase == "decode" else -(-q_len // geometry.block_q)
    rule: dict = {}
    if draw(st.booleans()):
        rule["lam"] = torch.rand(heads, generator=generator).tolist()
    if draw(st.booleans()):
        rule["threshold"] = normal(heads, n_rows, factor=2.0).tolist()
        rule["keep_sink"] = draw(st.booleans())
    if draw(st.booleans()):
        rule["eps"] = (2 * torch.rand(heads, generator=generator)).tolist()
    return call, rule, geometry


def to_skip_rule(rule: dict) -> SkipRule:
    def tensor(name: str) -> Tensor | None:
        return torch.tensor(rule[name], dtype=torch.float32)[None] if name in rule else None

    lam = tensor("lam")
    return SkipRule(
        log_lambda=None if lam is None else lam.log(),
        block_threshold=tensor("threshold"),
        max_dropped_mass=tensor("eps"),
        keep_sink=rule.get("keep_sink", True),
    )


def rounded(rule: dict) -> dict:
    """The oracle's rule with the values that fit a float32, as the SkipRule holds them."""
    skip_rule = to_skip_rule(rule)
    exact = dict(rule)
    if "lam" in rule:
        exact["lam"] = skip_rule.log_lambda[0].double().exp().tolist()
    if "threshold" in rule:
        exact["threshold"] = skip_rule.block_threshold[0].double().tolist()
    if "eps" in rule:
        exact["eps"] = skip_rule.max_dropped_mass[0].double().tolist()
    return exact


def mismatch(call: AttentionCall, rule: dict, geometry: BlockGeometry, run=reference.run) -> str:
    """What differs between `run` and the oracle: a sentence, or "" if nothing does."""
    got = run(call, to_skip_rule(rule), geometry, return_skips=True, return_dropped_mass=True)
    decode = call.phase == "decode"
    n_blocks = -(-call.k.shape[2] // geometry.block_k)
    bits = unpack_bits(got.skips, n_blocks)
    for b in range(call.q.shape[0]):
        offset = None
        if call.q_offset is not None:
            offset = int(call.q_offset.expand(call.q.shape[0])[b])
        out, lse, dropped, skipped, visited = oracle.attention(
            call.q[b].tolist(),
            call.k[b].tolist(),
            call.v[b].tolist(),
            scale=call.scale,
            causal=call.causal,
            q_offset=offset,
            key_valid=None if call.key_valid is None else call.key_valid[b].tolist(),
            window=call.window,
            softcap=call.softcap,
            sinks=None if call.sinks is None else call.sinks.tolist(),
            rule=rounded(rule),
            block_q=geometry.block_q,
            block_k=geometry.block_k,
            order=geometry.order,
            split_k=geometry.split_k,
            decode=decode,
        )
        if {tuple(x) for x in bits[b].nonzero().tolist()} != skipped:
            return f"skips of request {b}"
        repeat = call.group if decode else 1
        if int(got.counts[b, :, 0].sum()) != repeat * len(visited):
            return f"blocks visited in request {b}"
        if int(got.counts[b, :, 1].sum()) != repeat * len(skipped & visited):
            return f"blocks skipped in request {b}"
        for name, mine, theirs in (
            ("out", got.out[b].transpose(0, 1), out),
            ("lse", got.lse[b], lse),
            ("dropped_mass", got.dropped_mass[b], dropped),
        ):
            theirs = torch.tensor(theirs, dtype=torch.float64)
            if not torch.allclose(mine, theirs, rtol=1e-10, atol=1e-10):
                return f"{name} of request {b}"
    return ""


@given(problems())
@settings(FEW, max_examples=120)
def test_reference_is_the_oracle(problem):
    assert mismatch(*problem) == ""


def structured(seed: int = 0) -> tuple[AttentionCall, BlockGeometry]:
    """A call in which blocks really skip: a sink, a local band and noise."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 2, 24, 8, generator=generator, dtype=torch.float64)
    k = torch.randn(1, 1, 24, 8, generator=generator, dtype=torch.float64)
    v = torch.randn(1, 1, 24, 8, generator=generator, dtype=torch.float64)
    k += q.mean(1, keepdim=True)
    q[..., 0], k[..., 0] = 2.0, 0.0
    k[:, :, 0, 0] = 5.0
    return AttentionCall(q, k, v, scale=0.7), BlockGeometry(4, 4)


def scale_times_three(call, rule, geometry, **kw):
    return reference.run(replace(call, scale=3 * call.scale), rule, geometry, **kw)


def mask_dropped(call, rule, geometry, **kw):
    return reference.run(replace(call, causal=False), rule, geometry, **kw)


def mask_off_by_one(call, rule, geometry, **kw):
    offset = torch.tensor([call.k.shape[2] - call.q.shape[2] - 1])
    return reference.run(replace(call, q_offset=offset), rule, geometry, **kw)


def window_off_by_one(call, rule, geometry, **kw):
    return reference.run(replace(call, window=10), rule, geometry, **kw)


def block_off_by_one(call, rule, geometry, **kw):
    q_len = call.q.shape[2]
    first = torch.ones(1, q_len, dtype=torch.bool)
    first[:, 0] = False
    return reference.run(replace(call, key_valid=first), rule, geometry, **kw)


def other_order(call, rule, geometry, **kw):
    return reference.run(call, rule, BlockGeometry(4, 4, "descending"), **kw)


def threshold_nudged(call, rule, geometry, **kw):
    nudged = SkipRule(log_lambda=rule.log_lambda + 1.0)
    return reference.run(call, nudged, geometry, **kw)


@pytest.mark.parametrize(
    "mutant",
    [
        scale_times_three,
        mask_dropped,
        mask_off_by_one,
        window_off_by_one,
        block_off_by_one,
        other_order,
        threshold_nudged,
    ],
)
def test_the_oracle_catches(mutant):
    call, geometry = structured()
    if mutant is window_off_by_one:
        call = replace(call, window=9)
    rule = {"lam": [0.3, 0.05]}
    assert mismatch(call, rule, geometry) == ""
    assert mismatch(call, rule, geometry, mutant) != ""


@given(problems())
@FEW
def test_certificate_bounds_the_mass_and_the_error(problem):
    call, rule, geometry = problem
    got = reference.run(call, to_skip_rule(rule), geometry, return_dropped_mass=True)
    exact = reference.run(call, SkipRule.never(), geometry)
    kept = (got.lse - exact.lse).exp().nan_to_num(nan=1.0)  # share of the mass that is left
    assert ((1 - kept) <= got.dropped_mass + 1e-9).all()
    largest = call.v.norm(dim=-1).amax() if call.v.numel() else torch.tensor(0.0)
    error = (got.out - exact.out).norm(dim=-1).transpose(1, 2)
    assert (error <= 2 * got.dropped_mass * largest + 1e-9).all()


def is_right_padding(call: AttentionCall) -> Tensor:
    """Queries after the last valid key, which have no vote: bool `[B, Lq]`."""
    batch, _, q_len, _ = call.q.shape
    kv_len = call.k.shape[2]
    offset = torch.tensor([kv_len - q_len]) if call.q_offset is None else call.q_offset
    valid = torch.ones(batch, kv_len, dtype=torch.bool)
    valid = valid if call.key_valid is None else call.key_valid
    last = torch.where(valid, torch.arange(kv_len), -1).amax(1, keepdim=True)
    return call.causal & (torch.arange(q_len) + offset[:, None] > last)


@given(problems(), st.sampled_from([0.0, 0.01, 0.3, 2.0]))
@FEW
def test_budget_is_never_overspent(problem, eps):
    call, _, geometry = problem
    got = reference.run(call, SkipRule.budget(eps), geometry, return_dropped_mass=True)
    bound = torch.tensor(eps, dtype=torch.float32).double()
    mass = got.dropped_mass.masked_fill(is_right_padding(call)[:, None], 0.0)
    assert (mass <= bound / (1 + bound) + 1e-12).all()


@given(problems())
@FEW
def test_lambda_never_changes_the_running_max_so_decisions_nest(problem):
    call, _, geometry = problem
    small = reference.run(call, SkipRule.blasst(0.05), geometry, return_skips=True)
    large = reference.run(call, SkipRule.blasst(0.5), geometry, return_skips=True)
    assert torch.equal(small.skips & large.skips, small.skips)


@pytest.mark.parametrize("rule", [SkipRule.blasst(0.3), SkipRule.budget(0.1), SkipRule.bsfa(1.0)])
@pytest.mark.parametrize("q_len", [24, 3, 1])
def test_left_padding_changes_nothing(rule, q_len):
    call, geometry = structured()
    alone = replace(call, q=call.q[:, :, -q_len:])
    pad = torch.full((1, 1, 5, 8), math.nan, dtype=torch.float64)
    q_pad = pad.expand(1, 2, 5, 8) if q_len == 24 else pad.new_zeros(1, 2, 0, 8)
    padded = AttentionCall(
        torch.cat([q_pad, alone.q], 2),
        torch.cat([pad, call.k], 2),
        torch.cat([pad, call.v], 2),
        scale=call.scale,
        key_valid=torch.arange(29)[None] >= 5,
    )
    want = reference.run(alone, rule, geometry, return_skips=True)
    got = reference.run(padded, rule, geometry, return_skips=True)
    assert torch.equal(got.out[:, -q_len:], want.out)
    assert torch.equal(got.counts, want.counts)
    assert (got.out[:, :-q_len] == 0).all()
    assert (got.lse[..., :-q_len] == -math.inf).all()


@pytest.mark.parametrize("features", ["plain", "window", "softcap", "sinks", "padded", "decode"])
@pytest.mark.parametrize("rule", [SkipRule.blasst(0.3), SkipRule.budget(0.2), SkipRule.never()])
def test_gradients(features, rule):
    call, geometry = structured()
    keep = 3 if features == "decode" else 24
    sinks = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    inputs = [x.clone().requires_grad_() for x in (call.q[:, :, -keep:], call.k, call.v)]

    def out(q, k, v, sinks):
        result = block_skip_attention(
            q,
            k,
            v,
            rule=rule,
            geometry=geometry,
            scale=0.7,
            backend="reference",
            window=9 if features == "window" else None,
            softcap=4.0 if features == "softcap" else None,
            sinks=sinks if features == "sinks" else None,
            key_valid=torch.arange(24)[None] % 7 != 2 if features == "padded" else None,
        )
        return result.out

    assert torch.autograd.gradcheck(out, (*inputs, sinks), fast_mode=True)


@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 0, 5), (1, 3, 0), (2, 1, 1)])
def test_empty_and_tiny(shape):
    batch, q_len, kv_len = shape
    q = torch.randn(batch, 4, q_len, 8)
    k, v = torch.randn(batch, 2, kv_len, 8), torch.randn(batch, 2, kv_len, 6)
    for backend in ("reference", "dense"):
        result = block_skip_attention(
            q, k, v, rule=SkipRule.blasst(0.5), causal=False, backend=backend, return_skips=True
        )
        assert result.out.shape == (batch, q_len, 4, 6)
        assert not result.out.isnan().any()


def test_nan_is_not_lost():
    call, geometry = structured()
    k = call.k.clone()
    k[:, :, 9] = math.nan
    result = reference.run(replace(call, k=k), SkipRule.blasst(0.9), geometry)
    assert result.out[:, 9:].isnan().all()
    assert result.out[:, :9].isfinite().all()


@given(st.integers(0, 40), st.integers(0, 2**31))
@FEW
def test_bits_round_trip(n, seed):
    bits = torch.rand(2, 3, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert torch.equal(unpack_bits(pack_bits(bits), n), bits)
