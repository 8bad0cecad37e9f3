"""Prefill on AMX tiles: its own source on emulated tiles against float64, and its machine code.

No machine with AMX was at hand. The emulator follows Intel's manual: the order of the sums, their
rounding, subnormals, and what a processor answers with a fault.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import amx_emulated
import kernel_checks
import pytest
import torch
from test_cpu_kernel import FEATURES, GEOMETRIES, RULES, make_call
from test_cpu_kernel_build import library
from test_cpu_kernel_robust import LEVEL, assert_same, threads

from hf_sparse_attention.backends import cpu
from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, SkipRule

pytestmark = pytest.mark.usefixtures("cpu_kernel")
AMX = "avx512_amx"


@pytest.fixture(autouse=True)
def _beside_avx512_bf16(cpu_kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated level needs the one below it; that is what it is compared with."""
    monkeypatch.setenv(LEVEL, "avx512_bf16")
    try:
        cpu.load_kernel().cpu_level()
    except RuntimeError:
        pytest.skip("this machine has no avx512_bf16")


def make(kind: str, shape: tuple[int, ...], v_size: int | None = None, **options) -> AttentionCall:
    return make_call(kind, shape, v_size, torch.bfloat16, **options)


def check(call: AttentionCall, rule: SkipRule, geometry: BlockGeometry) -> AttentionResult:
    """Right against float64, and the same decisions as without tiles."""
    result = amx_emulated.run(call, rule, geometry)
    kernel_checks.check(call, rule, geometry, result)
    below = cpu.run(call, rule, geometry, return_skips=True)
    assert torch.equal(result.skips, below.skips)
    assert torch.equal(result.counts, below.counts)
    return result


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_rules(geometry: str, rule: str) -> None:
    skipped = 0
    for kind in ("sink", "local"):
        call = make(kind, (1, 2, 1, 150, 420, 64))
        result = check(call, RULES[rule], BlockGeometry.from_name(geometry))
        skipped += int(result.counts[..., 1].sum())
    assert (skipped > 0) == (rule != "never")


@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str) -> None:
    for q_len, geometry in ((150, "64x64"), (70, "64x1")):
        call = make("sink", (2, 4, 2, q_len, 220, 32), **FEATURES[feature])
        for rule in (SkipRule.blasst(0.2), SkipRule.bsfa(1.5), SkipRule.budget(0.2)):
            check(call, rule, BlockGeometry.from_name(geometry))


@pytest.mark.parametrize(
    ("heads", "sizes"),
    [
        ((2, 2), (64, 64)),
        ((5, 1), (80, 80)),
        ((3, 3), (96, 96)),
        ((4, 2), (128, 128)),
        ((6, 2), (192, 128)),
        ((2, 2), (256, 256)),
        ((2, 1), (2, 1)),
        ((14, 2), (34, 130)),
        ((2, 1), (33, 7)),
    ],
    ids=str,
)
def test_head_sizes(heads: tuple[int, int], sizes: tuple[int, int]) -> None:
    """Those of which a part of a tile is left, and an odd one, which takes no tiles."""
    before = amx_emulated.library().products()
    for q_len, kv_len in ((100, 130), (9, 65), (17, 150)):
        call = make("needle", (1, *heads, q_len, kv_len, sizes[0]), sizes[1])
        for geometry in (BlockGeometry(), BlockGeometry(64, 1)):
            check(call, SkipRule.blasst(0.05), geometry)
    assert (amx_emulated.library().products() > before) == (sizes[0] % 2 == 0)


def test_strided_keys() -> None:
    call = make("sink", (2, 4, 2, 100, 130, 64))
    turned = replace(call, q=call.q.transpose(1, 2).contiguous().transpose(1, 2))
    turned = replace(turned, v=call.v.transpose(1, 2).contiguous().transpose(1, 2))
    rule, geometry = SkipRule.blasst(0.1), BlockGeometry()
    assert_same(*(amx_emulated.run(x, rule, geometry) for x in (call, turned)))


def test_each_thread_has_its_own_tiles() -> None:
    call, rule = make("sink", (1, 4, 2, 200, 260, 80)), SkipRule.blasst(0.1)
    one = amx_emulated.run(call, rule, BlockGeometry())
    for n in (2, 3):
        with threads(n):
            assert_same(one, amx_emulated.run(call, rule, BlockGeometry()))


