"""Sparsity shared out among layers and heads, and what is predicted of it."""

import math

import pytest
import tiny_models
import torch

from hf_sparse_attention import calibrate, collect_stats, set_sparse_attention
from hf_sparse_attention.calibration import tallies
from hf_sparse_attention.calibration.allocation import coefficients, share
from hf_sparse_attention.calibration.attach import attached
from hf_sparse_attention.calibration.curves import Curves, curves_of, rows_of, table_of
from hf_sparse_attention.calibration.fitting import lengths_of
from hf_sparse_attention.calibration.observation import Observations
from hf_sparse_attention.calibration.prediction import sparsities
from hf_sparse_attention.calibration.progress import run
from hf_sparse_attention.types import PHASES, AttentionCall, BlockGeometry

TARGETS = (0.4, 0.1, 0.2, 0.3)
SMALL = BlockGeometry(4, 8)


def bumps(centres, masses=None, blocks=100_000):
    """A row for each centre: gaps spread around it; blocks that hold `exp(u - 10)` of mass, times
    its row's factor. One block in ten is never skipped.
    """
    u = tallies.U_MIN + (torch.arange(tallies.U_BINS) + 0.5) / tallies.BINS_PER_NAT
    gaps = torch.stack([torch.exp(-(((u - c) / 3) ** 2)) for c in centres]).double()
    gaps = (blocks * gaps / gaps.sum(1, keepdim=True)).round()
    factors = torch.tensor(masses or [1.0] * len(centres)).double()[:, None]
    mass = gaps * (u.double() - 10).exp() * factors
    last = torch.full((len(centres), 1), blocks / 10).double()
    return Curves(torch.cat([gaps, last], 1), torch.cat([mass, last], 1))


