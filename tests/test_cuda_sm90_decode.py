"""Hopper's decode kernel, its own source under the emulator: float64, and sm_80's bits."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import sm90_emulated
import torch
from kernel_checks import check
from sm90_emulated import Rings
from test_cuda_sm90_emulated import RULES, make_call, padded
from test_int8_keys import assert_same as assert_same_numbers
from test_int8_keys import separated

from hf_sparse_attention import Int8Keys
from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, SkipRule

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

GEOMETRY = BlockGeometry(64, 64, split_k=256)

#: As launched side by side and alone, at the start expecting half of the blocks to be skipped, or
#: none: V is fetched after votes at first, or ahead.
RINGS = {
    "demand": Rings(2, 1, 1.0),
    "ahead": Rings(2, 1, 0.0),
    "deep": Rings(3, 2, 1.0),
    "deep, ahead": Rings(3, 2, 0.0),
    "wide": Rings(1, 1, 1.0),
}


def made(kind: str = "needle", **features: Any) -> AttentionCall:
    defaults = {"heads": 4, "kv_heads": 2, "q_len": 1, "kv_len": 900}
    return make_call(kind, **{**defaults, **features})


CALLS: dict[str, dict[str, Any]] = {
    "splits": {},
    "one block": {"kv_len": 40},
    "odd length, two queries": {"q_len": 2, "kv_len": 523},
    "noise": {"kind": "noise"},
    "group of 16": {"heads": 16, "kv_heads": 1},
    "padding": {"batch": 2, "q_len": 3, "key_valid": padded(2, 700), "kv_len": 700},
    "window": {"window": 300, "kind": "local"},
    "static cache": {"q_offset": torch.tensor([401])},
    "static cache, empty": {"q_offset": torch.tensor([0])},
    "sinks": {"with_sinks": True},
    "softcap": {"softcap": 8.0},
    "no keys at all": {"key_valid": torch.zeros(1, 900, dtype=torch.bool)},
}


def assert_same(found: AttentionResult, expected: AttentionResult) -> None:
    for name in ("out", "lse", "counts", "skips", "dropped_mass"):
        same = torch.equal(
            getattr(found, name).nan_to_num(9.0), getattr(expected, name).nan_to_num(9.0)
        )
        assert same, name


def checked(
    call: AttentionCall, rule: SkipRule, geometry: BlockGeometry = GEOMETRY
) -> AttentionResult:
    """Against float64; then other rings and another order of events, by bits; and sm_80's."""
    found = sm90_emulated.decode(call, rule, geometry, RINGS["demand"])
    check(call, rule, geometry, found, weights_dtype=call.q.dtype)
    assert_same(sm90_emulated.decode(call, rule, geometry, RINGS["deep, ahead"], 1), found)
    assert_same(sm90_emulated.decode(call, rule, geometry, None), found)
    return found


@pytest.mark.parametrize("name", CALLS)
def test_decisions_and_numbers(name: str) -> None:
    for rule in RULES.values():
        checked(made(**CALLS[name]), rule)


def test_the_inputs_above_do_skip() -> None:
    """Else the test above would prove little."""
    for rule in set(RULES) - {"never"}:
        shares = []
        for features in CALLS.values():
            found = sm90_emulated.decode(made(**features), RULES[rule], GEOMETRY, RINGS["demand"])
            assert found.counts is not None
            visited, skipped = found.counts.sum(dim=(0, 1)).tolist()
            shares.append(skipped / max(visited, 1))
        assert sum(0 < share < 1 for share in shares) >= 3, (rule, shares)


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_orders(order: Any) -> None:
    """Without splits: all keys in one run."""
    geometry = replace(GEOMETRY, order=order)
    for rule in ("blasst", "budget"):
        checked(made("local"), RULES[rule], geometry)


SIZES = [((64, 64), 128), ((40, 24), 64), ((128, 128), 64), ((256, 256), 64)]
SIZES += [((192, 128), 64), ((192, 128), 128)]


@pytest.mark.parametrize(("sizes", "block_k"), SIZES, ids=str)
def test_sizes(sizes: tuple[int, int], block_k: int) -> None:
    """Others than compiled are filled up with zeros by the copy engine."""
    call = made(sizes=sizes)
    if sizes == (40, 24):
        call = replace(call, q=call.q.half(), k=call.k.half(), v=call.v.half())
    for rule in ("never", "blasst"):
        checked(call, RULES[rule], BlockGeometry(64, block_k, split_k=256))


