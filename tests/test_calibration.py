"""Calibration against brute force in float64, the backend that runs, and unseen inputs."""

import math
from dataclasses import replace

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from hf_sparse_attention import calibrate, collect_stats, set_sparse_attention
from hf_sparse_attention.backends import reference
from hf_sparse_attention.calibration import observation
from hf_sparse_attention.calibration.api import OBSERVER
from hf_sparse_attention.calibration.fitting import Curve, fit_blasst
from hf_sparse_attention.calibration.observation import GapHistograms, TopBlocks, block_rows
from hf_sparse_attention.settings import ATTRIBUTE as SETTINGS
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

GEOMETRY = BlockGeometry(16, 8, split_k=32)
VARIANTS = {
    "full": {},
    "window": {"window": 40},
    "softcap": {"softcap": 4.0},
}
variants = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)


def structured(length, heads=4, kv_heads=2, dim=16, **settings):
    """A causal call with a sink, locality and a few topics, so that blocks differ in weight."""
    topic = torch.randn(length // 12 + 1, dim).repeat_interleave(12, 0)[:length]
    k = topic + 0.5 * torch.randn(1, kv_heads, length, dim)
    k[:, :, 0] += 1.0
    q = 2.0 * topic + torch.randn(1, heads, length, dim)
    return AttentionCall(q, k, torch.randn_like(k), scale=dim**-0.5, **settings)


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


def observed(calls, accumulator):
    for call in calls:
        for row in block_rows(call, accumulator.geometry):
            voters = call.q.shape[1] if row.phase == "prefill" else call.k.shape[1]
            accumulator.add(0, voters, row)
    return accumulator


@variants
@pytest.mark.parametrize("keep_sink", [True, False], ids=["sink-kept", "sink-competes"])
def test_thresholds_against_brute_force(settings, keep_sink):
    calls = [structured(70, **settings), structured(48, **settings)]
    levels = [1, 3]
    top = observed(calls, TopBlocks(GEOMETRY, levels, keep_sink))
    prefill, decode = top.table("prefill", 4), top.table("decode", 4)
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


def test_thresholds_keep_exactly_k_of_the_blocks_that_compete():
    """One sample, run under its own thresholds: nothing to average, so k is exact."""
    call = structured(128)
    for keep_sink in (True, False):
        top = observed([call], TopBlocks(GEOMETRY, [3], keep_sink))
        rule = SkipRule.bsfa(top.table("prefill", 4)[0, 0][None], keep_sink=keep_sink)
        counts = reference.run(call, rule, GEOMETRY).counts[0]
        # Block row i sees 2 diagonal blocks and 2 i others, of which the sink may be set apart.
        always = 2 + keep_sink
        kept = sum(min(2 * i + 2, always + 3) for i in range(8))
        assert (counts[:, 0] - counts[:, 1]).tolist() == [kept] * 4


def measured_sparsity(call, scale_factor, geometry, phase):
    """What the reference skips in float64: in prefill, or in decode at each block row's end."""
    lengths = [call.q.shape[2]] if phase == "prefill" else range(16, call.q.shape[2] + 1, 16)
    total = torch.zeros(2)
    for length in lengths:
        q, k, v = (x[:, :, :length].double() for x in (call.q, call.k, call.v))
        if phase == "decode":
            q = q[:, :, -1:]
        one = replace(call, q=q, k=k, v=v)
        reach = min(length, call.window or length)
        rule = SkipRule.blasst(min(scale_factor / reach, 1.0))
        total += reference.run(one, rule, geometry).counts.sum((0, 1))
    return (total[1] / total[0]).item()


@variants
@pytest.mark.parametrize("order", ["sink_diagonal", "ascending", "descending"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_gaps_tell_what_every_lambda_skips(settings, order, phase):
    geometry = replace(GEOMETRY, order=order, block_q=16 if phase == "decode" else 4)
    call = structured(160, **settings)
    gaps = observed([call], GapHistograms(geometry))
    counts = sum(gaps.total(phase, n) for n in gaps.lengths(phase))
    curve = Curve(counts)
    seen = []
    for log_factor in (-8.0, -3.0, 0.0, 2.5, 4.0, 30.0):  # edges of bins: no interpolation
        factor = math.exp(log_factor)
        expected = measured_sparsity(call, factor, geometry, phase)
        assert curve.sparsity(factor) == pytest.approx(expected, abs=2e-3)
        seen.append(expected)
    assert len(set(seen)) >= 4, "lambda must matter, or nothing was tested"
    assert curve.sparsity(math.exp(30.0)) == pytest.approx(curve.largest)
    assert curve.sparsity(0.0) == 0.0


def test_a_curve_is_inverted():
    gaps = observed([structured(200)], GapHistograms(BlockGeometry(4, 8)))
    curve = Curve(gaps.total("prefill", 200))
    for target in (0.1, 0.35, 0.6):
        assert target < curve.largest
        factor = math.exp(curve.log_scale_factor(target))
        assert curve.sparsity(factor) == pytest.approx(target, abs=1e-6)


def test_head_by_head_is_the_same(monkeypatch):
    """Long requests are taken a key/value head at a time."""
    call = structured(100)

    def both():
        top = observed([call], TopBlocks(GEOMETRY, [2], True))
        gaps = observed([call], GapHistograms(GEOMETRY))
        return top.table("prefill", 4), top.table("decode", 4), gaps.total("decode", 64)

    together = both()
    monkeypatch.setattr(observation, "_SCORES_AT_A_TIME", 1)
    assert len([row for row in block_rows(call, GEOMETRY) if row.phase == "decode"]) == 2 * 7
    torch.testing.assert_close(both(), together)


def test_modules_without_a_layer_number_have_no_thresholds():
    top = TopBlocks(GEOMETRY, [2], True)
    call = structured(100)
    for layer in (-4, 0):
        for row in block_rows(call if layer == 0 else structured(100), GEOMETRY):
            top.add(layer, 4 if row.phase == "prefill" else 2, row)
    alone = observed([call], TopBlocks(GEOMETRY, [2], True))
    torch.testing.assert_close(top.table("prefill", 4), alone.table("prefill", 4))


# The fit


class Made:
    """Histograms in which sparsity s needs exactly the scale factor a * exp(b * s)."""

    def __init__(self, a, b, lengths=(1000, 2000)):
        self.a, self.b, self.n = a, b, lengths

    def lengths(self, phase):
        return list(self.n)

    def total(self, phase, length):
        edges = observation.U_MIN + torch.arange(observation.U_BINS + 1) / observation.BINS_PER_NAT
        below = ((edges - math.log(self.a)) / self.b).clamp(0, 0.9)
        counts = torch.zeros(observation.U_BINS + 1, dtype=torch.int64)
        counts[:-1] = (below.diff() * 1e9).round().long()
        counts[-1] = 10**9 - counts.sum()
        return counts


def test_the_fit_recovers_its_own_formula():
    factors, report = fit_blasst(Made(a=2.0, b=6.0), [0.3, 0.5, 0.7])
    for phase in ("prefill", "decode"):
        assert factors[phase] == pytest.approx({"a": 2.0, "b": 6.0}, rel=2e-2)
        assert report[phase]["r2"] > 0.999
        assert report[phase]["predicted"]["1000"]["0.5"] == pytest.approx(0.5, abs=5e-3)


def test_decode_is_fitted_where_requests_of_these_lengths_decode():
    """Positions below half of the shortest sample are not the ones that run."""

    class WithShortPositions(Made):
        def lengths(self, phase):
            return [1000, 2000] if phase == "prefill" else [64, 499, 500, 1000, 2000]

    _, report = fit_blasst(WithShortPositions(a=2.0, b=6.0), [0.5])
    assert report["decode"]["lengths"] == [500, 1000, 2000]
    assert report["prefill"]["lengths"] == [1000, 2000]


def test_one_target_gives_version_one():
    factors, report = fit_blasst(Made(a=2.0, b=6.0), [0.5])
    assert factors["decode"]["b"] == 0.0
    assert factors["decode"]["a"] == pytest.approx(2.0 * math.exp(3.0), rel=1e-2)
    assert report["decode"]["r2"] is None


def test_a_target_out_of_reach_is_refused():
    with pytest.raises(ValueError, match=r"expected less than 0\.90 in prefill.*got \[0.95\]"):
        fit_blasst(Made(a=2.0, b=6.0), [0.95])


# Whole models


def tokens(n, count=1):
    return [torch.randint(3, tiny_models.VOCABULARY, (n,)) for _ in range(count)]


@pytest.fixture
def model():
    return tiny_models.llama().eval()


def run(model, length=480, count=3):
    with torch.no_grad(), collect_stats(model) as stats:
        for ids in tokens(length, count):
            out = model(input_ids=ids[None, :-1], use_cache=True)
            model(input_ids=ids[None, -1:], past_key_values=out.past_key_values)
    return stats


def test_bsfa_on_unseen_inputs(model):
    """Predicted density as in section 5.1 of the paper: k, sink and diagonal of the visible."""
    geometry = BlockGeometry(16, 16)
    config = calibrate(
        model, tokens(480, 6), method="bsfa", levels=(4, 8), geometry=geometry, progress=False
    )
    assert config.tables.prefill.shape == (2, 2, 4, 30)
    assert config.levels == [4, 8]
    for level in (4, 8):
        set_sparse_attention(model, config, level=level, min_length=0, backend="reference")
        stats = run(model)
        kept = sum(min(i + 1, level + 2) for i in range(30))
        predicted = config.provenance["predicted_sparsity"]["prefill"][str(level)]
        assert predicted == pytest.approx(1 - kept / (30 * 31 / 2), abs=1e-4)
        assert stats.sparsity("prefill") == pytest.approx(predicted, abs=0.05)
        assert stats.sparsity("decode") == pytest.approx(1 - (level + 2) / 30, abs=0.1)


@pytest.mark.parametrize("targets", [0.5, (0.5, 0.3, 0.4, 0.6)], ids=["version-1", "version-2"])
def test_blasst_on_unseen_inputs(model, targets):
    geometry = BlockGeometry(4, 16)
    config = calibrate(
        model,
        tokens(480, 3),
        method="blasst",
        target_sparsity=targets,
        geometry=geometry,
        progress=False,
    )
    assert config.target_sparsity == {"prefill": 0.5, "decode": 0.5}
    assert (config.threshold_scale_factor["prefill"]["b"] == 0) == (targets == 0.5)
    set_sparse_attention(model, config, min_length=0, backend="reference")
    stats = run(model)
    assert stats.sparsity("prefill") == pytest.approx(0.5, abs=0.03)
    assert stats.sparsity("decode") == pytest.approx(0.5, abs=0.15)  # six positions, not 1440
    if targets != 0.5:
        set_sparse_attention(model, target_sparsity={"prefill": 0.35})
        assert run(model).sparsity("prefill") == pytest.approx(0.35, abs=0.03)


def test_calibrate_save_and_load(model, tmp_path):
    """The whole way: another process needs from_pretrained only."""
    config = calibrate(
        model, tokens(200, 2), levels=(1, 2), geometry=BlockGeometry(16, 16), progress=False
    )
    config = replace(config, min_length=0, backend="reference")
    model.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="bsfa").eval()
    set_sparse_attention(model, config)
    ids = tokens(200)[0][None]
    with torch.no_grad(), collect_stats(loaded) as stats:
        actual = loaded(input_ids=ids).logits
    assert stats.sparsity("prefill") > 0.3
    torch.testing.assert_close(actual, model(input_ids=ids).logits)


@pytest.mark.parametrize("before", ["eager", "sdpa", "blasst"])
def test_the_model_is_left_as_it_was(model, before):
    model.set_attn_implementation(before)
    model.train()
    if before == "blasst":
        set_sparse_attention(model, "blasst", max_dropped_mass=0.125)
    settings = [getattr(module, SETTINGS, None) for module in model.modules()]
    calibrate(model, tokens(64), levels=(1,), geometry=BlockGeometry(16, 16), progress=False)
    assert model.config._attn_implementation == before
    assert model.training
    assert [getattr(module, SETTINGS, None) for module in model.modules()] == settings
    with pytest.raises(TypeError, match="data: expected"):
        calibrate(model, [object()], progress=False)
    assert model.config._attn_implementation == before
    assert not any(hasattr(module, OBSERVER) for module in model.modules())


def test_calibration_is_dense(model):
    """Whatever the model runs with, the pass that is observed must not skip."""
    config = calibrate(
        model, tokens(200), geometry=BlockGeometry(4, 8), levels=(1,), progress=False
    )
    data = tokens(200)
    expected = calibrate(model, data, geometry=BlockGeometry(4, 8), levels=(1,), progress=False)
    set_sparse_attention(model, config, min_length=0, backend="reference")
    actual = calibrate(model, data, geometry=BlockGeometry(4, 8), levels=(1,), progress=False)
    torch.testing.assert_close(actual.tables.prefill, expected.tables.prefill)
    assert not torch.equal(actual.tables.prefill, config.tables.prefill)


def test_lengths_cut_the_samples(model):
    config = calibrate(
        model,
        tokens(300),
        lengths=(64, 256, 1000),
        levels=(1,),
        geometry=BlockGeometry(16, 16),
        progress=False,
    )
    assert config.provenance["lengths"] == [64, 256]
    assert config.tables.prefill.shape[-1] == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "flash"}, "method: expected one of .*got 'flash'"),
        ({"data": []}, "expected at least one sample, got none"),
        ({"data": [[3] * 40]}, "samples of at least 64 tokens"),
        ({"lengths": [5000]}, "samples of at least 5000 tokens, the longest found has 80"),
        ({"levels": ()}, r"levels: expected positive integers, got \[\]"),
        ({"levels": (0, 2)}, r"levels: expected positive integers, got \[0, 2\]"),
        ({"method": "blasst", "target_sparsity": 1.0}, r"\(0, 1\), got \[1.0\]"),
        ({"method": "blasst", "target_sparsity": 0.99}, "expected less than"),
    ],
)
def test_bad_arguments(model, settings, message):
    settings = {"data": tokens(80), **settings}
    with pytest.raises(ValueError, match=message):
        calibrate(model, progress=False, **settings)


def test_a_model_of_no_use():
    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        calibrate(torch.nn.Linear(1, 1), tokens(80))
