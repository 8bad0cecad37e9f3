"""What a calibrated config carries: fits by geometry, and both methods from one file."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_models import build, token_ids
from torch._dynamo.testing import CompileCounter

import hf_sparse_attention as hsa
from hf_sparse_attention import attention, settings
from hf_sparse_attention.backends import cpu
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.fits import Fit, PhaseFit
from hf_sparse_attention.methods import METHODS
from hf_sparse_attention.thresholds import Thresholds
from hf_sparse_attention.types import PHASES, AttentionCall, BlockGeometry

SCHEMA_1 = Path(__file__).parent / "data" / "schema1"
FINE, SQUARE, COARSE = (BlockGeometry.from_name(name) for name in ("64x1", "64x64", "64x128"))


def fit(geometry, a, **settings):
    settings = {"b": 5.0, "lengths": (512, 2048), "sparsity": (0.3, 0.7), **settings}
    return Fit(geometry, {phase: PhaseFit(a=a, **settings) for phase in PHASES})


FITS = {g.name: fit(g, a) for g, a in ((COARSE, 1.0), (SQUARE, 2.0), (FINE, 4.0))}


def tables(layers=2, heads=4, blocks=4):
    """BSFA's, and coefficients by head, for all three geometries."""
    tensors = {}
    for name in FITS:
        for phase in PHASES:
            spread = torch.tensor([50.0, -50.0]).view(2, 1, 1, 1)  # the second level keeps more
            tensors[f"{name}.{phase}.T"] = spread + torch.randn(2, layers, heads, blocks)
            tensors[f"{name}.{phase}.log_a"] = torch.randn(layers, heads)
            tensors[f"{name}.{phase}.b"] = torch.rand(layers, heads)
    geometries = {name: each.geometry for name, each in FITS.items()}
    return Thresholds(tensors, geometries, levels=[1, 3])


CALIBRATED = SparseAttentionConfig(fits=FITS, target_sparsity=0.5, min_length=0)


def call_of(q_len=128, kv_len=128, heads=4, **more):
    q, k = torch.randn(1, heads, q_len, 8), torch.randn(1, 2, kv_len, 8)
    return AttentionCall(q, k, k, scale=1.0, **more)


def log_factor(config, call, geometry, layer=0):
    """ln(lambda * L) of each query head."""
    rule = METHODS["blasst"].rule(config, layer, call, geometry)
    return (rule.log_lambda + math.log(call.k.shape[2])).expand(1, call.q.shape[1])[0]


# JSON


def test_fits_round_trip():
    full = PhaseFit(
        a=2.0,
        b=3.0,
        lengths=(512, 8192),
        sparsity=(0.3, 0.7),
        r2=0.9,
        residual=0.1,
        budget={"a": 0.1, "b": 2.0},
        target_sparsity=0.4,
        predicted={"512": {"0.3": 0.31}},
        held_out=[{"length": 1024, "target": 0.3, "measured": 0.29}],
    )
    config = replace(CALIBRATED, fits={"64x1": Fit(FINE, {"decode": full})}, granularity="head")
    assert SparseAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_other_engines_read_the_fit_of_large_blocks():
    config = replace(CALIBRATED, threshold_scale_factor={"decode": 7.0})
    group = config.to_dict()["config_groups"]["group_0"]
    assert group["threshold_scale_factor"]["prefill"] == {"a": 1.0, "b": 5.0}
    assert group["threshold_scale_factor"]["decode"] == {"a": 7.0, "b": 0.0}
    assert group["target_sparsity"] == {"prefill": 0.5, "decode": 0.5}
    assert SparseAttentionConfig.from_dict(config.to_dict()) == config
    # BSFA runs here, and the same file still serves an engine that has BLASST only.
    group = replace(config, method="bsfa").to_dict()["config_groups"]["group_0"]
    assert group["threshold_scale_factor"]["decode"] == {"a": 1.0, "b": 5.0}