#: Skipped are some of many kept, none, or many in a row.
MIXTURES = [
    ("noise", SkipRule.blasst(0.4)),
    ("needle", SkipRule.blasst(0.5)),
    ("local", SkipRule.blasst(0.4)),
    ("noise", SkipRule.never()),
]


@pytest.mark.parametrize("rings", RINGS)
@pytest.mark.parametrize("seed", [0, 1, 2, 3, 6, 7])
def test_any_interleaving_gives_the_same(rings: str, seed: int) -> None:
    """Rings go round; V is fetched ahead for nothing, or after the vote, or first so, then so."""
    one_split = replace(GEOMETRY, split_k=2048)
    for kind, rule in MIXTURES:
        call = made(kind, heads=2, kv_heads=1, kv_len=1500)
        expected = sm90_emulated.decode(call, rule, one_split, None)
        assert_same(sm90_emulated.decode(call, rule, one_split, RINGS[rings], seed), expected)


def test_nan_is_never_skipped() -> None:
    call = made()
    call.k[:, :, 300] = torch.nan
    found = sm90_emulated.decode(call, RULES["blasst"], GEOMETRY, RINGS["demand"])
    assert found.out.isnan().all()
    assert not found.skips[..., 0].bitwise_and(1 << 4).any()


def test_what_lies_behind_the_last_key_does_not_matter() -> None:
    """Unwritten slots of a static cache hold anything."""
    call = made(q_offset=torch.tensor([333]))
    expected = sm90_emulated.decode(call, RULES["blasst"], GEOMETRY, RINGS["demand"])
    for x in (call.k, call.v):
        x[:, :, 334:] = torch.nan
    found = sm90_emulated.decode(call, RULES["blasst"], GEOMETRY, RINGS["demand"], 1)
    assert found.out.isfinite().all()
    assert_same(found, expected)
    assert_same(sm90_emulated.decode(call, RULES["blasst"], GEOMETRY, None), expected)


def test_strided_inputs() -> None:
    """transformers hands over transposed views."""
    call = made(batch=2)
    views = {
        name: getattr(call, name).transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("q", "k", "v")
    }
    expected = sm90_emulated.decode(call, RULES["blasst"], GEOMETRY, RINGS["demand"])
    found = sm90_emulated.decode(replace(call, **views), RULES["blasst"], GEOMETRY, RINGS["demand"])
    assert_same(found, expected)


@pytest.mark.usefixtures("cpu_kernel")  # which makes the copies
@pytest.mark.parametrize("rings", RINGS)
def test_what_an_int8_copy_proves_is_not_read(rings: str) -> None:
    """What comes is the seed, and what is not proved: no step, no copy, no slot for the rest."""
    rule = SkipRule.blasst(1e-3)
    for seed, split_k, shape in ((0, 1024, {}), (1, 256, {}), (6, 4096, {"size": 128})):
        torch.manual_seed(seed)
        call = separated(torch.bfloat16 if shape else torch.float16, 1408, **shape)
        geometry = BlockGeometry(64, 64, split_k=split_k)
        copy = Int8Keys.of(call.k).data
        want = sm90_emulated.decode(call, rule, geometry, None)
        far = call.k[..., 0] == 0
        far[:, :, -128:] = False  # the newest block is always read
        call.k[far] = torch.nan
        got = sm90_emulated.decode(
            replace(call, int8_keys=copy), rule, geometry, RINGS[rings], seed
        )
        assert_same_numbers(got, want)
        assert got.counts is not None
        assert got.counts[0, 0].tolist() == [22, 18]


@pytest.mark.usefixtures("cpu_kernel")
@pytest.mark.parametrize("name", CALLS)
def test_an_int8_copy_changes_nothing(name: str) -> None:
    call = made(**CALLS[name])
    if call.softcap:
        pytest.skip("with a softcap it is not used")
    copied = replace(call, int8_keys=Int8Keys.of(call.k).data)
    for rule in (SkipRule.blasst(0.2), SkipRule.bsfa(0.5)):
        want = sm90_emulated.decode(call, rule, GEOMETRY, RINGS["demand"])
        for rings in ("demand", "deep, ahead"):
            found = sm90_emulated.decode(copied, rule, GEOMETRY, RINGS[rings], 1)
            assert_same_numbers(found, want)


def test_decode_begins_with_what_is_expected() -> None:
    """Of two blocks; V is fetched ahead at first while that is less than 30%."""
    for rule, before in (("never", [0.0, 0.0]), ("blasst", [0.5, 1.0]), ("budget", [0.5, 1.0])):
        found = [
            sm90_emulated.skipped_before(made(), RULES[rule], GEOMETRY, x) for x in (0.25, 0.5)
        ]
        assert found == before, rule