class Told(Observations):
    """Observations of made calls: layers of 4 and of 2 query heads, groups of 2, layer 1 unseen."""

    def __init__(self):
        super().__init__([SMALL])
        for layer, heads in ((0, 4), (2, 2)):
            for length in (120, 200):
                q, k = torch.randn(1, heads, length, 8), torch.randn(1, heads // 2, length, 8)
                q = q * torch.tensor([1.0, 4.0]).repeat(heads // 2).view(1, heads, 1, 1)
                self.observe(layer, AttentionCall(q, k, torch.randn_like(k), scale=0.5))


@pytest.fixture
def told():
    return Told()


# Curves


def test_a_curve_is_inverted(told):
    curves = curves_of(told, "4x8", "prefill", 200, "head")
    assert float(curves.largest.min()) > 0.45
    for target in (0.1, 0.25, 0.45):
        wanted = torch.full((6,), target)
        found = curves.sparsity(curves.log_factor(wanted))
        torch.testing.assert_close(found, wanted.double(), atol=1e-6, rtol=0)
    everything = curves.sparsity(curves.log_factor(torch.ones(6)))
    torch.testing.assert_close(everything, curves.largest)


def test_all_rows_together_are_the_global_curve(told):
    for phase, length in (("prefill", 200), ("decode", told.lengths("decode")[-1])):
        for x in (-2.0, 1.0, 3.0):
            x = torch.tensor([x])
            totals = [
                (each.total_sparsity(x), each.total_dropped(x))
                for granularity in ("global", "layer", "head")
                for each in [curves_of(told, "4x8", phase, length, granularity)]
            ]
            assert totals[0] == pytest.approx(totals[1])
            assert totals[0] == pytest.approx(totals[2])


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_tables_hold_rows_by_global_head(told, phase, granularity):
    count = {"layer": 2, "head": 6 if phase == "prefill" else 3}[granularity]
    rows = torch.arange(1.0, count + 1)
    table = table_of(rows, told, "4x8", phase, granularity)
    assert table.shape == (3, 4)
    assert table[1].tolist() == [-math.inf] * 4, "layer 1 was not seen"
    assert table[2, 2:].tolist() == [-math.inf] * 2, "layer 2 has two heads"
    expected = {
        ("layer", "prefill"): [[1, 1, 1, 1], [2, 2]],
        ("layer", "decode"): [[1, 1, 1, 1], [2, 2]],
        ("head", "prefill"): [[1, 2, 3, 4], [5, 6]],
        ("head", "decode"): [[1, 1, 2, 2], [3, 3]],
    }[granularity, phase]
    assert [table[0].tolist(), table[2, :2].tolist()] == expected
    assert torch.equal(rows_of(table, told, "4x8", phase, granularity), rows)


# Sharing


def test_the_next_block_costs_every_row_the_same():
    curves = bumps(centres=[-6.0, -2.0, 2.0], masses=[1.0, 20.0, 1.0])
    for target in (0.3, 0.5, 0.7):
        log_factors = share(curves, target)
        assert curves.total_sparsity(log_factors) == pytest.approx(target, abs=0.01)
        # The mass of a block at the edge is exp(u) times its row's factor.
        edges = log_factors + torch.tensor([1.0, 20.0, 1.0]).log()
        # Those rows alone that have blocks left.
        left = curves.sparsity(log_factors) < curves.largest - 1e-3
        assert left.sum() >= 2
        assert float(edges[left].max() - edges[left].min()) < 0.5, edges
        same = curves.log_factor(torch.full((3,), target))
        assert curves.total_dropped(log_factors) < 0.5 * curves.total_dropped(same)


def test_no_threshold_lies_beyond_all_blocks_that_were_seen():
    """Where a row has nothing costly, its lambda must not be 1: other text may have."""
    curves = bumps(centres=[-20.0, 2.0])
    log_factors = share(curves, 0.7)
    assert curves.sparsity(log_factors)[0] == curves.largest[0]
    assert -14.0 < log_factors[0] < -4.0


def test_rows_of_one_kind_share_alike():
    curves = bumps(centres=[0.0, 0.0])
    first, second = share(curves, 0.5).tolist()
    assert (
        first == second == pytest.approx(float(curves.log_factor(torch.tensor([0.5]))[0]), abs=0.1)
    )


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_coefficients_skip_the_target_and_drop_less(told, phase, granularity):
    log_a, b = coefficients(told, "4x8", phase, TARGETS, granularity)
    assert log_a.shape == b.shape == (3, 4)
    assert log_a[1].tolist() == [-math.inf] * 4
    assert b[1].tolist() == [0.0] * 4
    seen = log_a[0]
    assert (len(set(seen.tolist())) > 1) == (granularity == "head")
    for target in TARGETS:
        sparsity, dropped, alike = 0.0, 0.0, 0.0
        lengths = lengths_of(told, "4x8", phase, granularity)
        for length, curves in lengths.items():
            rows = rows_of(log_a + b * target, told, "4x8", phase, granularity)
            sparsity += curves.total_sparsity(rows) / len(lengths)
            dropped += curves.total_dropped(rows)
            one = curves_of(told, "4x8", phase, length)
            same = one.log_factor(torch.tensor([curves.total_sparsity(rows)]))
            alike += one.total_dropped(same)
        assert sparsity == pytest.approx(target, abs=0.05)
        assert dropped < 1.02 * alike


def test_one_target_gives_coefficients_without_an_exponent(told):
    _, b = coefficients(told, "4x8", "prefill", [0.4], "head")
    assert not b.any()


# Whole models


def tokens(n, count=1):
    return [torch.randint(3, tiny_models.VOCABULARY, (n,)) for _ in range(count)]


@pytest.mark.parametrize("granularity", ["global", "layer", "head"])
def test_predicted_held_out_and_running_sparsity_agree(granularity):
    model = tiny_models.llama().eval()
    data, other = tokens(320, 2), tokens(400)
    config = calibrate(
        model,
        data,
        granularity=granularity,
        geometries=SMALL,
        levels=(),
        validation=other,
        progress=False,
    )
    assert config.granularity == granularity
    assert (config.tables is None) == (granularity == "global")
    fit = config.fits["4x8"].phases["prefill"]
    assert fit.predicted["320"].keys() == {"0.3", "0.4", "0.5", "0.6", "0.7"}
    for target in (0.3, 0.5):
        set_sparse_attention(model, config, target_sparsity=target, min_length=0)
        predicted = fit.predicted["320"][f"{target:g}"]
        assert predicted == pytest.approx(target, abs=0.04)
        (held_out,) = [r["measured"] for r in fit.held_out if r["target"] == target]
        for samples, expected in ((data, predicted), (other, held_out)):
            with torch.no_grad(), collect_stats(model) as stats:
                for ids in samples:
                    model(input_ids=ids[None])
            assert stats.sparsity("prefill") == pytest.approx(expected, abs=0.01)
    assert {row["length"] for row in fit.held_out} == {400}
    assert config.provenance["validation_lengths"] == [400]


def test_sparsities_are_those_of_each_heads_own_factors():
    """Not of the global fit that stands beside them."""
    model = tiny_models.llama().eval()
    config = calibrate(
        model, tokens(300), granularity="head", geometries=SMALL, levels=(), progress=False
    )
    seen = Observations([SMALL])
    with attached(model, seen):
        run(model, tokens(300), seen, progress=False)
    before = sparsities(config, seen, "4x8", "prefill", [0.5])
    config.tables.tensors["4x8.prefill.log_a"][0] = -math.inf
    after = sparsities(config, seen, "4x8", "prefill", [0.5])
    assert after[0][2] < 0.7 * before[0][2]