def test_other_engines_read_the_target_chosen_for_large_blocks():
    fits = {**FITS, "64x128": fit(COARSE, 1.0, target_sparsity=0.3)}
    config = SparseAttentionConfig(fits=fits)
    group = config.to_dict()["config_groups"]["group_0"]
    assert group["target_sparsity"] == {"prefill": 0.3, "decode": 0.3}
    assert SparseAttentionConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("fits", "message"),
    [
        (3, "fits: expected a dict by geometry, got 3"),
        ({"64x1": {"prefill": {"a": 1}}}, "expected a dict with a 'geometry'"),
        ({"64x1": {"geometry": "64x64"}}, "'64x1' under that name, got that of '64x64'"),
        ({"64x1": {"geometry": "64x1", "x": 1}}, r"fits: expected keys .*got \['x'\]"),
        ({"64x1": {"geometry": "64x1", "decode": {"b": 1}}}, r"\['64x1'\]\['decode'\]: expected"),
        ({"64x1": {"geometry": "64x1", "decode": {"a": math.nan}}}, "a: expected .*got nan"),
        ({"64x1": {"geometry": "64x1", "decode": {"a": 1, "c": 1}}}, r"got \['c'\]"),
        ({"64x1": {"geometry": "64x1", "decode": {"a": 1, "lengths": [2, 1]}}}, "lengths: exp"),
        ({"64x1": {"geometry": "64x1", "decode": {"a": 1, "budget": {"a": 1}}}}, "budget: exp"),
        (
            {"64x1": {"geometry": "64x1", "decode": {"a": 1, "target_sparsity": 1.0}}},
            r"target_sparsity: expected .*\[0, 1\), got 1.0",
        ),
    ],
)
def test_bad_fits_name_expected_and_got(fits, message):
    with pytest.raises(ValueError, match=message):
        SparseAttentionConfig(fits=fits)


# Schema version 1: files that version's code wrote


def test_a_calibrated_file_of_schema_1_runs_as_it_did():
    config = SparseAttentionConfig.from_pretrained(SCHEMA_1 / "blasst")
    written = json.loads((SCHEMA_1 / "blasst" / "config.json").read_text())
    group = written["sparse_attention_config"]["config_groups"]["group_0"]
    assert config.schema_version == 2
    (name,) = config.fits
    assert config.geometry == config.fits[name].geometry == BlockGeometry(4, 8)
    assert config.threshold_scale_factor is None
    for phase, length in (("prefill", 256), ("decode", 300)):
        old = group["threshold_scale_factor"][phase]
        call = call_of(length if phase == "prefill" else 1, length)
        expected = math.log(old["a"]) + old["b"] * 0.5
        assert log_factor(config, call, config.geometry)[0] == pytest.approx(expected, rel=1e-6)
    prefill = config.fits[name].phases["prefill"]
    assert prefill.lengths == (128, 256)
    assert prefill.sparsity == (0.3, 0.7)
    assert prefill.r2 == pytest.approx(0.84, abs=0.005)
    assert "fit" not in config.provenance
    assert config.provenance["samples"] == 3
    again = config.to_dict()
    assert SparseAttentionConfig.from_dict(again) == config
    kept = again["config_groups"]["group_0"]["threshold_scale_factor"]
    assert kept == group["threshold_scale_factor"], "other engines still read the same"


def test_thresholds_of_schema_1_run_as_they_did():
    config = SparseAttentionConfig.from_pretrained(SCHEMA_1 / "bsfa")
    assert config.level == 2
    assert set(config.tables.tensors) == {"16x16.prefill.T", "16x16.decode.T"}
    call = call_of(128, 128)
    rule = METHODS["bsfa"].rule(config, 1, call, config.geometry)
    expected = config.tables.table("16x16", "prefill")[1, 1, :, :8]
    torch.testing.assert_close(rule.block_threshold[0], expected)


