"""The compiled pass that observes, against plain torch in float64.

Where scores are rounded, a block's gap and its share are right if they lie between those of scores
that are off by as much: the histograms are compared with two of the oracle's, its gaps moved up and
down by that. The budget's decisions depend on each other, so they are compared where float32
computes without rounding: there they, and all other counts, must be equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import kernel_checks
import pytest
import torch
from kernel_checks import EXP_ERROR, U
from test_cpu_kernel import DTYPES
from test_cpu_kernel_robust import LEVELS, force, threads

from hf_sparse_attention.backends import cpu, reference
from hf_sparse_attention.calibration import observation_native, observation_reference, tallies
from hf_sparse_attention.calibration.observation import DEFAULT_GEOMETRIES, Observations
from hf_sparse_attention.calibration.observation_reference import Observed
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

pytestmark = pytest.mark.usefixtures("cpu_kernel")

ALL_GEOMETRIES = [*DEFAULT_GEOMETRIES, BlockGeometry(64, 192, split_k=256)]


def make_call(
    length: int = 200,
    heads: tuple[int, int] = (4, 2),
    sizes: tuple[int, int] = (32, 32),
    kind: str = "sink",
    dtype: torch.dtype = torch.float32,
    **options,
) -> AttentionCall:
    q, k = kernel_checks.structured(kind, 1, *heads, length, length, sizes[0])
    v = torch.randn(1, heads[1], length, sizes[1])
    scale = options.pop("scale", sizes[0] ** -0.5)
    return AttentionCall(q.to(dtype), k.to(dtype), v.to(dtype), scale=scale, **options)


def in_float64(call: AttentionCall) -> AttentionCall:
    return replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double())


def observe(
    call: AttentionCall,
    geometries: Sequence[BlockGeometry] = DEFAULT_GEOMETRIES,
    levels: Sequence[int] = (1, 3),
    keep_sink: bool = True,
) -> Observed:
    assert all(observation_native.serves(call, geometry) for geometry in geometries)
    return observation_native.observe(call, geometries, levels, keep_sink)


def check(call: AttentionCall, keep_sink: bool = True) -> None:
    """Everything but the budget's skips, for all geometries."""
    told = observe(call, ALL_GEOMETRIES, keep_sink=keep_sink)
    magnitude = (
        abs(call.scale)
        * call.q[0].double().abs()
        @ (call.k[0].double().abs().repeat_interleave(call.group, 0).transpose(1, 2))
    )
    error = (call.q.shape[-1] + 12) * U * magnitude.max().item()
    if call.softcap is not None:
        error += EXP_ERROR * call.softcap
    relative = error + EXP_ERROR + (call.q.shape[2] + 8) * U  # of a weight

    check_tallies(call, told, 2 * error + 8 * U * 2 * abs(tallies.U_MIN), 2 * relative, keep_sink)
    expected = observation_reference.observe(in_float64(call), ALL_GEOMETRIES, (1, 3), keep_sink)
    for key, exact in expected.tops.items():
        ours = told.tops[key]
        assert torch.equal(ours.isinf(), exact.isinf()), key
        finite = exact.isfinite()
        allowed = error + 4 * U * exact.abs()
        assert ((ours - exact).abs() <= allowed)[finite].all(), key

    exact = reference.run(in_float64(call), SkipRule.never(), BlockGeometry()).out
    absolute = replace(in_float64(call), v=call.v.double().abs())
    sizes = reference.run(absolute, SkipRule.never(), BlockGeometry()).out
    low = torch.finfo(call.q.dtype)
    rounding = low.eps / 2 if call.q.dtype == torch.bfloat16 else 0.0
    allowed = (2 * relative + rounding) * sizes + low.eps / 2 * exact.abs() + low.tiny * low.eps
    assert told.out.dtype == call.q.dtype
    assert ((told.out - exact).abs() <= allowed).all()


