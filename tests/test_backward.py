"""Gradients of the reference and of the CPU kernel against the masked dense graph in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import gradient_checks
import pytest
import torch
from gradient_checks import Gradients
from hypothesis import HealthCheck, given, settings
from test_cpu_kernel import (
    DTYPES,
    FEATURES,
    GEOMETRIES,
    HEAD_SIZES,
    RULES,
    make_call,
    problems,
)
from test_cpu_kernel_robust import LEVEL, LEVELS, threads
from torch import Tensor

from hf_sparse_attention.backends import cpu, reference
from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, SkipRule

pytestmark = pytest.mark.usefixtures("cpu_kernel")

Outcome = tuple[AttentionResult, Gradients, Tensor, Tensor]


def differentiate(
    call: AttentionCall, rule: SkipRule, geometry: BlockGeometry, backend=cpu
) -> Outcome:
    """The result, the gradients, and the gradients of out and lse that they come from."""
    leaves = gradient_checks.inputs_of(call)
    call = replace(call, **leaves)
    assert backend.supports(call, rule, geometry) is None
    result = backend.run(call, rule, geometry, return_skips=True)
    dout, dlse = torch.randn_like(result.out), torch.randn_like(result.lse)
    total = gradient_checks.loss(result.out, result.lse, dout, dlse)
    found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return result, dict(zip(leaves, found, strict=True)), dout, dlse


def check(
    call: AttentionCall, rule: SkipRule, geometry: BlockGeometry, backend=cpu
) -> AttentionResult:
    outcome = differentiate(call, rule, geometry, backend)
    gradient_checks.check(call, geometry, *outcome)
    return outcome[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["never", "blasst", "bsfa_any", "budget"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_rules(geometry: str, rule: str, dtype: torch.dtype) -> None:
    skipped = 0
    for kind, shape in (("sink", (1, 2, 1, 150, 420, 64)), ("local", (1, 4, 2, 2, 700, 64))):
        call = make_call(kind, shape, dtype=dtype)
        skipped += int(
            check(call, RULES[rule], BlockGeometry.from_name(geometry)).counts[..., 1].sum()
        )
    assert (skipped > 0) == (rule != "never")


@pytest.mark.parametrize("backend", [cpu, reference], ids=lambda backend: backend.NAME)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, backend) -> None:
    dtype = torch.float32 if backend is cpu else torch.float64
    for q_len, geometry in ((150, "64x64"), (70, "64x1"), (3, "64x64"), (3, "64x1")):
        call = make_call("sink", (2, 4, 2, q_len, 220, 32), dtype=dtype, **FEATURES[feature])
        if call.sinks is not None:
            call = replace(call, sinks=call.sinks.to(dtype))
        geometry = replace(BlockGeometry.from_name(geometry), split_k=64)
        check(call, SkipRule.blasst(0.2), geometry, backend)


@HEAD_SIZES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sizes(dtype: torch.dtype, heads: tuple[int, int], sizes: tuple[int, int]) -> None:
    call = make_call("needle", (1, *heads, 100, 130, sizes[0]), sizes[1], dtype)
    for geometry in (BlockGeometry(), BlockGeometry(64, 1)):
        check(call, SkipRule.blasst(0.05), geometry)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems())
def test_any_call(problem: tuple[AttentionCall, SkipRule, BlockGeometry]) -> None:
    check(*problem)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_levels(level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    best = cpu.load_kernel().cpu_level()
    if level not in LEVELS[: LEVELS.index(best) + 1]:
        pytest.skip(f"this machine has no {level}")
    monkeypatch.setenv(LEVEL, level)
    for q_len, size in ((90, 40), (90, 33), (3, 40)):
        call = make_call("sink", (1, 4, 2, q_len, 130, size), dtype=dtype, softcap=6.0, window=100)
        for geometry in (BlockGeometry(), BlockGeometry(64, 1)):
            check(call, SkipRule.blasst(0.1), geometry)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", ["64x64", "64x1"])
def test_thread_counts(geometry: str, dtype: torch.dtype) -> None:
    """Bit for bit: the sums of dK and dV are made in one order, whoever makes them."""
    shapes = [(1, 4, 1, 400, 400, 40), (2, 4, 2, 200, 260, 40), (1, 4, 2, 3, 900, 40)]
    for shape in shapes:
        call = make_call("sink", shape, dtype=dtype, sinks=torch.randn(4))

        def gradients(n: int, call=call) -> Gradients:
            torch.manual_seed(0)
            with threads(n):
                return differentiate(call, SkipRule.blasst(0.1), BlockGeometry.from_name(geometry))[
                    1
                ]

        one = gradients(1)
        for n in (2, 3, 2):
            again = gradients(n)
            assert all(torch.equal(one[name], again[name]) for name in one)


def saved(call: AttentionCall, rule: SkipRule, geometry: BlockGeometry) -> dict:
    """The arguments of the backward op, by name, so that a test can change one of them."""
    result = cpu.run(call, rule, geometry, return_skips=True)
    return {
        "dout": torch.randn_like(result.out),
        "dlse": torch.randn_like(result.lse),
        "q": call.q,
        "k": call.k,
        "v": call.v,
        "out": result.out,
        "lse": result.lse,
        "skips": result.skips,
        "key_valid": call.key_valid,
        "q_offset": call.q_offset,
        "sinks": call.sinks,
        "scale": call.scale,
        "causal": call.causal,
        "window": call.window or 0,
        "softcap": call.softcap or 0.0,
        "block_q": geometry.block_q,
        "block_k": geometry.block_k,
    }


@functools.cache
def backward_op() -> Callable[..., tuple[Tensor, ...]]:
    return getattr(torch.ops, cpu._namespace()).backward


def rederived(arguments: dict) -> Tensor:
    """What a backward would skip that looks at the final lse instead of the forward's bits."""
    q, k, n = arguments["q"], arguments["k"], arguments["block_k"]
    scores = arguments["scale"] * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    hidden = (scores - arguments["lse"][..., None]).exp() < 0.02
    blocks = hidden.unflatten(2, (-1, n)).unflatten(4, (-1, n)).all(5).all(3)
    return (blocks * 2 ** torch.arange(blocks.shape[-1])).sum(-1, keepdim=True).to(torch.uint8)