def test_settings_of_schema_1_by_hand_stay_by_hand():
    config = SparseAttentionConfig.from_pretrained(SCHEMA_1 / "plain")
    assert config.fits == {}
    assert config.threshold_scale_factor == {"prefill": {"a": 400.0, "b": 0.0}}
    assert config.max_dropped_mass == {"decode": 0.1}


def test_a_factor_set_after_calibration_stays_set():
    data = json.loads((SCHEMA_1 / "blasst" / "config.json").read_text())["sparse_attention_config"]
    data["config_groups"]["group_0"]["threshold_scale_factor"]["decode"] = {"a": 3.0, "b": 0.0}
    config = SparseAttentionConfig.from_dict(data)
    assert config.threshold_scale_factor == {"decode": {"a": 3.0, "b": 0.0}}
    assert set(config.fits["4x8"].phases) == {"prefill"}


# Which geometry runs


@pytest.mark.usefixtures("cpu_kernel")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "64x1"),
        ({"backend": "reference"}, "64x64"),
        ({"geometry": "64x128"}, "64x128"),
        ({"fits": {"64x128": FITS["64x128"]}}, "64x128"),
        ({"fits": {}, "threshold_scale_factor": 9.0}, "64x64"),
    ],
    ids=["kernel-prefers", "plain-torch", "as-set", "only-one", "uncalibrated"],
)
def test_the_geometry_that_runs(changes, expected):
    model = build(tiny_models.llama)
    hsa.set_sparse_attention(model, replace(CALIBRATED, **changes))
    with torch.no_grad(), hsa.collect_stats(model) as stats:
        model(token_ids(1, 150))
    assert stats.geometries("prefill") == [expected]
    assert stats.geometries("decode") == []
    assert stats.to_dict()["prefill"]["geometries"] == [expected]
    assert f"blocks in prefill: {expected}" in stats.table()


def test_each_geometry_runs_its_own_fit(monkeypatch):
    monkeypatch.setattr(attention, "attend", lambda call, rule, geometry, *a, **k: seen(rule))
    found = []

    def seen(rule):
        found.append(float(rule.log_lambda))
        raise StopIteration

    model = build(tiny_models.llama)
    for geometry, a in ((None, 4.0), ("64x64", 2.0), ("64x128", 1.0)):
        config = replace(CALIBRATED, geometry=geometry)
        if geometry is None and cpu.available() is not None:
            continue
        hsa.set_sparse_attention(model, config)
        with pytest.raises(StopIteration), torch.no_grad():
            model(token_ids(1, 150))
        assert found[-1] == pytest.approx(math.log(a) + 5.0 * 0.5 - math.log(150), rel=1e-5)


def test_another_geometry_than_the_calibrated_is_refused():
    config = replace(CALIBRATED, geometry=BlockGeometry(64, 64, "ascending"))
    with pytest.raises(ValueError, match=r"expected 64x128 .* or 64x64 .sink_diagonal.*ascending"):
        METHODS["blasst"].check(config)
    METHODS["blasst"].check(replace(config, threshold_scale_factor=3.0))  # by hand: as you like


def test_a_geometrys_own_target_holds_unless_another_is_set():
    fits = {**FITS, "64x1": fit(FINE, 4.0, target_sparsity=0.6)}
    config = SparseAttentionConfig(fits=fits, target_sparsity={"decode": 0.4}, geometry=FINE)
    prefill = log_factor(config, call_of(), FINE)[0]
    decode = log_factor(config, call_of(1), FINE)[0]
    assert prefill == pytest.approx(math.log(4.0) + 5.0 * 0.6)
    assert decode == pytest.approx(math.log(4.0) + 5.0 * 0.4)


# Layers and heads with coefficients of their own


