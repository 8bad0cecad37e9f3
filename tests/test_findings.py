"""What docs/findings.md rests on: any order counted as the reference does, and bounds that hold."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import findings_page, int8_decode
from benchmarks.finding_blocks import (
    ORDERS,
    all_gaps,
    free_gaps,
    gaps,
    gaps_to_the_end,
    losses,
    prefill_rows,
)
from benchmarks.finding_bounds import BOUNDS
from hf_sparse_attention.backends import reference
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

LENGTH = 200


def one_layer() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, LENGTH, 16, generator=generator) for h in (4, 2, 2))
    return q * 6, k, v


@pytest.mark.parametrize(
    ("name", "order"),
    [("ascending", "ascending"), ("sink first", "sink_diagonal"), ("reverse", "descending")],
)
@pytest.mark.parametrize("lam", [0.3, 0.9])
def test_losses_are_those_of_the_reference(name: str, order: str, lam: float) -> None:
    geometry = BlockGeometry(8, 16, order)
    q, k, v = one_layer()
    call = AttentionCall(q, k, v, scale=q.shape[-1] ** -0.5)
    got, all_of_it = (
        reference.run(call, rule, geometry) for rule in (SkipRule.blasst(lam), SkipRule.never())
    )
    visited, skipped = got.counts.sum((0, 1)).tolist()
    (told,) = losses({0: (q, k, v)}, geometry, ORDERS[name], [lam])
    assert skipped > 0
    assert told["sparsity"] == pytest.approx(skipped / visited)
    error = (got.out - all_of_it.out).norm() / all_of_it.out.norm()
    # Both are float32 sums over at most 200 keys, in another order.
    assert told["error"] == pytest.approx(error.item(), rel=1e-4)
    dropped = -torch.expm1(got.lse - all_of_it.lse)
    assert told["dropped_max"] == pytest.approx(dropped.max().item(), abs=1e-5)


def test_no_order_skips_more_than_the_known_final_max() -> None:
    geometry = BlockGeometry(16, 32)
    for _, blocks in prefill_rows(one_layer(), geometry):
        most = gaps_to_the_end(blocks)
        for visit in ORDERS.values():
            order = visit(blocks)
            assert sorted(order) == blocks.seen
            own = gaps(blocks, order)
            assert (own >= most[:, order] - 1e-6).all()


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_hold_and_are_not_idle(name: str) -> None:
    q, k, _ = (x.double() for x in one_layer())
    keys = k[0].repeat_interleave(2, 0)
    scores = torch.nn.functional.pad(
        q[0] @ keys.transpose(1, 2), (0, -LENGTH % 32), value=-math.inf
    )
    top = scores.view(4, LENGTH, -1, 32).amax(-1)
    bound = BOUNDS[name](keys, 32)(q[0])
    assert (bound >= top).all()
    slack = (bound - top).mean() / top.abs().mean()
    assert slack < {"norms": 3, "corners": 3, "int8": 0.05}[name]


def test_slope_is_minus_one_for_a_over_l() -> None:
    assert findings_page.slope([512, 1024, 4096], [2 / 512, 2 / 1024, 2 / 4096]) == pytest.approx(
        -1
    )


def test_sparsity_at_an_error_lies_between_its_neighbours() -> None:
    rows = [{"error": 1e-3, "sparsity": 0.2}, {"error": 1e-1, "sparsity": 0.6}]
    assert findings_page.at_error(rows, 1e-2) == pytest.approx(0.4)
    assert findings_page.at_error(rows, 1.0) is None


def test_the_page_is_what_the_numbers_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = findings_page.PAGE.read_text()
    monkeypatch.setattr(findings_page, "PAGE", tmp_path / "findings.md")
    findings_page.main()
    assert findings_page.PAGE.read_text() == committed


def test_free_gaps_are_those_behind_the_sink_and_the_diagonal() -> None:
    geometry = BlockGeometry(16, 32)
    layers = {0: one_layer()}
    free = free_gaps(layers, geometry)
    cut = [blocks for _, blocks in prefill_rows(layers[0], geometry)]
    count = sum(len(set(blocks.seen) - {0, *blocks.diagonal}) for blocks in cut)
    assert len(free) == 4 * count < len(all_gaps(layers, geometry, ORDERS["sink first"]))
    assert free.isfinite().all(), "none of them is the first of its row"


def test_decode_with_a_copy_counts_what_the_reference_skips() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, h, n, 16, generator=generator) for h, n in ((2, 1), (1, 2200)))
    call = AttentionCall(q * 6, k, k, scale=1.0)
    exact, proof = int8_decode.gaps(call.q[0, :, 0], k[0, 0])
    for lam in (0.01, 0.1, 0.5):
        counts = reference.run(call, SkipRule.blasst(lam), BlockGeometry()).counts
        assert (exact < math.log(lam)).sum() == counts[0, 0, 1]
    assert len(exact) + 2 == counts[0, 0, 0]
    assert (exact <= proof).all()
    assert (proof < math.log(0.5)).any(), "the bound is of some use"


def test_a_scan_is_given_up() -> None:
    """Words of 16 blocks, the first of which begins with the seed's block."""
    proof = torch.tensor([-9.0] * 10 + [0.0] * 21 + [-9.0] * 9)
    assert int8_decode.scanned_and_proved(proof, -1.0, 0.6) == (15 + 2 + 9, 10 + 9)
    assert int8_decode.scanned_and_proved(proof, -1.0, 0.0) == (40, 19)
