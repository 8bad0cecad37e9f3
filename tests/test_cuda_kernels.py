"""The CUDA kernels' own source, run thread by thread on the CPU, against float64."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from dataclasses import replace
from typing import Any

import cuda_source
import pytest
import torch
from kernel_checks import check
from test_triton_kernels import CALLS, RULES, make_call, padded
from torch import Tensor

from hf_sparse_attention.backends import kernel
from hf_sparse_attention.types import (
    ORDERS,
    AttentionCall,
    AttentionResult,
    BlockGeometry,
    SkipRule,
    unpack_bits,
)

SQUARE, WIDE = BlockGeometry(64, 64, split_k=64), BlockGeometry(64, 128, split_k=128)


def run(
    call: AttentionCall,
    rule: SkipRule,
    geometry: BlockGeometry,
    *,
    skips: bool = True,
    dropped_mass: bool = True,
) -> AttentionResult:
    run_cuda = kernel.runner("cuda", lambda: kernel.namespace_of(cuda_source.load()))
    return run_cuda(call, rule, geometry, return_skips=skips, return_dropped_mass=dropped_mass)


def made(**features: Any) -> AttentionCall:
    return make_call(**{"dtype": torch.bfloat16, **features})


def checked(call: AttentionCall, rule: str, geometry: BlockGeometry = SQUARE) -> AttentionResult:
    result = run(call, RULES[rule], geometry)
    check(call, RULES[rule], geometry, result, weights_dtype=call.q.dtype)
    return result


@pytest.mark.parametrize("name", CALLS)
def test_decisions_and_numbers(name: str) -> None:
    for rule in RULES:
        checked(made(**CALLS[name]), rule)


def test_the_inputs_above_do_skip() -> None:
    """Else the test above would prove little."""
    for rule in set(RULES) - {"never"}:
        counts = [run(made(**x), RULES[rule], SQUARE).counts for x in CALLS.values()]
        shares = [float(x[..., 1].sum() / x[..., 0].sum()) for x in counts if x is not None]
        assert sum(0 < share < 1 for share in shares) >= 3, (rule, shares)


@pytest.mark.parametrize(
    ("geometry", "order"), list(itertools.product([SQUARE, WIDE], ORDERS)), ids=str
)
def test_geometries(geometry: BlockGeometry, order: Any) -> None:
    blocks = replace(geometry, order=order)
    for rule in ("never", "blasst", "bsfa", "budget"):
        checked(made(q_len=300, kv_len=300, heads=1), rule, blocks)
        checked(made(q_len=1, kv_len=700), rule, blocks)


SIZES = [(64, 64), (80, 80), (128, 128), (96, 64), (192, 128), (256, 256), (8, 8), (200, 136)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_head_sizes(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    wide = [SQUARE, WIDE] if sizes[0] <= 192 and sizes[1] <= 128 else [SQUARE]
    for q_len, geometry in itertools.product([140, 1], wide):
        options = {"q_len": q_len, "kv_len": 260, "head_size": sizes[0], "v_size": sizes[1]}
        checked(made(dtype=dtype, heads=1, **options), "blasst", geometry)
        checked(made(dtype=dtype, heads=1, **options), "never", geometry)


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_turns_gives_the_same(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Which warp runs first, and when copies arrive, must not matter: where it does is a race."""
    blocks = replace(SQUARE, split_k=2048)
    padded_decode = {"batch": 2, "q_len": 3, "kv_len": 420, "key_valid": padded(2, 420)}
    # Some blocks skipped among many kept, so that V is fetched ahead and then not used.
    one_split = {"q_len": 1, "kv_len": 1800, "kind": "noise"}
    for features in ({"kv_len": 420}, padded_decode, one_split):
        call = made(**features)
        for rule in (SkipRule.blasst(0.4), RULES["budget"], SkipRule.never()):
            expected = run(call, rule, blocks)
            monkeypatch.setenv("BSA_EMULATOR_SEED", str(seed))
            found = run(call, rule, blocks)
            monkeypatch.delenv("BSA_EMULATOR_SEED")
            check(call, rule, blocks, found, weights_dtype=call.q.dtype)
            for name in ("out", "lse", "counts", "skips", "dropped_mass"):
                assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_swizzled_blocks_are_read_without_bank_conflicts() -> None:
    for size, q_len in itertools.product((64, 128), (70, 1)):
        checked(made(q_len=q_len, kv_len=130, head_size=size), "blasst")
    totals = cuda_source.totals()
    assert totals.products > 0
    assert totals.bank_conflicts == 0


