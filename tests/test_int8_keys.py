"""The int8 copy of K beside a cache changes nothing in decode: not one bit, not one decision."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from kernel_checks import structured
from key_shapes import KEY_SHAPES, plain
from torch import Tensor

from hf_sparse_attention import Int8Keys, block_skip_attention
from hf_sparse_attention.backends import cpu
from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, SkipRule

pytestmark = pytest.mark.usefixtures("cpu_kernel")

LENGTH = 1152
GEOMETRIES = [BlockGeometry.from_name(name) for name in ("64x64", "64x128", "64x1")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = ["portable", "avx2", "avx512", "avx512_bf16", "avx512_amx"]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_SPARSE_ATTENTION_CPU_LEVEL", request.param)
    try:
        cpu.load_kernel().cpu_level()
    except RuntimeError:
        pytest.skip("this machine does not have it")
    return request.param


def pair(
    call: AttentionCall, rule: SkipRule, geometry: BlockGeometry, copy: Tensor | None = None
) -> tuple[AttentionResult, AttentionResult]:
    """The call with the copy, and without."""
    copied = replace(call, int8_keys=Int8Keys.of(call.k).data if copy is None else copy)
    return tuple(cpu.run(x, rule, geometry, return_skips=True) for x in (copied, call))


def assert_same(a: AttentionResult, b: AttentionResult) -> None:
    for name in ("skips", "counts", "lse", "out"):
        x, y = (getattr(result, name).nan_to_num(nan=-12345.0) for result in (a, b))
        assert torch.equal(x, y), name


def on_the_edge(call: AttentionCall, geometry: BlockGeometry) -> SkipRule:
    """A threshold for each row that is the largest score of a block, or a neighbour of it.

    Every block has its turn, as heads, positions and seeds choose others. So a decision hangs on
    the last bits, where a bound that is too small would show.
    """
    q, k = call.q.float(), call.k.float().repeat_interleave(call.group, 1)
    scores = call.scale * q @ k.transpose(2, 3)
    block = max(geometry.block_k, 4)
    tops = scores.unflatten(3, (-1, block)).amax(-1)
    # The group votes together: what one head lets pass, all must.
    voted = tops.unflatten(1, (-1, call.group))
    chosen = torch.randint(tops.shape[-1], (*voted.shape[:2], 1, *voted.shape[3:4], 1))
    threshold = voted.gather(4, chosen.expand(*voted.shape[:4], 1)).flatten(1, 2)[..., 0]
    nudge = torch.randint(-1, 2, threshold.shape)
    threshold = torch.where(nudge > 0, threshold.nextafter(torch.tensor(math.inf)), threshold)
    threshold = torch.where(nudge < 0, threshold.nextafter(torch.tensor(-math.inf)), threshold)
    return SkipRule.bsfa(threshold)


def decode_call(
    kind: str, dtype: torch.dtype, *, q_len: int = 1, size: int = 32, change=plain, length=LENGTH
) -> AttentionCall:
    q, k = structured(kind, 1, 4, 2, q_len, length, size)
    v = torch.randn(1, 2, length, 8)
    return AttentionCall(q.to(dtype), change(k).to(dtype), v.to(dtype), scale=0.4)


@pytest.mark.parametrize("rule", ["lambda 0.9", "lambda 0.01", "on the edge"])
@pytest.mark.parametrize("change", KEY_SHAPES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_copy_changes_nothing(rule: str, change, dtype: torch.dtype) -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        kind, q_len = ("noise", "sink", "needle")[seed % 3], (1, 3)[seed // 3]
        call = decode_call(kind, dtype, q_len=q_len, size=(16, 30, 64)[seed % 3], change=change)
        if not call.k.isfinite().all():
            pytest.skip("the dtype does not hold such keys")
        for geometry in GEOMETRIES:
            if rule == "on the edge":
                chosen = on_the_edge(call, geometry)
            else:
                chosen = SkipRule.blasst(float(rule.split()[1]))
            assert_same(*pair(call, chosen, geometry))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_keys_copy_misses_counts(dtype: torch.dtype) -> None:
    """Queries that int8 holds exactly: all that is left of the margin is the keys' own."""
    for seed in range(24):
        torch.manual_seed(seed)
        call = decode_call("noise", dtype, size=8)
        q = torch.randint(-127, 128, call.q.shape)
        q[..., 0] = 127
        call = replace(call, q=q.to(dtype), scale=0.01)
        for geometry in GEOMETRIES:
            assert_same(*pair(call, on_the_edge(call, geometry), geometry))


