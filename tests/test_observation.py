"""What a dense pass tells, against brute force in float64 and against the backend that runs."""

import math
from dataclasses import replace

import pytest
import torch

from hf_sparse_attention.backends import dense, reference
from hf_sparse_attention.calibration import observation_reference, tallies
from hf_sparse_attention.calibration.curves import Curves
from hf_sparse_attention.calibration.observation import DEFAULT_GEOMETRIES, Observations
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

GEOMETRY = BlockGeometry(16, 8, split_k=32)
NAME = GEOMETRY.name
VARIANTS = {
    "full": {},
    "window": {"window": 40},
    "softcap": {"softcap": 4.0},
    "sinks": {"sinks": torch.tensor([0.5, 3.0, -1.0, 6.0])},
}
variants = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)


def structured(length, heads=4, kv_heads=2, dim=16, **settings):
    """A causal call with a sink, locality and a few topics, so that blocks differ in weight."""
    topic = torch.randn(length // 12 + 1, dim).repeat_interleave(12, 0)[:length]
    k = topic + 0.5 * torch.randn(1, kv_heads, length, dim)
    k[:, :, 0] += 1.0
    q = 2.0 * topic + torch.randn(1, heads, length, dim)
    return AttentionCall(q, k, torch.randn_like(k), scale=dim**-0.5, **settings)


def observed(calls, geometry=GEOMETRY, levels=(), keep_sink=True):
    """What the calls tell in plain torch, as a single layer 0."""
    told = Observations([geometry], levels, keep_sink)
    for call in calls:
        told.observe(0, call)
    return told


def block_maxima(call, rows, geometry):
    """Largest visible score in each key block, `[Hq, len(rows), NK]` float64, by plain loops."""
    q, k = call.q[0].double(), call.k[0].double().repeat_interleave(call.group, 0)
    maxima = torch.full((len(q), len(rows), -(-k.shape[1] // geometry.block_k)), -math.inf)
    maxima = maxima.double()
    for h in range(len(q)):
        for i, row in enumerate(rows):
            for column in range(row + 1):
                if call.window is not None and column <= row - call.window:
                    continue
                score = call.scale * (q[h, row] @ k[h, column])
                if call.softcap is not None:
                    score = call.softcap * torch.tanh(score / call.softcap)
                j = column // geometry.block_k
                maxima[h, i, j] = max(maxima[h, i, j], score)
    return maxima


def brute_force_threshold(maxima, rows, k, geometry, keep_sink):
    """The midpoint of the k-th and (k+1)-th largest block of one voter, `[rows, NK]` maxima."""
    diagonal = {row // geometry.block_k for row in rows}
    values = [
        column.max().item()
        for j, column in enumerate(maxima.T)
        if j not in diagonal and not (keep_sink and j == 0) and column.max() > -math.inf
    ]
    values.sort(reverse=True)
    return (values[k - 1] + values[k]) / 2 if len(values) > k else -math.inf


@variants
@pytest.mark.parametrize("keep_sink", [True, False], ids=["sink-kept", "sink-competes"])
def test_thresholds_against_brute_force(settings, keep_sink):
    calls = [structured(70, **settings), structured(48, **settings)]
    levels = [1, 3]
    told = observed(calls, GEOMETRY, levels, keep_sink)
    prefill, decode = told.tops(NAME, "prefill"), told.tops(NAME, "decode")
    assert prefill.shape == decode.shape == (2, 1, 4, 4)  # 70 and 48 hold 4 and 3 whole block rows
    for i in range(4):
        reaching = [call for call in calls if call.q.shape[2] >= 16 * (i + 1)]
        rows = list(range(16 * i, 16 * i + 16))
        maxima = [block_maxima(call, rows, GEOMETRY) for call in reaching]
        for n, k in enumerate(levels):
            for h in range(4):
                each = [brute_force_threshold(m[h], rows, k, GEOMETRY, keep_sink) for m in maxima]
                expected = sum(each) / len(maxima)
                assert prefill[n, 0, h, i].item() == pytest.approx(expected, abs=1e-5)
                group = slice(h // 2 * 2, h // 2 * 2 + 2)  # its heads vote together
                expected = sum(
                    brute_force_threshold(m[group, -1], rows[-1:], k, GEOMETRY, keep_sink)
                    for m in maxima
                ) / len(maxima)
                assert decode[n, 0, h, i].item() == pytest.approx(expected, abs=1e-5)
    assert prefill.isinf().any(), "early rows have too few blocks"
    assert prefill.isfinite().any()


@pytest.mark.parametrize("window", [None, 40], ids=["full", "window"])
@pytest.mark.parametrize("keep_sink", [True, False], ids=["sink-kept", "sink-competes"])
def test_thresholds_keep_exactly_k_of_the_blocks_that_compete(keep_sink, window):
    """One sample, run under its own thresholds: nothing to average, so k is exact."""
    call = structured(128, window=window)
    told = observed([call], GEOMETRY, [2], keep_sink)
    rule = SkipRule.bsfa(told.tops(NAME, "prefill")[0, 0][None], keep_sink=keep_sink)
    visited, skipped = reference.run(call, rule, GEOMETRY).counts[0].sum(0).tolist()
    if window is None:
        # Block row i sees 2 diagonal blocks and 2 i others, of which the sink may be set apart.
        assert visited - skipped == 4 * sum(min(2 * i + 2, 4 + keep_sink) for i in range(8))
    assert skipped > 0
    predicted = told.predicted_sparsity(NAME, "prefill")["2"]
    assert predicted == pytest.approx(skipped / visited, abs=1e-4)


def test_a_level_of_single_keys_counts_64_of_them():
    geometry = BlockGeometry(64, 1)
    call = structured(192)
    told = observed([call], geometry, [1], keep_sink=False)
    rule = SkipRule.bsfa(told.tops(geometry.name, "prefill")[0, 0][None], keep_sink=False)
    visited, skipped = reference.run(call, rule, geometry).counts[0].sum(0).tolist()
    # 64 keys on each diagonal, none and 64 and 128 before it.
    assert visited - skipped == 4 * (64 + 128 + 128)


def measured(call, rule_of, geometry, phase):
    """Blocks visited and skipped by the reference in float64, in prefill or at each row's end.

    Args:
        rule_of: from the length of a request to its rule.
    """
    length, step = call.q.shape[2], geometry.block_q
    lengths = [length] if phase == "prefill" else [*range(step, length, step), length]
    total = torch.zeros(2)
    for length in lengths:
        q, k, v = (x[:, :, :length].double() for x in (call.q, call.k, call.v))
        if phase == "decode":
            q = q[:, :, -1:]
        one = replace(call, q=q, k=k, v=v)
        rule = rule_of(min(length, call.window or length))
        # In decode each key/value head counts once, not once for each head of its group.
        counts = reference.run(one, rule, geometry).counts.sum((0, 1))
        total += counts / (call.group if phase == "decode" else 1)
    return total.tolist()


def over_layers(told, kind, phase):
    """The sum over voters and lengths of one of the accessors."""
    (name,) = told.geometries
    return sum(getattr(told, kind)(name, phase, 0, n).sum(0) for n in told.lengths(phase))


@variants
@pytest.mark.parametrize("order", ["sink_diagonal", "ascending", "descending"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_gaps_tell_what_every_lambda_skips(settings, order, phase):
    geometry = replace(GEOMETRY, order=order, block_q=16 if phase == "decode" else 4)
    call = structured(160, **settings)
    gaps = over_layers(observed([call], geometry), "gaps", phase)
    curves = Curves(gaps[None], gaps[None])
    seen = []
    for log_factor in (-8.0, -3.0, 0.0, 2.5, 4.0, 30.0):  # edges of bins: no interpolation
        factor = math.exp(log_factor)
        visited, skipped = measured(
            call, lambda n, f=factor: SkipRule.blasst(min(f / n, 1.0)), geometry, phase
        )
        sparsity = curves.total_sparsity(torch.tensor([log_factor]))
        assert sparsity == pytest.approx(skipped / visited, abs=2e-3)
        seen.append(skipped)
    assert len(set(seen)) >= 4, "lambda must matter, or nothing was tested"
    assert curves.total_sparsity(torch.tensor([30.0])) == pytest.approx(float(curves.largest))
    assert curves.total_sparsity(torch.tensor([-math.inf])) == 0.0


@variants
@pytest.mark.parametrize("geometry", [GEOMETRY, BlockGeometry(16, 1)], ids=lambda g: g.name)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_budget_is_simulated_exactly(settings, phase, geometry):
    call = structured(150, **settings)
    call = replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double())
    budget = over_layers(observed([call], geometry), "budget", phase).tolist()
    seen = []
    for eps, skipped in zip(tallies.BUDGET_GRID, budget[1:], strict=True):
        expected = measured(call, lambda n, eps=eps: SkipRule.budget(eps), geometry, phase)
        assert [budget[0], skipped] == expected
        seen.append(skipped)
    assert len(set(seen)) >= 4, "eps must matter, or nothing was tested"


def test_single_keys_are_sampled_where_rows_are_many():
    weights = [tallies.budget_weight(BlockGeometry(64, 1), 64 * i) for i in range(24)]
    assert weights == [1] * 16 + [0, 0, 0, 4, 0, 0, 0, 4]
    assert tallies.budget_weight(BlockGeometry(64, 64), 64 * 16) == 1


@variants
def test_mass_is_what_skipping_drops(settings):
    """Against the weights themselves, in float64: what is dropped by all that lambda skips."""
    call = structured(100, **settings)
    told = observed([call], GEOMETRY)
    edge = 2.0  # of a bin, as u
    bins = round((edge - tallies.U_MIN) * tallies.BINS_PER_NAT)
    (length,) = told.lengths("prefill")
    dropped = told.mass(NAME, "prefill", 0, length)[:, :bins].sum(-1)

    one = replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double())
    kept = reference.run(one, SkipRule.blasst(math.exp(edge) / length), GEOMETRY).lse[0]
    share = 1 - (kept - reference.run(one, SkipRule.never(), GEOMETRY).lse[0]).exp()  # [Hq, L]
    rows = [share[:, i : i + 16].mean(-1) for i in range(0, 100, 16)]
    torch.testing.assert_close(dropped, sum(rows), atol=1e-4, rtol=1e-5)
    assert (dropped > 1e-3).all()
    everything = told.mass(NAME, "prefill", 0, length).sum(-1)
    if call.sinks is None:
        assert everything.tolist() == pytest.approx([len(rows)] * 4, rel=1e-6)
    else:  # they hold a share that no block has
        assert (everything < len(rows)).all()


@variants
def test_the_output_is_dense_attention(settings):
    call = structured(130, dim=16, **settings)
    batch = replace(call, q=call.q.repeat(2, 1, 1, 1), k=call.k.repeat(2, 1, 1, 1))
    batch = replace(batch, v=torch.randn(2, 2, 130, 24))
    told = Observations(DEFAULT_GEOMETRIES, [1])
    out = told.observe(0, batch)
    expected = dense.run(batch, SkipRule.never(), GEOMETRY).out
    torch.testing.assert_close(out, expected)
    assert told.lengths("prefill") == [min(130, call.window or 130)]


def test_what_teaches_nothing_is_left_alone():
    call = structured(32)
    for other in (
        replace(call, causal=False),
        replace(call, mask=torch.ones(1, 1, 32, 32, dtype=torch.bool)),
        replace(call, q=call.q[:, :, -4:]),
        replace(call, q_offset=torch.tensor([1])),
    ):
        told = Observations([GEOMETRY])
        assert told.observe(0, other) is None
        assert told.layers == told.lengths("prefill") == []
    valid = torch.ones(1, 32, dtype=torch.bool)
    assert Observations([GEOMETRY]).observe(0, replace(call, key_valid=valid)) is not None
    valid[0, 0] = False
    with pytest.raises(ValueError, match="expected samples without padding"):
        Observations([GEOMETRY]).observe(0, replace(call, key_valid=valid))


def test_head_by_head_is_the_same(monkeypatch):
    """Long requests are taken a key/value head at a time."""
    call = structured(100)
    together = observed([call], levels=[2]).state_dict()
    monkeypatch.setattr(observation_reference, "_SCORES_AT_A_TIME", 1)
    assert len(list(observation_reference.block_rows(call, 16))) == 2 * 2 * 7
    torch.testing.assert_close(observed([call], levels=[2]).state_dict(), together)


# Sums


def three_layers(samples, settings=None):
    told = Observations([GEOMETRY, BlockGeometry(16, 1)], [1, 3], **(settings or {}))
    for call in samples:
        for layer, window in ((-4, None), (0, None), (2, 40)):
            told.observe(layer, replace(call, window=window))
    return told


def test_order_and_processes_do_not_matter():
    samples = [structured(n) for n in (100, 48, 130, 100)]
    alone = three_layers(samples)
    first, second = three_layers(samples[2:]), three_layers(samples[:2])
    first.merge(second)
    ours, theirs = first.state_dict(), alone.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    loaded = three_layers([])
    loaded.load_state_dict(ours)
    loaded.load_state_dict(ours)  # in place of, not on top of
    for phase in ("prefill", "decode"):
        assert loaded.lengths(phase) == alone.lengths(phase)
        for geometry in alone.geometries:
            torch.testing.assert_close(loaded.tops(geometry, phase), alone.tops(geometry, phase))
            assert loaded.predicted_sparsity(geometry, phase) == alone.predicted_sparsity(
                geometry, phase
            )


def test_layers_that_were_not_seen_and_modules_without_a_number():
    told = three_layers([structured(100)])
    assert told.layers == [-4, 0, 2]
    table = told.tops(NAME, "prefill")
    assert table.shape == (2, 3, 4, 6)
    assert table[:, 1].isinf().all()
    alone = observed([structured(100)], levels=[1, 3])
    assert alone.tops(NAME, "prefill").shape[1] == 1
    assert told.gaps(NAME, "prefill", 2, 100).sum() == 0, "its window is shorter"
    assert told.gaps(NAME, "prefill", 2, 40).sum() > 0
    assert (
        told.total(NAME, "prefill", 100).sum()
        == (told.gaps(NAME, "prefill", -4, 100) + told.gaps(NAME, "prefill", 0, 100)).sum()
    )


def test_only_like_is_added_to_like():
    ours = three_layers([structured(48)])
    with pytest.raises(ValueError, match="expected keep_sink True, got False"):
        ours.merge(three_layers([], {"keep_sink": False}))
    state = ours.state_dict()
    del state["bins"]
    with pytest.raises(ValueError, match=r"expected bins .* got none"):
        ours.load_state_dict(state)
    with pytest.raises(ValueError, match="expected 4 heads in layer -4, got 2"):
        ours.merge(three_layers([structured(48, heads=2)]))


def test_bad_names_are_refused():
    told = three_layers([structured(48)])
    with pytest.raises(ValueError, match=r"expected one of \['16x8', '16x1'\], got '64x64'"):
        told.tops("64x64", "prefill")
    with pytest.raises(ValueError, match=r"layer: expected one of \[-4, 0, 2\] in decode, got 1"):
        told.gaps(NAME, "decode", 1, 48)
    with pytest.raises(ValueError, match="expected different ones, got"):
        Observations([GEOMETRY, replace(GEOMETRY, order="ascending")])
    with pytest.raises(ValueError, match=r"levels: expected positive integers, got \[0\]"):
        Observations([GEOMETRY], [0])