MUTATIONS: dict[str, Callable[[dict], dict]] = {
    "nothing skipped": lambda a: {"skips": torch.zeros_like(a["skips"])},
    "one block further": lambda a: {"skips": a["skips"] << 1},
    "one block row further": lambda a: {"skips": a["skips"].roll(1, 2)},
    "a rederived mask": lambda a: {"skips": rederived(a)},
    "no delta": lambda a: {"out": torch.zeros_like(a["out"])},
    "no dlse": lambda a: {"dlse": None},
    "lse": lambda a: {"lse": a["lse"] + 1e-3},
    "scale": lambda a: {"scale": a["scale"] * 1.001},
    "softcap": lambda a: {"softcap": a["softcap"] * 1.01},
    "window": lambda a: {"window": a["window"] - 1},
    "sinks": lambda a: {"sinks": a["sinks"] + 0.01},
    "not causal": lambda a: {"causal": False},
}


@pytest.mark.parametrize("mutation", ["none", "softcap's slope", *MUTATIONS])
def test_the_oracle_sees_mutations(mutation: str) -> None:
    call = make_call("sink", (1, 4, 2, 256, 256, 32), softcap=9.0, window=150, sinks=torch.randn(4))
    geometry = BlockGeometry()
    arguments = saved(call, SkipRule.blasst(0.1), geometry)
    result = AttentionResult(arguments["out"], arguments["lse"], skips=arguments["skips"])
    change = MUTATIONS.get(mutation, lambda _: {})(arguments)
    assert all(x is None or x is not arguments[name] for name, x in change.items())
    found = backward_op()(**{**arguments, **change})

    def verdict() -> None:
        gradients = dict(zip(("q", "k", "v", "sinks"), found, strict=True))
        gradient_checks.check(
            call,
            geometry,
            result,
            gradients,
            arguments["dout"],
            arguments["dlse"],
            straight_through=mutation == "softcap's slope",
        )

    if mutation == "none":
        assert arguments["skips"].any()
        verdict()
    else:
        with pytest.raises(AssertionError, match="off by"):
            verdict()