def test_long_input_in_teams() -> None:
    """Block rows that walk side by side, each with its own scratch."""
    call = make("sink", (1, 1, 1, 600, 6200, 8), 1024 // 2, window=6190)
    rule, geometry = SkipRule.blasst(0.5), BlockGeometry()
    with threads(9):
        row_by_row = amx_emulated.run(call, rule, geometry)
    kernel_checks.check(call, rule, geometry, row_by_row)
    assert_same(row_by_row, amx_emulated.run(call, rule, geometry))


def test_what_a_call_leaves_behind_does_not_matter() -> None:
    """Tiles are whole where rows and keys end: what lies there must be zeros, not the last call."""
    call, rule = make("sink", (1, 2, 1, 41, 41, 48), 20), SkipRule.blasst(0.1)
    poison = make("noise", (1, 2, 1, 128, 128, 48), 20, scale=math.nan, causal=False)
    clean = check(call, rule, BlockGeometry())
    assert amx_emulated.run(poison, SkipRule.never(), BlockGeometry()).out.isnan().all()
    assert_same(clean, amx_emulated.run(call, rule, BlockGeometry()))


def test_without_the_certificate_nothing_is_filtered() -> None:
    """The int8 filter would cost more than tiles; with or without it, decisions are the same."""
    call, rule = make("sink", (1, 2, 1, 700, 700, 40)), SkipRule.blasst(0.5)
    result = amx_emulated.run(call, rule, BlockGeometry(64, 1), dropped_mass=False)
    below = cpu.run(call, rule, BlockGeometry(64, 1), return_skips=True)
    assert torch.equal(result.skips, below.skips)
    assert result.counts[..., 1].sum() > result.counts[..., 0].sum() / 2


def exact_product(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The manual's sums, one float32 operation after the other; for products of few bits."""
    even, odd = torch.zeros_like(c), torch.zeros_like(c)
    for k in range(b.shape[0]):
        even += a[:, 2 * k, None] * b[None, k, :, 0]
        odd += a[:, 2 * k + 1, None] * b[None, k, :, 1]
    return c + (even + odd)


@pytest.mark.parametrize("shape", [(16, 16, 16), (3, 5, 7), (1, 1, 1)], ids=str)
def test_emulated_product(shape: tuple[int, int, int]) -> None:
    """In the manual's order: any other one gives other last bits."""
    rows, pairs, columns = shape
    a = torch.randn(rows, 2 * pairs).bfloat16()
    b = torch.randn(pairs, columns, 2).bfloat16()
    c = torch.randn(rows, columns)
    expected = exact_product(a.float(), b.float(), c)
    amx_emulated.product(a, b, c)
    assert torch.equal(c, expected)


@pytest.mark.parametrize(
    ("a", "b", "c", "expected"),
    [
        (2.0**-130, 2.0**100, 2.0**-140, 0.0),  # as a factor, and as a sum before
        (2.0**-70, 2.0**-70, 0.0, 0.0),  # as a product
        (-(2.0**-63), 2.0**-63, 1.5 * 2.0**-126, 0.0),  # as a sum
        (2.0**-70, 2.0**100, 2.0**-140, 2.0**30),
    ],
)
def test_emulated_subnormals_are_zeros(a: float, b: float, c: float, expected: float) -> None:
    pairs = torch.tensor([[a, 0.0]]).bfloat16(), torch.tensor([[[b, 0.0]]]).bfloat16()
    total = torch.tensor([[c]])
    amx_emulated.product(*pairs, total)
    assert total.item() == expected


@pytest.mark.parametrize(
    ("which", "fault"),
    list(enumerate(["not configured", "unknown palette", "too large a tile", "do not fit"])),
)
def test_emulated_faults(which: int, fault: str) -> None:
    assert fault in amx_emulated.library().mistake(which).decode()


TILES, BF16, SIZES = 1 << 24, 1 << 22, 8 << 16 | 64


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ((TILES | BF16, SIZES, 16, 0x602E7, 1), None),
        ((TILES, SIZES, 16, 0x602E7, 1), "the processor has no AMX"),
        ((BF16, SIZES, 16, 0x602E7, 1), "the processor has no AMX"),
        ((TILES | BF16, SIZES, 8, 0x602E7, 1), "smaller"),
        ((TILES | BF16, 8 << 16 | 32, 16, 0x602E7, 1), "smaller"),
        ((TILES | BF16, 4 << 16 | 64, 16, 0x602E7, 1), "smaller"),
        ((TILES | BF16, SIZES, 16, 0x202E7, 1), "the operating system"),
        ((TILES | BF16, SIZES, 16, 0x402E7, 1), "the operating system"),
        ((TILES | BF16, SIZES, 16, 0x602E7, 0), "Linux refuses"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_detection(facts: tuple[int, ...], reason: str | None) -> None:
    found = amx_emulated.library().refusal(*facts)
    assert found is None if reason is None else reason in found.decode()


def test_refused_where_the_machine_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if "amx_tile" in Path("/proc/cpuinfo").read_text():
        pytest.skip("this machine has AMX")
    monkeypatch.setenv(LEVEL, AMX)
    reason = "got avx512_amx: the processor has no AMX tiles for bfloat16"
    with pytest.raises(RuntimeError, match=reason):
        cpu.run(make("sink", (1, 2, 1, 9, 9, 8)), SkipRule.never(), BlockGeometry())


def test_machine_code() -> None:
    """Tiles are configured, multiplied and released; sums in 0 to 3, factors as the source says."""
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")
    command = ["objdump", "-d", "--no-show-raw-insn", str(library())]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"\b(ldtilecfg|tilerelease|tdpbf16ps)\b(.*)", listing)
    assert [name for name, _ in found if name == "ldtilecfg"], "never configured"
    assert [name for name, _ in found if name == "tilerelease"], "never released"
    # AT&T order: B, A, C.
    products = {
        tuple(map(int, re.findall(r"%tmm(\d)", text))) for name, text in found if name[0:3] == "tdp"
    }
    assert products == {(b, a, c) for b, a in ((5, 4), (7, 6)) for c in range(4)}