def test_every_level(level: str) -> None:
    for seed, dtype in enumerate(DTYPES):
        torch.manual_seed(seed)
        for q_len in (1, 2, 8):
            call = decode_call("sink", dtype, q_len=q_len, size=(64, 80, 128)[seed])
            for geometry in GEOMETRIES:
                assert_same(*pair(call, SkipRule.blasst(0.05), geometry))
                assert_same(*pair(call, on_the_edge(call, geometry), geometry))


def separated(dtype: torch.dtype, length: int = 4096, size: int = 64) -> AttentionCall:
    """Blocks of 128 keys that lie far below the others, but for every tenth."""
    call = decode_call("noise", dtype, length=length, size=size)
    strong = (torch.arange(length // 128) % 10 == 0).repeat_interleave(128)
    call.q[..., 0], call.k[..., 0] = 8.0, 30.0 * strong
    return replace(call, scale=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: g.name)
def test_what_is_proved_is_not_read(
    geometry: BlockGeometry, dtype: torch.dtype, level: str
) -> None:
    call, rule = separated(dtype), SkipRule.blasst(1e-3)
    copied, want = pair(call, rule, geometry)
    assert_same(copied, want)
    copy = Int8Keys.of(call.k).data
    call.k[call.k[..., 0] == 0] = math.nan
    # But for the newest block, which is always read.
    call.k[:, :, -128:] = torch.zeros((), dtype=dtype)
    got = cpu.run(replace(call, int8_keys=copy), rule, geometry, return_skips=True)
    assert torch.equal(got.skips, want.skips)
    assert got.out.isfinite().all()
    assert cpu.run(call, rule, geometry).out.isnan().any(), "without the copy K is read"


@pytest.mark.parametrize("sizes", [(64, 64), (80, 80), (128, 128), (192, 128), (256, 64), (33, 19)])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_padding_windows_sinks_and_head_sizes(sizes: tuple[int, int], kv_heads: int) -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        q_len, length, dtype = (1, 5)[seed % 2], 1000 + 37 * seed, DTYPES[seed % 3]
        q, k = structured("sink", 2, 6, kv_heads, q_len, length, sizes[0])
        valid = torch.arange(length) >= torch.tensor([[0], [101 * seed]])
        valid[0, length - 13 * seed :] = False
        if seed == 3:
            valid &= torch.rand(2, length) < 0.9
        call = AttentionCall(
            *(x.to(dtype) for x in (q, k, torch.randn(2, kv_heads, length, sizes[1]))),
            scale=sizes[0] ** -0.5,
            key_valid=valid if seed else None,
            window=(None, 900, 300)[seed % 3],
            q_offset=torch.tensor([length - 250, length - 120]) if seed == 4 else None,
            sinks=torch.randn(6) if seed == 5 else None,
        )
        for block_k, split_k in ((64, 128), (128, 1024), (1, 64)):
            geometry = BlockGeometry(64, block_k, split_k=split_k)
            assert_same(*pair(call, SkipRule.blasst(0.2), geometry))


@pytest.mark.parametrize(
    ("options", "rule", "order"),
    [
        ({"softcap": 5.0}, SkipRule.blasst(0.2), "sink_diagonal"),
        ({}, SkipRule.budget(0.1), "sink_diagonal"),
        ({}, SkipRule.blasst(0.2), "ascending"),
        ({}, SkipRule.blasst(0.2), "descending"),
        ({"scale": -0.4}, SkipRule.blasst(0.2), "sink_diagonal"),
        ({"causal": False}, SkipRule.bsfa(0.5, keep_sink=False), "sink_diagonal"),
        (
            {},
            SkipRule(SkipRule.blasst(0.5).log_lambda, torch.full((1, 1, 1), 1.0)),
            "sink_diagonal",
        ),
        ({}, SkipRule.bsfa(math.inf), "sink_diagonal"),
        ({}, SkipRule.blasst(0.0), "sink_diagonal"),
    ],
)
def test_rules_and_options(options: dict, rule: SkipRule, order: str) -> None:
    call = replace(separated(torch.float32), **options)
    for name in ("64x64", "64x1"):
        assert_same(*pair(call, rule, BlockGeometry.from_name(name, order)))


def test_the_certificate_stays_exact() -> None:
    call, geometry = separated(torch.float32), BlockGeometry()
    copied = replace(call, int8_keys=Int8Keys.of(call.k).data)
    got, want = (
        cpu.run(x, SkipRule.blasst(0.01), geometry, return_dropped_mass=True).dropped_mass
        for x in (copied, call)
    )
    assert torch.equal(got, want)
    assert want.max() > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("where", ["q", "k", "sink key", "all of k"])
def test_what_is_not_finite_is_not_filtered(where: str, bad: float) -> None:
    call = separated(torch.float32)
    if where == "q":
        call.q[0, 1, 0, 5] = bad
    else:
        keys = {"k": 700, "sink key": 0, "all of k": slice(None)}[where]
        call.k[0, 0, keys, 5] = bad
    for geometry in GEOMETRIES:
        for rule in (SkipRule.blasst(0.01), SkipRule.bsfa(0.5), SkipRule.bsfa(math.inf)):
            assert_same(*pair(call, rule, geometry))


def test_keys_enter_in_any_pieces() -> None:
    call, rule = separated(torch.bfloat16), SkipRule.blasst(1e-3)
    length = call.k.shape[2]
    copy = Int8Keys(1, 2, length + 100, call.k.shape[3])  # room for more, as in a static cache
    cuts = [0, 3, 64, 65, 700, 701, 4000, length]
    for a, b in itertools.pairwise(cuts):
        if a != 65:  # a gap: keys that are not known
            copy.append(call.k[:, :, a:b], a)
    copy.append(torch.randn_like(call.k[:, :, 100:300]), 100)
    copy.append(call.k[:, :, 100:300], torch.tensor([100]))  # what stands there is replaced
    for geometry in GEOMETRIES:
        assert_same(*pair(call, rule, geometry, copy.data))
    copy.clear()
    assert_same(*pair(call, rule, GEOMETRIES[0], copy.data))


def test_batch_items_are_selected() -> None:
    call = separated(torch.float32)
    k = torch.cat([call.k, call.k.flip(3), torch.randn_like(call.k)])
    copy, order = Int8Keys.of(k), torch.tensor([2, 0, 0, 1])
    copy.select(order)
    assert torch.equal(copy.data, Int8Keys.of(k[order]).data)
    assert copy.data_for(k[order]) is copy.data


def test_the_function_takes_a_copy() -> None:
    call, rule = separated(torch.float32), SkipRule.blasst(1e-3)
    copy = Int8Keys.of(call.k)
    want = block_skip_attention(call.q, call.k, call.v, rule=rule)
    for backend in ("cpu", "reference", "dense"):
        got = block_skip_attention(
            call.q, call.k, call.v, rule=rule, int8_keys=copy, backend=backend
        )
        torch.testing.assert_close(got.out, want.out, atol=1e-2, rtol=0)
        assert backend != "cpu" or torch.equal(got.out, want.out)


def test_a_copy_of_other_keys_is_refused() -> None:
    q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 600, 16)
    rule = SkipRule.blasst(0.1)
    for shape in ((1, 2, 500, 16), (1, 2, 600, 20), (2, 2, 600, 16)):
        with pytest.raises(ValueError, match=r"int8_keys: expected a copy of k \[1, 2, 600, 16\]"):
            block_skip_attention(q, k, k, rule=rule, int8_keys=Int8Keys(*shape))
    with pytest.raises(ValueError, match="at most 600 keys, got"):
        Int8Keys(1, 2, 600, 16).append(k, 1)
    call = AttentionCall(q, k, k, scale=1.0, int8_keys=Int8Keys(1, 2, 512, 16).data)
    with pytest.raises(RuntimeError, match="int8_keys: expected contiguous uint8"):
        cpu.run(call, rule, BlockGeometry())


def test_opcheck_and_compile() -> None:
    kernel = cpu.load_kernel()
    call = separated(torch.bfloat16)
    copy = Int8Keys(1, 2, call.k.shape[2], call.k.shape[3])
    position = torch.tensor([0])
    torch.library.opcheck(kernel.ops.append_int8_keys.default, (call.k, position, copy.data))
    copy.append(call.k, 0)
    tensors = (call.q, call.k, call.v, None, None, None, torch.full((1, 1), -5.0), None, None)
    options = (0.4, True, 0, 0.0, 64, 64, 1, 1024, True, True, False)
    torch.library.opcheck(kernel.ops.forward.default, (*tensors, *options, copy.data))

    def step(k: Tensor, position: Tensor, data: Tensor) -> Tensor:
        kernel.append_int8_keys(k[:, :, -1:], position, data)
        return cpu.run(
            replace(call, k=k, int8_keys=data), SkipRule(log_lambda=tensors[6]), BlockGeometry()
        ).out

    torch._dynamo.reset()
    position = torch.tensor([call.k.shape[2] - 1])
    other = copy.data.clone()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(call.k, position, copy.data)
    assert torch.equal(got, step(call.k, position, other))
    assert torch.equal(copy.data, other)