def test_thresholds_by_request_head_and_row() -> None:
    call = made(batch=2, heads=2, kv_heads=2)
    rule = SkipRule(
        log_lambda=torch.tensor([[-0.2, -5.0], [-1.0, -30.0]]),
        block_threshold=torch.linspace(1.0, 6.0, 2 * 2 * 3).reshape(2, 2, 3),
    )
    check(call, rule, SQUARE, run(call, rule, SQUARE), weights_dtype=call.q.dtype)


def test_any_strides() -> None:
    """Transposed views as transformers has them are read as they are; the others are copied."""
    call = made(head_size=64)
    expected = run(call, RULES["blasst"], SQUARE)

    def inner(x: Tensor) -> Tensor:
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    def odd(x: Tensor) -> Tensor:
        return torch.cat([torch.zeros(3, dtype=x.dtype), x.flatten()])[3:].view(x.shape)

    def heads_inside(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    for change in (inner, odd, heads_inside):
        views = {name: change(getattr(call, name)) for name in ("q", "k", "v")}
        found = run(replace(call, **views), RULES["blasst"], SQUARE)
        assert torch.equal(found.out, expected.out)


def at_the_end_of_memory(x: Tensor) -> Tensor:
    """A copy of `x`; who reads on behind it, or writes, is killed by SIGSEGV."""
    pages = -(-x.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    behind = ctypes.c_void_p(address + pages * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(behind, mmap.PAGESIZE, 0) == 0
    start = pages * mmap.PAGESIZE - x.nbytes
    there = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=start).view(x.shape)
    return there.copy_(x)


@pytest.mark.parametrize("name", ["odd length", "padding", "decode", "decode of 3, padded"])
def test_nothing_behind_the_tensors_is_read(name: str) -> None:
    call = made(**CALLS[name])
    expected = run(call, RULES["blasst"], SQUARE).out
    tensors = {n: x for n, x in vars(call).items() if torch.is_tensor(x)}
    guarded = replace(call, **{n: at_the_end_of_memory(x) for n, x in tensors.items()})
    child = os.fork()
    if child == 0:
        os._exit(not torch.equal(run(guarded, RULES["blasst"], SQUARE).out, expected))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("rule", ["blasst", "bsfa", "budget"])
@pytest.mark.parametrize("q_len", [100, 1], ids=["prefill", "decode"])
def test_nan_is_never_skipped(rule: str, q_len: int) -> None:
    call = made(q_len=q_len, kv_len=240)
    call.k[:, :, 70] = torch.nan
    result = run(call, RULES[rule], SQUARE)
    assert result.skips is not None
    assert not unpack_bits(result.skips, 4)[..., 1].any()
    assert result.out[:, -1].isnan().all()


def test_what_is_not_asked_for_changes_nothing() -> None:
    for features in ({}, CALLS["decode"]):
        call = made(**features)
        full = run(call, RULES["blasst"], SQUARE)
        bare = run(call, RULES["blasst"], SQUARE, skips=False, dropped_mass=False)
        assert torch.equal(bare.out, full.out)
        assert full.counts is not None
        assert bare.counts is not None
        assert torch.equal(bare.counts, full.counts)


def test_nothing_to_attend_to() -> None:
    for q_len, kv_len in ((5, 0), (0, 5)):
        result = run(made(q_len=q_len, kv_len=kv_len), RULES["blasst"], SQUARE)
        assert result.out.shape == (1, q_len, 2, 32)
        assert (result.out == 0).all()
        assert result.lse is not None
        assert result.lse.isneginf().all()


@pytest.mark.parametrize(
    ("changes", "geometry", "message"),
    [
        ({"dtype": torch.float32}, SQUARE, "expected bfloat16 or float16; Triton serves float32"),
        ({"head_size": 320}, SQUARE, "head sizes up to 256, got head sizes 320"),
        ({"head_size": 20}, SQUARE, "multiples of 8, got head sizes 20"),
        ({"head_size": 192}, WIDE, "block_k: expected 64 at head sizes above 192, and 128 of V"),
        ({}, BlockGeometry(64, 1), "block_k: expected 64 or 128, got .* blocks of 64x1"),
        ({}, BlockGeometry(32, 64), "block_q: expected 64, got .* blocks of 32x64"),
        ({"q_len": 1, "kv_len": 9, "heads": 32}, SQUARE, "at most 16 query heads"),
        ({"scale": -1.0}, SQUARE, "expected a positive scale, got -1"),
    ],
    ids=lambda x: "" if isinstance(x, BlockGeometry | str) else str(x),
)
def test_refused_with_a_reason(
    changes: dict[str, Any], geometry: BlockGeometry, message: str
) -> None:
    scale = changes.pop("scale", None)
    call = made(**{"q_len": 9, "kv_len": 9, **changes})
    if scale is not None:
        call = replace(call, scale=scale)
    with pytest.raises(RuntimeError, match=message):
        run(call, RULES["never"], geometry)