@pytest.mark.parametrize("phase", PHASES)
def test_coefficients_of_each_head(phase):
    config = replace(CALIBRATED, granularity="head", tables=tables(), geometry=SQUARE)
    log_a, b = config.tables.coefficients("64x64", phase)
    call = call_of(128 if phase == "prefill" else 1)
    actual = log_factor(config, call, SQUARE, layer=1)
    torch.testing.assert_close(actual, log_a[1] + 0.5 * b[1])
    # A rank that holds heads 2 and 3 gets theirs.
    some = log_factor(config, replace(call, q=call.q[:, 2:], first_head=2), SQUARE, 1)
    torch.testing.assert_close(some, actual[2:])
    with pytest.raises(ValueError, match=r"layer 1 with 6 heads.*got 2 layers with 4 heads"):
        log_factor(config, replace(call, first_head=2), SQUARE, 1)


def test_bsfa_gives_a_rank_its_own_heads():
    config = replace(CALIBRATED, method="bsfa", tables=tables())
    call = call_of(heads=4)
    share = replace(call, q=call.q[:, 2:], first_head=2)
    rule = METHODS["bsfa"].rule(config, 0, share, FINE)
    everything = METHODS["bsfa"].rule(config, 0, call, FINE)
    torch.testing.assert_close(rule.block_threshold, everything.block_threshold[:, 2:])


def test_heads_without_coefficients_are_refused():
    config = replace(CALIBRATED, granularity="layer")
    with pytest.raises(ValueError, match=r"for each layer on 64x64, got none; calibrate"):
        METHODS["blasst"].check(config)
    pinned = replace(config, thresholds_file={"name": "t.safetensors", "sha256": "0"})
    with pytest.raises(ValueError, match=r"t\.safetensors to be loaded"):
        METHODS["blasst"].check(pinned)
    by_hand = replace(config, threshold_scale_factor=3.0)
    METHODS["blasst"].check(by_hand)
    assert log_factor(by_hand, call_of(), SQUARE)[0] == pytest.approx(math.log(3.0))


def test_coefficients_by_head_need_a_layer_number():
    config = replace(CALIBRATED, granularity="head", tables=tables())
    found = settings.LayerSettings.of(torch.nn.Linear(1, 1), config)
    assert "no layer index" in found.dense_reason


def test_targets_by_head_change_without_recompiling():
    torch._dynamo.reset()
    counter = CompileCounter()
    holder = torch.nn.Module()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(q, k):
        call = AttentionCall(q, k, k, scale=1.0)
        return METHODS["blasst"].rule(holder.config, 1, call, SQUARE).log_lambda

    base = replace(CALIBRATED, granularity="head", tables=tables(), geometry=SQUARE)
    results = []
    for target in (0.3, 0.5, 0.7):
        holder.config = replace(base, target_sparsity=target)
        METHODS["blasst"].prepare(holder.config, torch.device("cpu"), SQUARE)
        call = call_of()
        results.append(compiled(call.q, call.k))
        expected = METHODS["blasst"].rule(holder.config, 1, call, SQUARE).log_lambda
        torch.testing.assert_close(results[-1], expected)
    assert counter.frame_count == 1
    assert not torch.equal(results[0], results[1])


# Both methods from one calibration


def test_switching_methods_and_levels_needs_no_calibration(tmp_path):
    model = build(tiny_models.llama)
    hsa.set_sparse_attention(model, replace(CALIBRATED, tables=tables(), granularity="head"))
    bsfa = hsa.set_sparse_attention(model, "bsfa", level=1)
    assert (bsfa.method, bsfa.level) == ("bsfa", 1)
    ids = token_ids(1, 150)
    with torch.no_grad():
        first = model(ids).logits
        hsa.set_sparse_attention(model, level=3)
        assert not torch.equal(model(ids).logits, first)
        again = hsa.set_sparse_attention(model, "blasst", target_sparsity={"prefill": 0.6})
        assert again.target_sparsity == {"prefill": 0.6, "decode": 0.5}
        expected = model(ids).logits
    assert not torch.equal(expected, first)
    model.save_pretrained(tmp_path)
    again.save_pretrained(tmp_path)
    for method, level in (("blasst", None), ("bsfa", 1)):
        loaded = type(model).from_pretrained(tmp_path, attn_implementation=method).eval()
        if level:
            hsa.set_sparse_attention(loaded, level=level)
        with torch.no_grad():
            actual = loaded(ids).logits
        torch.testing.assert_close(actual, expected if method == "blasst" else first)


