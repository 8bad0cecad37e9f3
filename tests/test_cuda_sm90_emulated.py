"""The sm_90a prefill kernel, its own source under the emulator, against float64.

Every test runs under two seeds at least: products computed as early as they may, and as late.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import sm90_emulated
import torch
from kernel_checks import check, structured
from torch import Tensor

from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule, unpack_bits

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

GEOMETRY = BlockGeometry(64, 128)
SEEDS = (0, 1)

#: Rules under which the inputs below skip some blocks and keep some.
RULES = {
    "never": SkipRule.never(),
    "blasst": SkipRule.blasst(0.6),
    "bsfa": SkipRule.bsfa(6.0),
    "bsfa without sink": SkipRule.bsfa(5.5, keep_sink=False),
    "budget": SkipRule.budget(60.0),
    "blasst and budget": replace(SkipRule.blasst(0.9), max_dropped_mass=torch.full((1, 1), 30.0)),
}


def make_call(
    kind: str = "needle",
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    q_len: int = 300,
    kv_len: int = 300,
    sizes: tuple[int, int] = (64, 64),
    **features: Any,
) -> AttentionCall:
    torch.manual_seed(7)
    q, k = structured(kind, batch, heads, kv_heads, q_len, kv_len, sizes[0])
    v = torch.randn(batch, kv_heads, kv_len, sizes[1])
    if features.pop("with_sinks", False):
        features["sinks"] = torch.randn(heads)
    features.setdefault("scale", sizes[0] ** -0.5)
    dtype = torch.float16 if sizes[0] == 64 else torch.bfloat16  # what the runner is compiled for
    return AttentionCall(q.to(dtype), k.to(dtype), v.to(dtype), **features)


def padded(batch: int, kv_len: int) -> Tensor:
    """The first request is padded left, the last right and with a hole as large as a block."""
    valid = torch.ones(batch, kv_len, dtype=torch.bool)
    valid[0, : kv_len // 4] = False
    valid[-1, -kv_len // 8 :] = False
    valid[-1, kv_len // 3 : kv_len // 3 + 260] = False
    return valid


CALLS: dict[str, dict[str, Any]] = {
    "five blocks": {"q_len": 600, "kv_len": 600},
    "shorter than a block": {"q_len": 9, "kv_len": 9},
    "one block row, and none beside it": {"q_len": 64, "kv_len": 200},
    "chunk": {"q_len": 150, "kv_len": 670},
    "diagonals a block apart": {"q_len": 256, "kv_len": 484},  # positions 228 to 291 and on
    "bidirectional": {"causal": False, "kind": "noise"},
    "padding": {"batch": 2, "key_valid": padded(2, 700), "q_len": 700, "kv_len": 700},
    "window": {"window": 150, "kind": "local", "q_len": 500, "kv_len": 500},
    "group of 4": {"heads": 4, "q_len": 260, "kv_len": 260},
    "static cache": {"q_offset": torch.tensor([80]), "q_len": 150, "kv_len": 500},
    "more queries than keys": {"q_len": 330, "kv_len": 150},
    "sinks": {"with_sinks": True},
    "no keys at all": {"key_valid": torch.zeros(1, 300, dtype=torch.bool)},
    "softcap": {"softcap": 8.0},
    "negative scale": {"scale": -0.125},
}


def check_all_versions(call: AttentionCall, rule: SkipRule) -> torch.Tensor:
    """The general version against float64, and the others against it, bit by bit."""
    for seed in SEEDS:
        found = sm90_emulated.run(call, rule, GEOMETRY, "general", seed)
        check(call, rule, GEOMETRY, found, weights_dtype=call.q.dtype)
    if rule.max_dropped_mass is not None or call.softcap is not None or call.scale <= 0:
        return found.counts
    for version in ("dense",) if rule.is_never else ("always", "demand"):
        for seed in SEEDS:
            other = sm90_emulated.run(call, rule, GEOMETRY, version, seed)
            for name in ("out", "lse", "counts", "skips"):
                assert torch.equal(getattr(other, name), getattr(found, name)), (version, name)
    return found.counts


#: Every call under the two rules, and some under all.
CASES = [(name, rule) for name in CALLS for rule in ("blasst", "bsfa")]
CASES += [
    (name, rule)
    for name in ("chunk", "padding", "window", "sinks", "softcap")
    for rule in sorted(set(RULES) - {"blasst", "bsfa"})
]


@pytest.mark.parametrize(("name", "rule"), CASES, ids=map(", ".join, CASES))
def test_decisions_and_numbers(name: str, rule: str) -> None:
    check_all_versions(make_call(**CALLS[name]), RULES[rule])


def test_the_inputs_above_do_skip() -> None:
    """Else the tests above would prove little."""
    for rule in set(RULES) - {"never"}:
        shares = []
        for features in list(CALLS.values())[:8]:
            found = sm90_emulated.run(make_call(**features), RULES[rule], GEOMETRY, "general")
            assert found.counts is not None
            visited, skipped = found.counts.sum(dim=(0, 1)).tolist()
            shares.append(skipped / max(visited, 1))
        assert sum(0 < share < 1 for share in shares) >= 3, (rule, shares)


@pytest.mark.parametrize("rule", ["never", "blasst"])
def test_head_size_128(rule: str) -> None:
    check_all_versions(make_call(q_len=400, kv_len=400, sizes=(128, 128)), RULES[rule])


@pytest.mark.parametrize(
    ("sizes", "block_k"), [((192, 128), 128), ((192, 128), 64), ((256, 256), 64)], ids=str
)
def test_large_heads(sizes: tuple[int, int], block_k: int) -> None:
    call, rule, geometry = make_call(sizes=sizes), RULES["blasst"], BlockGeometry(64, block_k)
    found = sm90_emulated.run(call, rule, geometry, "general")
    check(call, rule, geometry, found, weights_dtype=call.q.dtype)
    assert torch.equal(sm90_emulated.run(call, rule, geometry, "always", 1).out, found.out)


@pytest.mark.parametrize("rule", ["blasst", "bsfa"])
@pytest.mark.parametrize("name", ["chunk", "padding", "window", "static cache"])
def test_blocks_of_64_keys(name: str, rule: str) -> None:
    """Where the diagonals of a pair always lie a block apart."""
    call, geometry = make_call(**CALLS[name]), BlockGeometry(64, 64)
    found = sm90_emulated.run(call, RULES[rule], geometry, "general")
    check(call, RULES[rule], geometry, found, weights_dtype=call.q.dtype)
    for version in ("always", "demand"):
        other = sm90_emulated.run(call, RULES[rule], geometry, version, 1)
        assert torch.equal(other.out, found.out), version
        assert torch.equal(other.skips, found.skips), version


def test_ascending_order() -> None:
    call, geometry = make_call(q_len=500, kv_len=500), BlockGeometry(64, 128, "ascending")
    found = sm90_emulated.run(call, RULES["blasst"], geometry, "general")
    check(call, RULES["blasst"], geometry, found, weights_dtype=call.q.dtype)


@pytest.mark.parametrize("seed", range(2, 8))
def test_any_interleaving_gives_the_same(seed: int) -> None:
    """Rings go round; one of a pair's block rows skips, looks on, or has nothing to do."""
    calls = {
        "local": make_call("local", heads=1, q_len=128, kv_len=1900),
        "padding": make_call(**CALLS["padding"]),
        "diagonals a block apart": make_call(**CALLS["diagonals a block apart"]),
    }
    for name, call in calls.items():
        for block_k in (128, 64):
            geometry = BlockGeometry(64, block_k)
            expected = sm90_emulated.run(call, RULES["bsfa"], geometry, "general")
            for version in ("always", "demand"):
                found = sm90_emulated.run(call, RULES["bsfa"], geometry, version, seed)
                assert torch.equal(found.out, expected.out), (name, version, block_k)
                assert torch.equal(found.skips, expected.skips), (name, version, block_k)


