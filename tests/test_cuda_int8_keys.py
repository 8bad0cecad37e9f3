"""Decode in CUDA with an int8 copy of K, emulated: not one bit changes, and less is read."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import cuda_source
import pytest
import torch
from kernel_checks import structured
from key_shapes import KEY_SHAPES
from test_cuda_kernels import at_the_end_of_memory
from test_int8_keys import assert_same, decode_call, on_the_edge, separated
from torch import Tensor

from hf_sparse_attention.backends import cuda, kernel
from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, SkipRule

SQUARE, WIDE = BlockGeometry(64, 64), BlockGeometry(64, 128)
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_source.load()
    monkeypatch.setenv("HF_SPARSE_ATTENTION_EMULATE", "1")
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)


def run(call: AttentionCall, rule: SkipRule, geometry: BlockGeometry) -> AttentionResult:
    return cuda.run(call, rule, geometry, return_skips=True)


def empty(k: Tensor, more: int = 0) -> Tensor:
    """An empty copy of `k` and of `more` keys behind."""
    batch, heads, length, size = k.shape
    return cuda_source.load().empty_int8_keys(batch, heads, length + more, size)


def copy_of(k: Tensor) -> Tensor:
    copy = empty(k)
    cuda.append_int8_keys(k, torch.tensor([0]), copy)
    return copy


class Work(NamedTuple):
    """Of one call: 16-byte pieces of K and V copied, and int8 products."""

    pieces: int
    byte_products: int


def measured(
    call: AttentionCall, rule: SkipRule, geometry: BlockGeometry
) -> tuple[AttentionResult, Work]:
    totals = cuda_source.totals()  # which go on
    before = Work(totals.copies, totals.byte_products)
    result = run(call, rule, geometry)
    after = Work(totals.copies, totals.byte_products)
    return result, Work(*(b - a for a, b in zip(before, after, strict=True)))


def check(call: AttentionCall, rule: SkipRule, geometry: BlockGeometry, copy: Tensor) -> int:
    """That the copy changes nothing; returns how many pieces of K and V fewer were read."""
    want, without = measured(call, rule, geometry)
    got, work = measured(replace(call, int8_keys=copy), rule, geometry)
    assert_same(got, want)
    assert without.byte_products == 0
    return without.pieces - work.pieces


# ---- The copy.


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("change", KEY_SHAPES, ids=lambda f: f.__name__)
def test_the_copy_keeps_its_bounds(change: Any, dtype: torch.dtype) -> None:
    """What the proof takes for granted of a, k8, A and E, in float64."""
    torch.manual_seed(1)
    k = change(torch.randn(1, 2, 128, 40)).to(dtype)
    copy = copy_of(k)
    heads = copy[:, :, 0].contiguous().view(torch.float32)
    mean = heads[..., :40].double()
    chunks = copy[:, :, 1:]
    words = chunks[..., : 64 * 40].reshape(1, 2, -1, 10, 64, 4)
    k8 = words.permute(0, 1, 2, 4, 3, 5).reshape(1, 2, -1, 40).double() - 128
    bounds = chunks[..., 64 * 40 :].contiguous().view(torch.float32).reshape(1, 2, -1, 3, 64)
    a, copied, missed = bounds.transpose(3, 4).reshape(1, 2, -1, 3).double().unbind(-1)
    assert k8.abs().max() <= 127
    rest = k.double() - mean[:, :, None] - a[..., None] * k8
    known = a > 0
    assert torch.equal(known, k.isfinite().all(-1)), "all that is finite is known"
    assert (copied >= a * k8.norm(dim=-1))[known].all()
    assert (missed >= rest.norm(dim=-1))[known].all()
    spread = (k.double() - mean[:, :, None]).abs().amax(-1)
    assert (rest.abs().amax(-1) <= spread / 253 + 1e-30)[known].all(), "and near"


def test_keys_enter_in_any_pieces() -> None:
    call, rule = separated(torch.bfloat16, 1280), SkipRule.blasst(1e-3)
    copy = empty(call.k, more=100)  # as in a static cache
    for a, b in itertools.pairwise([0, 3, 64, 65, 300, 301, 1100, 1280]):
        if a != 65:  # a gap: keys that are not known
            cuda.append_int8_keys(call.k[:, :, a:b], torch.tensor([a]), copy)
    cuda.append_int8_keys(torch.randn_like(call.k[:, :, 400:600]), torch.tensor([400]), copy)
    cuda.append_int8_keys(call.k[:, :, 400:600], torch.tensor([400]), copy)  # replaced
    for geometry in (SQUARE, WIDE):
        assert check(call, rule, geometry, copy) > 0
    copy.zero_()
    assert check(call, rule, SQUARE, copy) == 0


def test_any_strides_and_no_place_behind_the_end() -> None:
    k = torch.randn(2, 3, 150, 24, dtype=torch.bfloat16)
    want = copy_of(k)
    for view in (k.transpose(1, 2).contiguous().transpose(1, 2), k.mT.contiguous().mT):
        assert torch.equal(copy_of(view), want)
    copy = want.clone()
    for position in (-5, 192, 2**40):
        cuda.append_int8_keys(k[:, :, :5], torch.tensor([position]), copy)
    assert torch.equal(copy, want), "a static cache that is full writes nothing"


@pytest.mark.parametrize(
    ("k", "position", "copy", "message"),
    [
        ((1, 2, 9, 16), torch.zeros(1), (1, 2, 2, 64 * 28), "position: expected one int64"),
        ((1, 2, 9, 16), torch.zeros(2).long(), (1, 2, 2, 64 * 28), "position: expected one int64"),
        ((1, 2, 9, 520), torch.tensor([0]), (1, 2, 2, 64 * 532), "head size 1 to 512"),
        ((1, 2, 9, 16), torch.tensor([0]), (1, 2, 1, 64 * 28), "at least 2, 1792"),
        ((1, 2, 9, 16), torch.tensor([0]), (1, 1, 2, 64 * 28), r"expected contiguous uint8 \[1, 2"),
    ],
)
def test_wrong_keys_are_refused(k: Any, position: Tensor, copy: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        cuda.append_int8_keys(torch.zeros(k), position, torch.zeros(copy, dtype=torch.uint8))


def test_a_copy_of_other_keys_is_refused() -> None:
    call = separated(torch.bfloat16, 640)
    for wrong in (empty(call.k[:, :, :500]), empty(call.k[..., :32]), empty(call.k).int()):
        with pytest.raises(RuntimeError, match="int8_keys: expected contiguous uint8"):
            run(replace(call, int8_keys=wrong), SkipRule.blasst(0.1), SQUARE)


# ---- Decode.


def lambda_on_the_edge(call: AttentionCall, block: int) -> SkipRule:
    """For each head, a lambda with which some block of its group's is just skipped, or just not.

    One query; blocks of `block` keys, of which the first and the last are the seed.
    """
    k = call.k.float().repeat_interleave(call.group, 1)
    tops = (call.scale * call.q.float() @ k.mT)[:, :, 0].unflatten(2, (-1, block)).amax(-1)
    gaps = tops[..., 1:-1] - tops[..., [0, -1]].amax(-1, keepdim=True)
    chosen = torch.randint(gaps.shape[2], (*call.k.shape[:2], 1)).repeat_interleave(call.group, 1)
    gap = gaps.gather(2, chosen)[..., 0]
    nudged = gap.nextafter(gap + torch.randint(-1, 2, gap.shape))
    return SkipRule(log_lambda=nudged.clamp(max=-1e-3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", KEY_SHAPES, ids=lambda f: f.__name__)
def test_the_copy_changes_nothing(change: Any, dtype: torch.dtype) -> None:
    """Thresholds on the very edge, too, where a bound that is too small would show."""
    for seed in range(2):
        torch.manual_seed(seed)
        kind, q_len = ("sink", "needle")[seed], (1, 3)[seed]
        size = (16, 64)[seed]
        call = decode_call(kind, dtype, q_len=q_len, size=size, change=change, length=640)
        if not call.k.isfinite().all():
            pytest.skip("the dtype does not hold such keys")
        copy = copy_of(call.k)
        for geometry in (SQUARE, WIDE):
            for rule in (SkipRule.blasst(0.9), SkipRule.blasst(0.01), on_the_edge(call, geometry)):
                check(call, rule, geometry, copy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exact", ["q", "k", "neither"])
def test_on_the_edge(exact: str, dtype: torch.dtype) -> None:
    """Where int8 holds queries or keys exactly, all that is left of the margin is the others'."""
    for seed in range(12):
        torch.manual_seed(seed)
        call = decode_call("noise", dtype, size=8, length=640)
        if exact == "q":
            q = torch.randint(-127, 128, call.q.shape)
            q[..., 0] = 127
            call = replace(call, q=q.to(dtype), scale=0.01)
        if exact == "k":
            half = torch.randint(-127, 128, (1, 2, 320, 8))
            half[..., 0] = torch.where(half[..., 0] < 0, -127, 127)
            call = replace(call, k=torch.cat([half, -half], dim=2).to(dtype) / 64)
        copy = empty(call.k)
        if exact == "k":  # a key and its opposite make a mean of zero
            cuda.append_int8_keys(call.k[:, :, [0, 320]], torch.tensor([0]), copy)
        cuda.append_int8_keys(call.k, torch.tensor([0]), copy)
        for geometry in (SQUARE, WIDE):
            check(call, on_the_edge(call, geometry), geometry, copy)
            check(call, lambda_on_the_edge(call, geometry.block_k), geometry, copy)


