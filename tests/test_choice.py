"""Targets and levels chosen by what they cost on held-out text."""

import math
from dataclasses import replace

import pytest
import tiny_models
import torch
from torch.nn.functional import cross_entropy, kl_div

from hf_sparse_attention import calibrate, collect_stats, set_sparse_attention
from hf_sparse_attention.calibration.choice import STEP, last_that
from hf_sparse_attention.calibration.cost import HeldOut
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.types import PHASES, BlockGeometry

SMALL = BlockGeometry(4, 8)


def tokens(n, count=1):
    return [torch.randint(3, tiny_models.VOCABULARY, (n,)) for _ in range(count)]


@pytest.fixture
def model():
    return tiny_models.llama().eval()


@pytest.fixture
def calibrated(model):
    """Without a choice, and the held-out samples."""
    config = calibrate(model, tokens(300, 2), geometries=SMALL, levels=(1, 4, 12), progress=False)
    return config, tokens(280, 2)


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_the_last_that_fits(count):
    for last in range(-1, count):
        asked = []
        found = last_that(lambda n, last=last, log=asked: log.append(n) or n <= last, count)
        assert found == (last if last >= 0 else None)
        assert len(asked) <= math.ceil(math.log2(count + 1))


def test_the_cost_of_prefill(model, calibrated):
    """By hand: both models' predictions over the last 256 positions."""
    config, samples = calibrated
    (cost,) = HeldOut(model, samples).costs([config], "prefill")
    dense = [model(ids[None]).logits[0, -256:].detach() for ids in samples]
    set_sparse_attention(model, config, min_length=0)
    with torch.no_grad(), collect_stats(model) as stats:
        sparse = [model(ids[None]).logits[0, -256:] for ids in samples]
    kl, lost = 0.0, 0.0
    for p, q, ids in zip(dense, sparse, samples, strict=True):
        p, q, follows = p.log_softmax(-1), q.log_softmax(-1), ids[-255:]
        kl += float(kl_div(q, p, log_target=True, reduction="batchmean")) / 2
        lost += float(cross_entropy(q[:-1], follows) - cross_entropy(p[:-1], follows)) / 2
    assert kl > 1e-3, "skipping must cost something, or nothing was tested"
    assert cost.kl == pytest.approx(kl, rel=1e-3)
    assert cost.ppl_increase == pytest.approx(math.expm1(lost), rel=1e-2, abs=1e-5)
    assert cost.sparsity == pytest.approx(stats.sparsity("prefill"))


def test_the_cost_of_decode(model, calibrated):
    """By hand: the prompt dense, then the last 64 tokens, eight at a time."""
    config, samples = calibrated
    (cost,) = HeldOut(model, samples[:1]).costs([config], "decode")
    ids = samples[0][None]
    with torch.no_grad():
        dense = model(ids).logits[0, -64:]
        cache = model(ids[:, :-64], use_cache=True).past_key_values
        set_sparse_attention(model, config, min_length=0)
        with collect_stats(model) as stats:
            sparse = [
                model(ids[:, n : n + 8], past_key_values=cache).logits[0]
                for n in range(216, 280, 8)
            ]
    p, q = dense.log_softmax(-1), torch.cat(sparse).log_softmax(-1)
    kl = float(kl_div(q, p, log_target=True, reduction="batchmean"))
    assert kl > 1e-3
    assert cost.kl == pytest.approx(kl, rel=1e-3)
    assert cost.sparsity == pytest.approx(stats.sparsity("decode"))


@pytest.mark.parametrize("phase", PHASES)
def test_skipping_nothing_costs_nothing(model, phase):
    exact = SparseAttentionConfig(threshold_scale_factor=0.0)
    (cost,) = HeldOut(model, tokens(300)).costs([exact], phase)
    assert cost.kl < 1e-6
    assert abs(cost.ppl_increase) < 1e-5
    assert cost.sparsity == 0.0