def check_tallies(
    call: AttentionCall, told: Observed, gap_error: float, mass_error: float, keep_sink: bool
) -> None:
    def oracle(shift: float) -> Observed:
        exact = tallies.gap_bins
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tallies, "gap_bins", lambda gaps, n: exact(gaps + shift, n))
            return observation_reference.observe(in_float64(call), ALL_GEOMETRIES, (), keep_sink)

    most, least = oracle(-gap_error), oracle(gap_error)
    assert told.tallies.keys() == most.tallies.keys()
    for key, ours in told.tallies.items():
        low, high = least.tallies[key], most.tallies[key]
        blocks = low[:, tallies.GAPS].sum()
        assert ours[:, tallies.GAPS].sum() == blocks, key
        for part, slack in ((tallies.GAPS, 0.0), (tallies.MASS, float(blocks))):
            # Shares are rounded to a unit each, and carry the error of the weights.
            a, x, b = (y[:, part].cumsum(1).double() for y in (low, ours, high))
            rounded = slack + (mass_error * x if part is tallies.MASS else 0)
            assert (a - rounded <= x).all(), key
            assert (x <= b + rounded).all(), key
        assert torch.equal(ours[:, tallies.BUDGET][:, 0], low[:, tallies.BUDGET][:, 0]), key


FEATURES = {
    "full": {},
    "window": {"window": 70},
    "narrow": {"window": 1},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.tensor([3.0, -4.0, 30.0, -math.inf])},
    "negative_scale": {"scale": -0.2},
    "zero_scale": {"scale": 0.0},
    "all": {"window": 90, "softcap": 5.0, "sinks": torch.tensor([3.0, -4.0, 0.0, 1.0])},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, dtype: torch.dtype) -> None:
    for kind in ("sink", "local"):
        check(make_call(kind=kind, dtype=dtype, **FEATURES[feature]), keep_sink=kind == "sink")


@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 129, 320, 451])
def test_lengths(length: int) -> None:
    check(make_call(length, kind="needle"))
    check(make_call(length, (6, 1), dtype=torch.bfloat16, window=100))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "sizes"),
    [((1, 1), (1, 1)), ((5, 1), (80, 33)), ((14, 2), (33, 7)), ((2, 2), (192, 128))],
    ids=str,
)
def test_head_sizes(heads: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype) -> None:
    check(make_call(150, heads, sizes, "local", dtype))


def whole_numbers(length: int, heads: tuple[int, int], **options) -> AttentionCall:
    """A call with scores of -3 to 3 times ln 2: weights are powers of 2, and sums are exact."""
    q, k = torch.zeros(1, heads[0], length, 16), torch.zeros(1, heads[1], length, 16)
    q[..., :3] = torch.randint(-1, 2, (1, heads[0], length, 3))
    k[..., :3] = torch.randint(-1, 2, (1, heads[1], length, 3))
    return AttentionCall(q, k, torch.randn_like(k), scale=math.log(2), **options)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("length", "split_k", "options"),
    [
        (100, 1024, {}),
        (250, 128, {}),
        (250, 128, {"window": 130}),
        (1300, 1024, {}),  # beyond the length up to which every row of single keys is followed
    ],
    ids=str,
)
def test_counts_are_equal_where_arithmetic_is_exact(
    monkeypatch, level: str, length: int, split_k: int, options: dict[str, int]
) -> None:
    force(level, monkeypatch)
    # float32's ln 2 times its log2 e is 1, as the kernel's unit must be.
    assert (torch.tensor(math.log(2)) * torch.tensor(math.log2(math.e))).item() == 1.0
    eps = [math.sqrt(0.8) * x for x in tallies.BUDGET_GRID]  # irrational: without ties
    geometries = [replace(geometry, split_k=split_k) for geometry in DEFAULT_GEOMETRIES]
    monkeypatch.setattr(tallies, "BUDGET_GRID", eps)
    for dtype in (torch.float32, torch.bfloat16):
        call = whole_numbers(length, (4, 2), **options)
        ours = observe(
            replace(call, q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype)), geometries
        ).tallies
        exact = observation_reference.observe(in_float64(call), geometries, (), True).tallies
        for key, expected in exact.items():
            for part in (tallies.GAPS, tallies.BUDGET):
                assert torch.equal(ours[key][:, part], expected[:, part]), key
        assert len(exact["64x1", "prefill", min(length, call.window or length)].unique()) > 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thread_counts(dtype: torch.dtype) -> None:
    call = make_call(300, kind="local", dtype=dtype)
    one = observe(call)
    with threads(3):
        three = observe(call)
    assert torch.equal(one.out, three.out)
    for kind in ("tallies", "tops"):
        a, b = getattr(one, kind), getattr(three, kind)
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("level", LEVELS)
def test_levels(monkeypatch, level: str) -> None:
    force(level, monkeypatch)
    for dtype in DTYPES:
        check(make_call(150, sizes=(33, 20), kind="needle", dtype=dtype, softcap=20.0))
        check(make_call(150, sizes=(64, 64), dtype=dtype, window=100))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_finite(bad: float) -> None:
    """Garbage in: every block is counted, and nothing is written where it does not belong."""
    call = make_call(130)
    call.q[0, 1, 70] = bad
    call.k[0, 1, 3] = -bad
    told = observe(call)
    for (name, phase, _), ours in told.tallies.items():
        if phase == "prefill" and name == "64x64":
            assert ours[:, tallies.GAPS].sum(1).tolist() == [1 + 2 + 3] * 4
        assert (ours >= 0).all()
    untouched = observe(make_call(130)).out
    assert told.out.shape == untouched.shape
    assert told.out[0, :64, 0].isfinite().all()


