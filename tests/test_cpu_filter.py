"""The int8 filter of the CPU kernel changes nothing: not a bit of the output, not one decision.

Asking for the certificate turns the filter off, as that needs the exact maxima: so the same call
with and without it is the same call without and with the filter.
"""

import math
from collections.abc import Callable

import pytest
import torch
from kernel_checks import structured
from key_shapes import KEY_SHAPES, huge, int8, outlier_keys, tiny

from hf_sparse_attention.backends import cpu
from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, SkipRule

pytestmark = pytest.mark.usefixtures("cpu_kernel")

LENGTH = 640


def pair(
    call: AttentionCall, rule: SkipRule, geometry: BlockGeometry
) -> tuple[AttentionResult, AttentionResult]:
    """The call with the filter, and without."""
    with_filter = cpu.run(call, rule, geometry, return_skips=True)
    return with_filter, cpu.run(call, rule, geometry, return_skips=True, return_dropped_mass=True)


def same(a: AttentionResult, b: AttentionResult) -> bool:
    pairs = ((a.skips, b.skips), (a.counts, b.counts), (a.lse, b.lse), (a.out, b.out))
    return all(torch.equal(x, y) for x, y in pairs)


def adversarial(call: AttentionCall, geometry: BlockGeometry) -> SkipRule:
    """Thresholds that equal the largest score of some block of each block row, or its neighbours.

    So one decision a block row hangs on the last bit, where any bound that is too small would show.
    """
    q, k = call.q.float(), call.k.float().repeat_interleave(call.group, 1)
    scores = call.scale * q @ k.transpose(2, 3)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(hidden, -math.inf)
    rows = -(-scores.shape[2] // geometry.block_q)
    block = 64
    tops = scores.unflatten(2, (rows, geometry.block_q)).unflatten(4, (-1, block)).amax((3, 5))
    n = torch.arange(rows)
    chosen = (torch.rand(*tops.shape[:2], rows) * (n + 1)).long()  # not beyond the diagonal
    threshold = tops.gather(3, chosen[..., None])[..., 0]
    nudge = torch.randint(-1, 2, threshold.shape)
    threshold = torch.where(nudge > 0, threshold.nextafter(torch.tensor(math.inf)), threshold)
    threshold = torch.where(nudge < 0, threshold.nextafter(torch.tensor(-math.inf)), threshold)
    return SkipRule.bsfa(threshold.float())


RULES: dict[str, Callable[[AttentionCall, BlockGeometry], SkipRule]] = {
    "lambda 0.9": lambda *_: SkipRule.blasst(0.9),
    "lambda 0.01": lambda *_: SkipRule.blasst(0.01),
    "on the edge": adversarial,
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("change", KEY_SHAPES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("geometry", ["64x64", "64x128", "64x1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_filter_changes_nothing(rule, change, geometry, dtype):
    geometry = BlockGeometry.from_name(geometry)
    skipped = 0
    for seed, size in enumerate((16, 30, 64)):
        torch.manual_seed(seed)
        kind = ("noise", "sink", "needle")[seed]
        q, k = structured(kind, 1, 4, 2, LENGTH, LENGTH, size)
        call = AttentionCall(
            q.to(dtype), change(k).to(dtype), torch.randn(1, 2, LENGTH, 8).to(dtype), scale=0.2
        )
        if not call.k.isfinite().all():
            pytest.skip("the dtype does not hold such keys")
        got, want = pair(call, rule(call, geometry), geometry)
        assert same(got, want)
        skipped += int(got.counts[..., 1].sum())
    # Some shapes of K have scores that are all alike, of which nothing can be skipped.
    assert (
        skipped > 0 or change in (tiny, huge, outlier_keys, int8) or rule is not RULES["lambda 0.9"]
    )


@pytest.mark.parametrize("geometry", ["64x64", "64x1"])
def test_windows_offsets_padding_and_odd_lengths(geometry):
    geometry = BlockGeometry.from_name(geometry)
    for seed in range(12):
        torch.manual_seed(seed)
        q, k = structured("sink", 2, 2, 1, 517 + seed, 700 + seed, 20)
        valid = torch.arange(k.shape[2]) >= torch.tensor([[0], [37 * seed]])
        valid[0, k.shape[2] - 3 * seed :] = False
        call = AttentionCall(
            q,
            k,
            torch.randn(2, 1, k.shape[2], 20),
            scale=0.2,
            key_valid=valid if seed % 2 else None,
            window=(None, 90, 300)[seed % 3],
        )
        got, want = pair(call, SkipRule.blasst(0.3), geometry)
        assert same(got, want)


@pytest.mark.parametrize("where", ["q", "k"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_filtered(where, bad):
    q, k = structured("sink", 1, 2, 1, LENGTH, LENGTH, 16)
    (q if where == "q" else k)[0, 0, 100, 5] = bad
    call = AttentionCall(q, k, torch.randn(1, 1, LENGTH, 16), scale=0.2)
    got, want = pair(call, SkipRule.blasst(0.9), BlockGeometry())
    assert torch.equal(got.out.isnan(), want.out.isnan())
    assert torch.equal(got.skips, want.skips)