def test_rows_without_keys_get_zeros_whatever_comes_in() -> None:
    valid = torch.arange(220) >= torch.tensor([[100], [220]])
    for q_len in (150, 3):
        call = make_call("sink", (2, 4, 2, q_len, 220, 32), key_valid=valid, sinks=torch.randn(4))
        arguments = saved(call, SkipRule.blasst(0.1), BlockGeometry())
        unseen = arguments["lse"] == -math.inf
        plain = backward_op()(**arguments)
        for name in ("dout", "q"):
            changed = arguments[name].clone()
            rows = unseen.transpose(1, 2) if name == "dout" else unseen
            changed[rows] = math.nan
            again = backward_op()(**{**arguments, name: changed})
            assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
        dq, dk, dv, _ = plain
        assert (dq[unseen] == 0).all()
        assert (dk[1] == 0).all()
        assert (dv[1] == 0).all()


def test_nan_in_hidden_keys_changes_nothing() -> None:
    valid = torch.ones(1, 300, dtype=torch.bool)
    valid[:, :20] = valid[:, 100:140] = valid[:, 290:] = False
    call = make_call("sink", (1, 2, 1, 150, 300, 16), key_valid=valid)
    arguments = saved(call, SkipRule.blasst(0.1), BlockGeometry())
    plain = backward_op()(**arguments)
    k, v = (x.masked_fill(~valid[0, :, None], math.nan) for x in (call.k, call.v))
    again = backward_op()(**{**arguments, "k": k, "v": v})
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_strides() -> None:
    call = make_call("sink", (2, 4, 2, 100, 160, 32))
    arguments = saved(call, SkipRule.blasst(0.1), BlockGeometry())
    plain = backward_op()(**arguments)

    def swapped(x: Tensor, a: int, b: int) -> Tensor:
        return x.transpose(a, b).contiguous().transpose(a, b)

    for a, b in ((1, 2), (2, 3)):
        changed = {name: swapped(arguments[name], a, b) for name in ("q", "k", "v", "dout", "out")}
        again = backward_op()(**{**arguments, **changed})
        assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))
    expanded = torch.ones(()).expand_as(arguments["dout"])  # what out.sum() hands down
    ones = backward_op()(**{**arguments, "dout": torch.ones_like(arguments["dout"])})
    again = backward_op()(**{**arguments, "dout": expanded})
    assert all(torch.equal(x, y) for x, y in zip(ones, again, strict=True))


@pytest.mark.parametrize(
    "shape",
    [(0, 2, 1, 5, 5, 8), (2, 2, 1, 0, 5, 8), (2, 2, 1, 5, 0, 8), (1, 0, 0, 5, 5, 8)],
    ids=str,
)
def test_empty(shape: tuple[int, ...]) -> None:
    call = make_call("noise", shape)
    _, gradients, *_ = differentiate(call, SkipRule.blasst(0.1), BlockGeometry())
    assert all((gradients[name] == 0).all() for name in "qkv")
    assert [gradients[name].shape for name in "qkv"] == [call.q.shape, call.k.shape, call.v.shape]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dout": torch.zeros(1, 4, 100, 32)}, r"dout, out: expected \[B, Lq, Hq, Dv\]"),
        ({"out": torch.zeros(1, 100, 4, 32).double()}, "expected float32, bfloat16 or float16"),
        ({"lse": torch.zeros(1, 4, 99)}, r"lse: expected float32 \[B, Hq, Lq\]"),
        ({"skips": torch.zeros(1, 2, 2, 1, dtype=torch.uint8)}, "skips: expected the forward's"),
        ({"dlse": torch.zeros(1, 4, 99)}, r"dlse: expected float32 \[B, Hq, Lq\]"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input(change: dict, message: str) -> None:
    call = make_call("sink", (1, 4, 2, 100, 160, 32))
    arguments = saved(call, SkipRule.blasst(0.1), BlockGeometry())
    with pytest.raises(RuntimeError, match=message):
        backward_op()(**{**arguments, **change})