def test_thresholds_by_request_head_and_row() -> None:
    call = make_call(batch=2, heads=2, kv_heads=2)
    rule = SkipRule(
        log_lambda=torch.tensor([[-0.2, -5.0], [-1.0, -30.0]]),
        block_threshold=torch.linspace(1.0, 6.0, 2 * 2 * 5).reshape(2, 2, 5),
    )
    check_all_versions(call, rule)


def test_strided_inputs() -> None:
    """transformers hands over transposed views."""
    call = make_call(batch=2, kv_heads=2)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (call.q, call.k, call.v)]
    strided = replace(call, q=views[0], k=views[1], v=views[2])
    for version in ("always", "demand"):
        expected = sm90_emulated.run(call, RULES["blasst"], GEOMETRY, version)
        found = sm90_emulated.run(strided, RULES["blasst"], GEOMETRY, version)
        assert torch.equal(found.out, expected.out)


@pytest.mark.parametrize("version", ["general", "always", "demand"])
def test_nan_is_never_skipped(version: str) -> None:
    call = make_call(q_len=400, kv_len=400)
    call.k[:, :, 140] = torch.nan
    found = sm90_emulated.run(call, RULES["blasst"], GEOMETRY, version)
    assert found.skips is not None
    assert not unpack_bits(found.skips, 4)[0, :, 3:, 1].any()  # block rows that see key 140
    assert found.out[:, -1].isnan().all()


@pytest.mark.parametrize("version", ["dense", "always", "demand"])
def test_what_lies_behind_the_last_key_does_not_matter(version: str) -> None:
    """Unwritten slots of a static cache hold anything."""
    valid = torch.ones(1, 500, dtype=torch.bool)
    valid[:, 333:] = False
    call = make_call(q_len=120, kv_len=500, key_valid=valid, q_offset=torch.tensor([213]))
    rule = RULES["never" if version == "dense" else "blasst"]
    expected = sm90_emulated.run(call, rule, GEOMETRY, version)
    for x in (call.k, call.v):
        x[:, :, 333:] = torch.nan
    found = sm90_emulated.run(call, rule, GEOMETRY, version, 1)
    assert found.out.isfinite().all()
    assert torch.equal(found.out, expected.out)


def test_the_version_follows_what_is_expected() -> None:
    """V on demand from half on, where a skip saves more than two loads of what both keep cost."""
    call = make_call(q_len=100, kv_len=100)
    versions = {
        name: [sm90_emulated.version(call, rule, GEOMETRY, x) for x in (0.0, 0.25, 0.5, 0.75)]
        for name, rule in RULES.items()
    }
    follows = ["always", "always", "demand", "demand"]
    assert versions == {
        "never": ["dense"] * 4,
        "blasst": follows,
        "bsfa": follows,
        "bsfa without sink": follows,
        "budget": ["general"] * 4,
        "blasst and budget": ["general"] * 4,
    }
    capped = replace(call, softcap=8.0)
    assert sm90_emulated.version(capped, RULES["blasst"], GEOMETRY, 0.75) == "general"