def test_a_target_takes_the_place_of_a_constant_factor():
    model = build(tiny_models.llama)
    hsa.set_sparse_attention(model, CALIBRATED)
    by_hand = hsa.set_sparse_attention(model, threshold_scale_factor=9.0)
    assert by_hand.scale_factor("prefill", SQUARE) == 9.0
    config = hsa.set_sparse_attention(model, target_sparsity={"prefill": 0.4})
    assert config.scale_factor("prefill", SQUARE) == pytest.approx(2.0 * math.exp(5.0 * 0.4))
    assert config.scale_factor("decode", SQUARE) == 9.0


def test_one_target_cannot_be_moved():
    model = build(tiny_models.llama)
    config = replace(CALIBRATED, fits={"64x64": fit(SQUARE, 2.0, b=0.0)})
    hsa.set_sparse_attention(model, config)
    with pytest.raises(ValueError, match=r"target_sparsity: expected a fit .* for prefill"):
        hsa.set_sparse_attention(model, target_sparsity=0.4)


# Beyond what was calibrated


@pytest.fixture
def said(monkeypatch, caplog):
    monkeypatch.setattr(settings, "_said", set())
    caplog.set_level(logging.WARNING)
    return caplog


def test_a_target_beyond_the_calibrated_ones_is_said_once(said):
    model = build(tiny_models.llama)
    for _ in range(2):
        targets = {"prefill": 0.9, "decode": 0.5}
        hsa.set_sparse_attention(model, replace(CALIBRATED, target_sparsity=targets))
        hsa.set_sparse_attention(model, replace(CALIBRATED, target_sparsity=0.7))
    messages = [record.message for record in said.records if "extrapolated" in record.message]
    assert len(messages) == 3  # one a geometry
    assert all("0.9 for prefill" in message for message in messages)
    assert any("64x1 was calibrated from 0.3 to 0.7" in message for message in messages)


@pytest.mark.parametrize(
    ("length", "expected"),
    [(100, "shorter"), (400, None), (600, None), (2800, None), (3000, "longer")],
)
def test_a_length_beyond_the_calibrated_ones_is_said_once(said, length, expected):
    config = replace(CALIBRATED, geometry=SQUARE)
    for _ in range(2):
        settings.warn_of_length(config, SQUARE, call_of(1, length))
    messages = [record.message for record in said.records]
    assert len(messages) == (expected is not None)
    if expected:
        assert f"{length} keys in decode is extrapolated" in messages[0]
        assert "64x64 was calibrated from 512 to 2048" in messages[0]


def test_a_length_that_only_a_tensor_knows_is_not_waited_for(said):
    config = replace(CALIBRATED, geometry=SQUARE)
    call = call_of(1, 9000, q_offset=torch.tensor([700]))
    settings.warn_of_length(config, SQUARE, call)
    by_hand = replace(config, threshold_scale_factor=3.0)
    settings.warn_of_length(by_hand, SQUARE, call_of(1, 9000))
    assert not said.records


def test_the_model_says_when_a_request_is_too_long(said):
    model = build(tiny_models.llama)
    fits = {"64x64": fit(SQUARE, 2.0, lengths=(16, 32))}
    hsa.set_sparse_attention(model, replace(CALIBRATED, fits=fits))
    with torch.no_grad():
        model(token_ids(1, 150))
    assert any("150 keys in prefill is extrapolated" in r.message for r in said.records)