@pytest.mark.parametrize("size", [64, 128, 192, 256])
@pytest.mark.parametrize("geometry", [SQUARE, WIDE], ids=lambda g: g.name)
def test_what_is_proved_is_not_read(geometry: BlockGeometry, size: int) -> None:
    if geometry is WIDE and size == 256:
        pytest.skip("not compiled")
    call, rule = separated(DTYPES[size % 128 // 64], 1408, size), SkipRule.blasst(1e-3)
    copy, want = copy_of(call.k), run(call, rule, geometry)
    far = call.k[..., 0] == 0
    far[:, :, -128:] = False  # the newest block is always read
    call.k[far] = math.nan
    got, work = measured(replace(call, int8_keys=copy), rule, geometry)
    assert torch.equal(got.skips, want.skips)
    assert torch.equal(got.counts, want.counts)
    assert got.out.isfinite().all()
    found, without = measured(call, rule, geometry)
    assert found.out.isnan().any(), "without the copy K is read"
    assert work.pieces < without.pieces / 2
    # All of the copy is read just once, by 32 keys and as many channels in four products.
    units = 1408 // 32 + 2 * 4  # and a little twice, or for the seed
    assert work.byte_products <= 2 * units * 4 * size // 32


@pytest.mark.parametrize(
    ("sizes", "n_heads", "kv_heads"),
    [
        ((64, 64), 6, 2),
        ((80, 40), 16, 1),
        ((128, 128), 4, 1),
        ((192, 128), 1, 1),
        ((256, 64), 2, 1),
    ],
    ids=str,
)
def test_padding_windows_sinks_and_head_sizes(
    sizes: tuple[int, int], n_heads: int, kv_heads: int
) -> None:
    saved = 0
    for seed in range(6):
        torch.manual_seed(seed)
        q_len, length, dtype = (1, 5)[seed % 2], 500 + 37 * seed, DTYPES[seed % 2]
        q, k = structured("sink", 2, n_heads, kv_heads, q_len, length, sizes[0])
        valid = torch.arange(length) >= torch.tensor([[0], [41 * seed]])
        valid[0, length - 13 * seed :] = False
        if seed == 3:
            valid &= torch.rand(2, length) < 0.9
            valid[:, 128:200] = False  # nobody sees these blocks
        call = AttentionCall(
            *(x.to(dtype) for x in (q, k, torch.randn(2, kv_heads, length, sizes[1]))),
            scale=sizes[0] ** -0.5,
            key_valid=valid if seed else None,
            window=(None, 450, 200)[seed % 3],
            q_offset=torch.tensor([length - 150, length - 70]) if seed == 4 else None,
            sinks=torch.randn(n_heads) if seed == 5 else None,
        )
        copy = copy_of(call.k)
        for block_k, split_k in ((64, 128), (128, 1024)):
            if block_k == 128 and sizes[0] == 256:
                continue
            geometry = BlockGeometry(64, block_k, split_k=split_k)
            saved += check(call, SkipRule.blasst(0.2), geometry, copy)
    assert saved > 0


def test_a_static_cache_holds_anything_behind_its_newest_key() -> None:
    call = replace(separated(torch.bfloat16, 1408), q_offset=torch.tensor([1000]))
    want = run(call, SkipRule.blasst(1e-3), SQUARE)
    for x in (call.k, call.v):
        x[:, :, 1001:] = math.nan
    copy = empty(call.k, more=500)
    cuda.append_int8_keys(call.k[:, :, :1001], torch.tensor([0]), copy)
    assert check(call, SkipRule.blasst(1e-3), SQUARE, copy) > 0
    assert_same(run(replace(call, int8_keys=copy), SkipRule.blasst(1e-3), SQUARE), want)


@pytest.mark.parametrize(
    ("options", "rule", "order"),
    [
        ({"softcap": 5.0}, SkipRule.blasst(0.2), "sink_diagonal"),
        ({}, SkipRule.budget(0.1), "sink_diagonal"),
        ({}, SkipRule.never(), "sink_diagonal"),
        ({}, SkipRule.blasst(0.2), "ascending"),
        ({}, SkipRule.blasst(0.2), "descending"),
        ({"scale": 1e-6}, SkipRule.blasst(0.2), "sink_diagonal"),
        ({"scale": 1e6}, SkipRule.blasst(0.2), "sink_diagonal"),
    ],
)
def test_where_it_stays_out(options: dict[str, Any], rule: SkipRule, order: Any) -> None:
    call = replace(separated(torch.bfloat16, 640), **options)
    call = replace(call, int8_keys=copy_of(call.k))
    result, work = measured(call, rule, replace(SQUARE, order=order))
    assert work.byte_products == 0
    assert_same(run(replace(call, int8_keys=None), rule, replace(SQUARE, order=order)), result)


def test_the_certificate_stays_exact() -> None:
    call, rule = separated(torch.bfloat16, 640), SkipRule.blasst(0.01)
    got, want = (
        cuda.run(x, rule, SQUARE, return_dropped_mass=True).dropped_mass
        for x in (replace(call, int8_keys=copy_of(call.k)), call)
    )
    assert got is not None
    assert want is not None
    assert torch.equal(got, want)
    assert want.max() > 0


@pytest.mark.parametrize(
    "rule",
    [
        SkipRule.bsfa(0.5),
        SkipRule.bsfa(0.5, keep_sink=False),
        SkipRule.bsfa(math.inf),
        SkipRule.bsfa(-math.inf),
        SkipRule.blasst(0.0),
        SkipRule(SkipRule.blasst(0.5).log_lambda, torch.full((1, 1, 1), 1.0)),
        SkipRule(SkipRule.blasst(0.5).log_lambda, torch.full((1, 4, 1), -math.nan)),
        SkipRule(torch.tensor([[-0.1, -5.0, -30.0, -1.0]]), None),
    ],
    ids=str,
)
def test_rules(rule: SkipRule) -> None:
    call = separated(torch.bfloat16, 1280)
    copy = copy_of(call.k)
    for changed in (call, replace(call, causal=False), replace(call, window=700)):
        for geometry in (SQUARE, WIDE):
            check(changed, rule, geometry, copy)
    # Rows of a threshold count from the first that sees a key.
    early = replace(call, q_offset=torch.tensor([-2]), q=call.q.expand(-1, -1, 4, -1).contiguous())
    check(early, rule, SQUARE, copy)


def test_a_seed_that_nobody_sees_proves_nothing() -> None:
    """All blocks are skipped, and that they were seen makes a difference: the sink's lse."""
    call = separated(torch.bfloat16, 640)
    valid = (torch.arange(640) < 500)[None]
    call = replace(call, key_valid=valid, window=400, sinks=torch.randn(4))
    check(call, SkipRule.bsfa(100.0), SQUARE, copy_of(call.k))
    assert run(call, SkipRule.bsfa(100.0), SQUARE).lse.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("where", ["q", "k", "sink key", "all of k"])
def test_what_is_not_finite_is_not_filtered(where: str, bad: float) -> None:
    call = separated(torch.bfloat16, 1280)
    if where == "q":
        call.q[0, 1, 0, 5] = bad
    else:
        keys = {"k": 700, "sink key": 0, "all of k": slice(None)}[where]
        call.k[0, 0, keys, 5] = bad
    copy = copy_of(call.k)
    for geometry in (SQUARE, WIDE):
        for rule in (SkipRule.blasst(0.01), SkipRule.bsfa(0.5), SkipRule.bsfa(math.inf)):
            check(call, rule, geometry, copy)


def test_it_gives_up_where_nothing_is_proved() -> None:
    """It reads an eighth of each split's copy; and goes on where skips are few but come first."""
    torch.manual_seed(0)
    call = decode_call("noise", torch.bfloat16, size=64, length=2048)
    copied = replace(call, int8_keys=copy_of(call.k))
    none, tried = measured(copied, SkipRule.blasst(1e-6), SQUARE)
    assert none.counts is not None
    assert none.counts[..., 1].sum() == 0
    splits, heads, products = 2, 2, 4 * 64 // 32  # of 32 keys
    assert tried.byte_products == splits * heads * 4 * products


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_turns_gives_the_same(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    call, rule = separated(torch.bfloat16, 2048), SkipRule.blasst(1e-3)
    call.k[:, :, 500:800, 0] = 30.0  # it gives up in one split, after a while
    copy, want = copy_of(call.k), run(call, rule, SQUARE)
    monkeypatch.setenv("BSA_EMULATOR_SEED", str(seed))
    again = copy_of(call.k)
    assert torch.equal(again, copy)
    for split_k in (1024, 2048):
        assert check(call, rule, replace(SQUARE, split_k=split_k), copy) > 0
    assert_same(run(replace(call, int8_keys=copy), rule, SQUARE), want)


def test_nothing_behind_the_copy_is_read() -> None:
    for size, length in ((64, 640), (72, 600)):
        call, rule = separated(torch.bfloat16, 640, size), SkipRule.blasst(1e-3)
        call = replace(call, k=call.k[:, :, :length], v=call.v[:, :, :length])
        copy = at_the_end_of_memory(copy_of(call.k))
        call = replace(call, k=at_the_end_of_memory(call.k), q=at_the_end_of_memory(call.q))
        check(call, rule, SQUARE, copy)  # a read behind it is a SIGSEGV
        cuda.append_int8_keys(call.k, torch.tensor([0]), copy)


def test_opcheck() -> None:
    ops = getattr(torch.ops, kernel.namespace("emulated"))
    call = separated(torch.bfloat16, 640)
    copy = empty(call.k)
    checks = ("test_schema", "test_faketensor")
    arguments = (call.k, torch.tensor([0]), copy)
    torch.library.opcheck(ops.append_int8_keys.default, arguments, test_utils=checks)
    tensors = (call.q, call.k, call.v, None, None, None, torch.full((1, 1), -5.0), None, None)
    options = (0.4, True, 0, 0.0, 64, 64, 1, 1024, True, True, False)
    torch.library.opcheck(
        ops.forward.default, (*tensors, *options, copy_of(call.k)), test_utils=checks
    )
