"""The fit, and calibration of whole models against the backend that runs and unseen inputs."""

import math
from dataclasses import replace
from typing import ClassVar

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from hf_sparse_attention import calibrate, collect_stats, set_sparse_attention
from hf_sparse_attention.calibration import tallies
from hf_sparse_attention.calibration.attach import OBSERVER
from hf_sparse_attention.calibration.fitting import fit_blasst
from hf_sparse_attention.settings import ATTRIBUTE as SETTINGS
from hf_sparse_attention.types import BlockGeometry

# The fit


class Made:
    """Histograms in which sparsity s needs exactly the scale factor a * exp(b * s)."""

    geometries: ClassVar = {"64x64": BlockGeometry()}
    layers: ClassVar = [0]
    heads: ClassVar = {0: 1}

    def __init__(self, a, b, lengths=(1000, 2000)):
        self.a, self.b, self.n = a, b, lengths

    def lengths(self, phase):
        return list(self.n)

    def gaps(self, geometry, phase, layer, length):
        edges = tallies.U_MIN + torch.arange(tallies.U_BINS + 1) / tallies.BINS_PER_NAT
        below = ((edges - math.log(self.a)) / self.b).clamp(0, 0.9)
        counts = torch.zeros(tallies.U_BINS + 1, dtype=torch.int64)
        counts[:-1] = (below.diff() * 1e9).round().long()
        counts[-1] = 10**9 - counts.sum()
        return counts[None]

    def mass(self, geometry, phase, layer, length):
        return self.gaps(geometry, phase, layer, length).double() / 1e9

    def budget(self, geometry, phase, layer, length):
        """The budget rule skips s with eps = 1e-4 * exp(10 * s)."""
        skipped = [1e9 * max(0.0, math.log(eps / 1e-4) / 10) for eps in tallies.BUDGET_GRID]
        return torch.tensor([[10**9, *map(round, skipped)]])


def test_the_fit_recovers_its_own_formula():
    fit = fit_blasst(Made(a=2.0, b=6.0), "64x64", [0.3, 0.5, 0.7])
    for phase in ("prefill", "decode"):
        found = fit.phases[phase]
        assert (found.a, found.b) == pytest.approx((2.0, 6.0), rel=2e-2)
        assert found.r2 > 0.999
        assert found.residual < 0.05  # a bin is 1/16 wide
        assert (found.lengths, found.sparsity) == ((1000, 2000), (0.3, 0.7))
        assert found.max_dropped_mass(0.5) == pytest.approx(1e-4 * math.exp(5.0), rel=1e-3)


def test_decode_is_fitted_where_requests_of_these_lengths_decode():
    """Positions below half of the shortest sample are not the ones that run."""

    class WithShortPositions(Made):
        def lengths(self, phase):
            return [1000, 2000] if phase == "prefill" else [64, 499, 500, 1000, 2000]

    fit = fit_blasst(WithShortPositions(a=2.0, b=6.0), "64x64", [0.5])
    assert fit.phases["decode"].lengths == (500, 2000)
    assert fit.phases["prefill"].lengths == (1000, 2000)


def test_one_target_gives_version_one():
    fit = fit_blasst(Made(a=2.0, b=6.0), "64x64", [0.5]).phases["decode"]
    assert fit.b == 0.0
    assert fit.a == pytest.approx(2.0 * math.exp(3.0), rel=1e-2)
    assert fit.r2 == pytest.approx(1.0), "lambda is proportional to 1 / L here"
    one_length = fit_blasst(Made(a=2.0, b=6.0, lengths=[1000]), "64x64", [0.5])
    assert one_length.phases["decode"].r2 is None


def test_a_target_out_of_reach_is_refused():
    with pytest.raises(ValueError, match=r"expected less than 0\.90 in prefill.*got \[0.95\]"):
        fit_blasst(Made(a=2.0, b=6.0), "64x64", [0.95])


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


def test_the_level_nearest_to_the_target_runs(model):
    """Of 30 blocks in a row, 2, 8 and 30 kept besides sink and diagonal skip 76%, 42% and none."""
    settings = {"levels": (2, 8, 30), "geometries": BlockGeometry(16, 16), "progress": False}
    settings["method"] = "bsfa"
    data = tokens(480, 2)
    for target, level in ((0.8, 2), (0.5, 8), (0.05, 30), (None, 8)):
        assert calibrate(model, data, target_sparsity=target, **settings).level == level
    assert calibrate(model, data, target_sparsity=[0.75, 0.3], **settings).level == 2


def test_bsfa_on_unseen_inputs(model):
    """Predicted density as in section 5.1 of the paper: k, sink and diagonal of the visible."""
    geometry = BlockGeometry(16, 16)
    config = calibrate(
        model, tokens(480, 6), method="bsfa", levels=(4, 8), geometries=geometry, progress=False
    )
    assert config.tables.table("16x16", "prefill").shape == (2, 2, 4, 30)
    assert config.levels == [4, 8]
    for level in (4, 8):
        set_sparse_attention(model, config, level=level, min_length=0, backend="reference")
        stats = run(model)
        kept = sum(min(i + 1, level + 2) for i in range(30))
        predicted = config.provenance["predicted_sparsity"]["16x16"]["prefill"][str(level)]
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
        geometries=geometry,
        progress=False,
    )
    assert config.target_sparsity == {"prefill": 0.5, "decode": 0.5}
    assert (config.fits["4x16"].phases["prefill"].b == 0) == (targets == 0.5)
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
        model,
        tokens(200, 2),
        method="bsfa",
        levels=(1, 2),
        geometries=BlockGeometry(16, 16),
        progress=False,
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
    calibrate(model, tokens(64), method="bsfa", levels=(1,), geometries="16x16", progress=False)
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
        model, tokens(200), geometries=BlockGeometry(4, 8), levels=(1,), progress=False
    )
    data = tokens(200)
    expected = calibrate(model, data, geometries=BlockGeometry(4, 8), levels=(1,), progress=False)
    set_sparse_attention(model, config, min_length=0, backend="reference")
    actual = calibrate(model, data, geometries=BlockGeometry(4, 8), levels=(1,), progress=False)
    torch.testing.assert_close(actual.tables.tensors, expected.tables.tensors)
    other = config.tables.table("4x8", "prefill")
    assert not torch.equal(actual.tables.table("4x8", "prefill"), other)


def test_lengths_cut_the_samples(model):
    config = calibrate(
        model,
        tokens(300),
        method="bsfa",
        lengths=(64, 256, 1000),
        levels=(1,),
        geometries=BlockGeometry(16, 16),
        progress=False,
    )
    assert config.provenance["lengths"] == [64, 256]
    assert config.tables.table("16x16", "prefill").shape[-1] == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "flash"}, "method: expected one of .*got 'flash'"),
        ({"data": []}, "expected at least one sample, got none"),
        ({"method": "bsfa", "data": [[3] * 40]}, "samples of at least 64 tokens"),
        ({"lengths": [5000]}, "samples of at least 5000 tokens, the longest found has 80"),
        ({"method": "bsfa", "levels": ()}, "levels: expected at least one for method 'bsfa'"),
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
