"""The CPU kernel on what is unusual: threads, levels, strides, NaN, nothing at all, very large."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import kernel_checks
import pytest
import torch

from hf_sparse_attention.backends import cpu
from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, SkipRule

pytestmark = pytest.mark.usefixtures("cpu_kernel")

LEVEL = "HF_SPARSE_ATTENTION_CPU_LEVEL"
LEVELS = ["portable", "avx2", "avx512", "avx512_bf16", "avx512_amx"]
SHAPES = [(1, 4, 2, 200, 260, 40), (1, 4, 2, 3, 1300, 40)]


def run(call: AttentionCall, rule: SkipRule, geometry: BlockGeometry) -> AttentionResult:
    return cpu.run(call, rule, geometry, return_skips=True, return_dropped_mass=True)


def make_call(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options):
    q, k = kernel_checks.structured("sink", *shape)
    v = torch.randn_like(k)
    return AttentionCall(q.to(dtype), k.to(dtype), v.to(dtype), scale=shape[-1] ** -0.5, **options)


def assert_same(a: AttentionResult, b: AttentionResult) -> None:
    """Bit for bit, NaN included."""
    for x, y in ((a.out, b.out), (a.lse, b.lse), (a.dropped_mass, b.dropped_mass)):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(a.counts, b.counts)
    assert torch.equal(a.skips, b.skips)


def force(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the kernel run at `level`; skips the test on a machine without it."""
    monkeypatch.setenv(LEVEL, level)
    try:
        cpu.load_kernel().cpu_level()
    except RuntimeError:
        pytest.skip(f"this machine has no {level}")


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", ["64x64", "64x1"])
def test_thread_counts(geometry: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    call, geometry = make_call(shape, dtype), BlockGeometry.from_name(geometry)
    one = run(call, SkipRule.blasst(0.1), geometry)
    for n in (2, 3):
        with threads(n):
            assert_same(one, run(call, SkipRule.blasst(0.1), geometry))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", ["64x64", "64x1"])
def test_thread_counts_with_the_filter(geometry: str, dtype: torch.dtype) -> None:
    """Long enough for the int8 filter, whose copy of K the threads make together."""
    call, geometry = make_call((1, 4, 2, 700, 700, 40), dtype), BlockGeometry.from_name(geometry)

    def attend() -> AttentionResult:  # without the certificate, as that turns the filter off
        return cpu.run(call, SkipRule.blasst(0.5), geometry, return_skips=True)

    one = attend()
    assert one.counts[..., 1].sum() > one.counts[..., 0].sum() / 2
    for n in (2, 3):
        with threads(n):
            again = attend()
        for name in ("out", "lse", "counts", "skips"):
            assert torch.equal(getattr(one, name), getattr(again, name)), name


@pytest.mark.parametrize("geometry", ["64x64", "64x1", "32x512"])
def test_a_long_input_computes_the_same_in_teams(geometry: str) -> None:
    """K and V beyond the caches: 1 and 2 threads walk them in teams of 8 and 4, 9 row by row."""
    blocks = BlockGeometry.from_name(geometry)
    q, k = kernel_checks.structured("sink", 1, 4, 2, 2041, 11900, 16)
    call = AttentionCall(q, k, torch.randn(1, 2, 11900, 256), scale=0.25, window=11000)
    eps = 0.5 if blocks.block_k == 1 else 50.0
    rule = replace(SkipRule.blasst(0.9), max_dropped_mass=torch.tensor([[eps]]))
    with threads(9):
        row_by_row = run(call, rule, blocks)
    visited, skipped = row_by_row.counts.sum((0, 1)).tolist()
    assert 0.05 < skipped / visited < 0.99
    for n in (1, 2):
        with threads(n):
            assert_same(row_by_row, run(call, rule, blocks))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_levels(level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    best = cpu.load_kernel().cpu_level()
    if level not in LEVELS[: LEVELS.index(best) + 1]:
        pytest.skip(f"this machine has no {level}")
    monkeypatch.setenv(LEVEL, level)
    assert cpu.load_kernel().cpu_level() == level
    for shape in (*SHAPES, (1, 4, 2, 90, 90, 33), (1, 4, 2, 3, 300, 33)):
        for geometry in (BlockGeometry(), BlockGeometry(64, 1)):
            for rule in (SkipRule.blasst(0.1), SkipRule.budget(0.1)):
                call = make_call(shape, dtype, softcap=6.0, window=240)
                kernel_checks.check(call, rule, geometry, run(call, rule, geometry))


def test_unknown_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEVEL, "avx1024")
    with pytest.raises(RuntimeError, match=r"expected portable, avx2.*got avx1024"):
        run(make_call(SHAPES[0]), SkipRule.never(), BlockGeometry())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strides(shape: tuple[int, ...]) -> None:
    call = make_call(shape)
    plain = run(call, SkipRule.blasst(0.1), BlockGeometry())

    def as_model(x: torch.Tensor) -> torch.Tensor:  # [B, L, H, D] behind the scenes
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def in_cache(x: torch.Tensor) -> torch.Tensor:  # a slice of something longer and wider
        wide = torch.full((*x.shape[:2], 3 * x.shape[2], x.shape[3] + 5), math.nan)
        wide[:, :, : 3 * x.shape[2] : 3, 2:-3] = x
        return wide[:, :, : 3 * x.shape[2] : 3, 2:-3]

    def transposed(x: torch.Tensor) -> torch.Tensor:  # the last dimension is not contiguous
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    for change in (as_model, in_cache, transposed):
        changed = replace(call, q=change(call.q), k=change(call.k), v=change(call.v))
        assert not changed.k.is_contiguous()
        assert_same(plain, run(changed, SkipRule.blasst(0.1), BlockGeometry()))


def test_expanded_heads() -> None:
    call = make_call((2, 4, 4, 100, 100, 32))
    one_head = replace(
        call, k=call.k[:, :1].expand(-1, 4, -1, -1), v=call.v[:, :1].expand_as(call.v)
    )
    plain = replace(one_head, k=one_head.k.contiguous(), v=one_head.v.contiguous())
    rule = SkipRule.blasst(0.1)
    assert_same(run(one_head, rule, BlockGeometry()), run(plain, rule, BlockGeometry()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("q_len", [150, 2])
@pytest.mark.parametrize("geometry", ["64x64", "64x1"])
def test_nan_is_never_lost(geometry: str, q_len: int, where: str, bad: float) -> None:
    """Wherever exact dense attention gives NaN because of q or k, so does the kernel."""
    geometry = BlockGeometry.from_name(geometry)
    call = make_call((1, 2, 1, q_len, 300, 16))
    rule = SkipRule.blasst(0.9)
    skipping = run(call, rule, geometry)
    assert skipping.counts[..., 1].sum() > 0
    x = getattr(call, where)
    key = 100  # in a block that is skipped
    x[0, 0, key if where != "q" else q_len // 2, 3] = bad
    result = run(call, rule, geometry)
    dense = run(call, SkipRule.never(), geometry)
    if where == "v":  # seen where it is read
        kept = ~reference_hidden(result, geometry, key)
        rows = dense.out.isfinite().logical_not().any(-1)  # [B, Lq, Hq]
        assert (result.out.isfinite().logical_not().any(-1) <= rows).all()
        assert kept.numel() > 0
    else:
        assert torch.equal(result.out.isnan(), dense.out.isnan())
        if bad != bad:
            assert dense.out.isnan().any()


def reference_hidden(result: AttentionResult, geometry: BlockGeometry, key: int) -> torch.Tensor:
    j = key // geometry.block_k
    return (result.skips[..., j // 8] >> (j % 8) & 1).bool()


def test_nan_in_hidden_keys_changes_nothing() -> None:
    valid = torch.ones(1, 300, dtype=torch.bool)
    valid[:, :20] = valid[:, 100:140] = valid[:, 290:] = False
    for q_len in (150, 2):
        call = make_call((1, 2, 1, q_len, 300, 16), key_valid=valid)
        plain = run(call, SkipRule.blasst(0.1), BlockGeometry())
        call.k[:, :, ~valid[0]] = math.nan
        call.v[:, :, ~valid[0]] = math.nan
        assert_same(plain, run(call, SkipRule.blasst(0.1), BlockGeometry()))


@pytest.mark.parametrize(
    "shape",
    [
        (0, 2, 1, 5, 5, 8),
        (2, 2, 1, 0, 5, 8),
        (2, 2, 1, 5, 0, 8),
        (1, 0, 0, 5, 5, 8),
        (1, 2, 1, 1, 1, 8),
    ],
    ids=str,
)
def test_empty_and_single(shape: tuple[int, ...]) -> None:
    batch, heads, _, q_len, kv_len, size = shape
    call = make_call(shape)
    result = run(call, SkipRule.blasst(0.1), BlockGeometry())
    assert result.out.shape == (batch, q_len, heads, size)
    if kv_len == 0:
        assert (result.out == 0).all()
        assert (result.lse == -math.inf).all()
    if heads > 0:
        kernel_checks.check(call, SkipRule.blasst(0.1), BlockGeometry(), result)


def test_short_prefills_and_first_decodes() -> None:
    for q_len, kv_len in ((1, 1), (1, 2), (2, 2), (8, 8), (8, 9), (9, 9), (9, 10), (65, 65)):
        for geometry in (BlockGeometry(), BlockGeometry(64, 1)):
            call = make_call((1, 2, 1, q_len, kv_len, 16))
            rule = SkipRule.blasst(0.5)
            kernel_checks.check(call, rule, geometry, run(call, rule, geometry))


def test_extreme_magnitudes() -> None:
    """Scores beyond what 2^x can hold, denormal inputs, and a running max that rises all along."""
    for q_len in (100, 2):
        call = make_call((1, 2, 1, q_len, 300, 16))
        for factor in (1e-30, 1e-42, 100.0):
            scaled = replace(call, q=call.q * factor)
            result = run(scaled, SkipRule.blasst(0.1), BlockGeometry())
            if factor > 1e-38:  # below, subnormal inputs count as zero
                kernel_checks.check(scaled, SkipRule.blasst(0.1), BlockGeometry(), result)
            assert result.out.isfinite().all()
        k = torch.linspace(0, 40, 300)[:, None].expand_as(call.k)
        rising = replace(call, q=call.q.abs(), k=k)
        rule, geometry = SkipRule.blasst(0.1), BlockGeometry(order="ascending")
        kernel_checks.check(rising, rule, geometry, run(rising, rule, geometry))


def test_mixed_dtypes_as_autocast_leaves_them() -> None:
    call = make_call(SHAPES[0])
    mixed = replace(call, v=call.v.bfloat16())
    same = replace(call, v=mixed.v.float())
    result = run(mixed, SkipRule.blasst(0.1), BlockGeometry())
    assert result.out.dtype == torch.float32
    assert_same(result, run(same, SkipRule.blasst(0.1), BlockGeometry()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, 8, 40)}, r"expected \[B, Hq, Lq, D\]"),
        ({"v": torch.zeros(2, 2, 99, 40)}, r"expected \[B, Hq, Lq, D\]"),
        ({"q": torch.zeros(2, 3, 8, 40)}, "expected a multiple of the key/value heads"),
        ({"key_valid": torch.ones(2, 9, dtype=torch.bool)}, r"key_valid: expected bool \[2, 260\]"),
        ({"q_offset": torch.zeros(3, dtype=torch.int64)}, r"q_offset: expected int64"),
        ({"sinks": torch.zeros(2)}, r"sinks: expected float32 \[4\]"),
        ({"scale": math.nan}, "scale: expected a finite number"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input(change: dict, message: str) -> None:
    call = replace(make_call((2, *SHAPES[0][1:])), **change)
    with pytest.raises(RuntimeError, match=message):
        run(call, SkipRule.never(), BlockGeometry())


def test_bad_rules_and_geometries() -> None:
    call = make_call(SHAPES[0])
    with pytest.raises(RuntimeError, match=r"log_lambda: expected size 4 or 1"):
        run(call, SkipRule(log_lambda=-torch.ones(1, 3)), BlockGeometry())
    with pytest.raises(RuntimeError, match="block_k: expected a divisor of 64"):
        run(call, SkipRule.never(), BlockGeometry(64, 48))


def test_refusals() -> None:
    call, rule = make_call(SHAPES[0]), SkipRule.never()

    def refusal(geometry: BlockGeometry | None = None, **change) -> str:
        return cpu.supports(replace(call, **change), rule, geometry or BlockGeometry()) or ""

    assert refusal() == ""
    assert refusal(q=call.q.clone().requires_grad_()) == ""
    assert "mask" in refusal(mask=torch.ones(1, 1, 200, 260, dtype=torch.bool))
    assert "dropout" in refusal(dropout=0.1)
    assert "float64" in refusal(q=call.q.double())
    assert "meta" in refusal(k=call.k.to("meta"))
    assert "512" in refusal(q=torch.zeros(1, 4, 9, 513), k=torch.zeros(1, 2, 9, 513))
    assert "block_q 128" in refusal(BlockGeometry(128, 64))
    assert "block_k 48" in refusal(BlockGeometry(64, 48))


def test_subnormal_mode_is_restored() -> None:
    tiny = torch.tensor([1e-41])
    run(make_call(SHAPES[0]), SkipRule.never(), BlockGeometry())
    assert (tiny * 1.0).item() > 0


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """One kv head with a stride beyond 2^31 elements: offsets must be 64 bits wide."""
    storage = torch.empty(2**31 + 64 * 300, dtype=torch.float16)  # 4 GiB, mostly never touched
    k = storage.as_strided((1, 2, 300, 64), (0, 2**31, 64, 1))
    q = torch.randn(1, 2, 70, 64, dtype=torch.float16)
    k.copy_(torch.randn(1, 2, 300, 64))
    for x in (q, q[:, :, :2]):
        far = AttentionCall(x, k, k, scale=0.125)
        near = replace(far, k=k.clone(), v=k.clone())
        rule = SkipRule.blasst(0.1)
        assert_same(run(far, rule, BlockGeometry()), run(near, rule, BlockGeometry()))


MEMORY_SCRIPT = """
import torch
from benchmarks.memory import added_kib
from hf_sparse_attention.backends import cpu
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

def prepare(q_len, kv_len, geometry):
    q, k, v = (torch.randn(1, 1, n, 16) for n in (q_len, kv_len, kv_len))
    call, rule = AttentionCall(q, k, v, scale=0.25), SkipRule.blasst(0.5)
    return lambda: cpu.run(call, rule, BlockGeometry.from_name(geometry))

torch.set_num_threads(1)
prepare(256, 256, "64x64")()
for geometry in ("64x64", "64x1"):
    print(added_kib(prepare(4096, 65536, geometry)))
print(added_kib(lambda: torch.ones(16 * 2**20)))
"""


def test_memory_does_not_grow_with_the_scores() -> None:
    """A full score matrix of this call would be 1024 MiB, a block row of it 16 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    *calls, ones = (int(line) / 1024 for line in done.stdout.split())  # MiB
    assert 63 < ones < 72, "the measure itself"
    assert max(calls) < 8