@pytest.mark.parametrize("granularity", ["global", "head"])
def test_the_highest_target_within_the_limit(model, calibrated, granularity):
    samples = calibrated[1][:1]
    settings = {"geometries": SMALL, "levels": (), "progress": False, "granularity": granularity}
    data = tokens(300)
    free = calibrate(model, data, **settings)
    held_out = HeldOut(model, samples)
    limit = {}
    for phase in PHASES:
        at = set_targets(free, phase, 0.4)
        (cost,) = held_out.costs([at], phase)
        limit[phase] = cost.kl * 1.01
    config = calibrate(model, data, max_kl=limit, validation=samples, **settings)
    assert config.target_sparsity is None
    for phase in PHASES:
        fit = config.fits["4x8"].phases[phase]
        assert fit.target_sparsity >= 0.4 - 1e-6
        assert config.target(phase, SMALL) == fit.target_sparsity
        costs = {row["target"]: row["kl"] for row in fit.costs}
        assert costs[fit.target_sparsity] <= limit[phase]
        above = round(fit.target_sparsity + STEP, 2)
        if above <= 0.7:
            assert costs[above] > limit[phase]
        assert fit.sparsity[0] <= fit.target_sparsity <= fit.sparsity[1]
    assert SparseAttentionConfig.from_dict(config.to_dict()) == config


def set_targets(config, phase, target):
    targets = {**config.target_sparsity, phase: target}
    return replace(config, target_sparsity=targets, geometry=SMALL)


def test_a_phase_without_a_limit_keeps_its_target(model, calibrated):
    _, samples = calibrated
    config = calibrate(
        model,
        tokens(300),
        geometries=SMALL,
        levels=(),
        max_ppl_increase={"prefill": 100.0},
        validation=samples,
        progress=False,
    )
    assert config.target_sparsity == {"decode": 0.5}
    prefill = config.fits["4x8"].phases["prefill"]
    assert prefill.target_sparsity == pytest.approx(prefill.sparsity[1]), "all that was fitted"
    assert config.fits["4x8"].phases["decode"].costs == []


def test_each_geometry_keeps_the_limit_with_a_target_of_its_own(model, calibrated):
    _, samples = calibrated
    config = calibrate(
        model,
        tokens(300, 2),
        geometries=["16x1", "4x8"],
        levels=(),
        max_kl={"prefill": 0.05},
        validation=samples,
        progress=False,
    )
    for name, fit in config.fits.items():
        assert fit.geometry.name == name
        assert fit.phases["prefill"].target_sparsity is not None
    rows = [fit.phases["prefill"].costs for fit in config.fits.values()]
    assert rows[0] != rows[1]


def test_a_limit_that_nothing_keeps_skips_nothing(model, calibrated, caplog):
    _, samples = calibrated
    config = calibrate(
        model,
        tokens(300),
        geometries=SMALL,
        levels=(),
        max_kl={"prefill": 0.0},
        validation=samples,
        progress=False,
    )
    assert config.max_dropped_mass == {"prefill": 0.0}
    assert "the least skipping keeps in prefill" in caplog.text
    set_sparse_attention(model, config, min_length=0)
    with torch.no_grad(), collect_stats(model) as stats:
        cache = model(samples[0][None, :-1], use_cache=True).past_key_values
        model(samples[0][None, -1:], past_key_values=cache)
    assert stats.sparsity("prefill") == 0.0
    assert stats.sparsity("decode") > 0.1


def test_the_smallest_level_within_the_limit(model, calibrated):
    config, samples = calibrated
    settings = {"method": "bsfa", "geometries": SMALL, "levels": (1, 4, 12), "progress": False}
    bsfa = [replace(config, method="bsfa", level=k, geometry=SMALL) for k in (1, 4, 12)]
    few, some, _ = HeldOut(model, samples).costs(bsfa, "prefill")
    assert few.kl > some.kl
    middle = (few.kl + some.kl) / 2
    torch.manual_seed(0)
    data = tokens(300, 2)
    chosen = [
        calibrate(model, data, max_kl={"prefill": limit}, validation=samples, **settings)
        for limit in (middle, 100.0)
    ]
    assert [each.level for each in chosen] == [4, 1]
    rows = {row["level"]: row["kl"] for row in chosen[0].provenance["level_costs"]}
    assert rows[4] <= middle < rows[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_kl": -1}, r"max_kl\['prefill'\]: expected a number in \[0, inf\), got -1"),
        ({"max_ppl_increase": {"training": 1}}, r"max_ppl_increase: expected phases of"),
        ({"max_kl": 1, "target_sparsity": 0.5}, "target_sparsity: expected None or several"),
        ({"max_kl": 1}, "validation: expected held-out data .* got neither"),
        ({"max_kl": 1, "validation": [[3] * 100]}, "samples of at least 128 tokens, got none"),
        ({"granularity": "block"}, r"granularity: expected one of .*got 'block'"),
        ({"geometries": "64"}, "geometry: expected '<rows>x<keys>'"),
    ],
)
def test_bad_arguments(model, settings, message):
    with pytest.raises(ValueError, match=message):
        calibrate(model, tokens(200), progress=False, **settings)