def test_large_scores() -> None:
    check(make_call(200, scale=400.0))


def test_strides_and_gqa_views() -> None:
    call = make_call(150, sizes=(64, 64))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (call.q, call.k, call.v)]
    ours = observe(replace(call, q=strided[0], k=strided[1], v=strided[2]))
    theirs = observe(call)
    assert torch.equal(ours.out, theirs.out)
    assert all(torch.equal(ours.tallies[key], x) for key, x in theirs.tallies.items())


def test_opcheck() -> None:
    call = make_call(100)
    arguments = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cpu, "observe", lambda call, **given: arguments.update(given) or ([torch.zeros(())] * 5)
        )
        with pytest.raises(IndexError):
            observation_native.observe(call, DEFAULT_GEOMETRIES, [1, 3], True)
    op = getattr(torch.ops, cpu._namespace()).observe.default
    given = [arguments[name] for name in ("geometries", "kept", "keep_sink", "groups")]
    rest = [arguments[name] for name in list(arguments)[4:]]
    torch.library.opcheck(op, (call.q, call.k, call.v, None, 0.2, 0, 0.0, *given, *rest))


# Observations, from either


def test_what_the_kernel_cannot_serve_is_told_all_the_same() -> None:
    both = [BlockGeometry(), BlockGeometry(16, 8), BlockGeometry(64, 128, order="ascending")]
    call = make_call(100)
    mixed = Observations(both, [1])
    mixed.observe(0, call)
    for geometry in both:
        alone = Observations([geometry], [1])
        alone.observe(0, in_float64(call))
        for phase in ("prefill", "decode"):
            assert set(alone.lengths(phase)) <= set(mixed.lengths(phase))
            for length in alone.lengths(phase):
                ours, exact = (x.gaps(geometry.name, phase, 0, length) for x in (mixed, alone))
                assert torch.equal(ours.sum(1), exact.sum(1))
            ours, exact = mixed.tops(geometry.name, phase), alone.tops(geometry.name, phase)
            torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)


def test_mixed_dtypes_as_autocast_leaves_them() -> None:
    call = make_call(100)
    told = observe(replace(call, v=call.v.bfloat16()))
    expected = observe(replace(call, v=call.v.bfloat16().float()))
    assert torch.equal(told.out, expected.out)


def test_bad_arguments_are_refused() -> None:
    call = make_call(100)
    good = {
        "geometries": torch.tensor([[64, 1024]]),
        "kept": torch.tensor([[1, 3]]),
        "keep_sink": True,
        "groups": torch.zeros(1, 2, dtype=torch.int64),
        "group_count": 1,
        "eps": torch.tensor([0.1]),
        "bins": 10,
        "u_min": -5.0,
        "bins_per_nat": 1.0,
        "mass_unit": 1e-9,
        "sample_from": 0,
        "sample_every": 1,
    }
    cpu.observe(call, **good)
    for name, bad, message in (
        (
            "geometries",
            torch.tensor([[48, 1024]]),
            "expected 1 or a multiple of 64 as block_k",
        ),
        ("geometries", torch.tensor([64, 1024]), r"geometries: expected int64 \[any, 2\]"),
        ("kept", torch.tensor([[3, 1]]), "kept: expected positive numbers, ascending"),
        ("groups", torch.tensor([[0, 1]]), "groups: expected 0 to 0, got 1"),
        ("groups", torch.tensor([[0]]), r"groups: expected int64 \[1, 2\]"),
        ("eps", torch.zeros(17), "eps: expected float32 with up to 16 values"),
        ("bins", 1, "bins: expected 2 to 1024, got 1"),
        ("mass_unit", 0.0, "expected positive numbers"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cpu.observe(call, **{**good, name: bad})
    for other in (replace(call, q=call.q[:, :, :50]), replace(call, q=call.q[:0], k=call.k[:0])):
        with pytest.raises(RuntimeError, match="expected"):
            cpu.observe(other, **good)
