"""The kernel's `rotate_`: rotary embedding and norm in one pass, rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_sparse_attention.backends import cpu

pytestmark = pytest.mark.usefixtures("cpu_kernel")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = ["portable", "avx2", "avx512", "avx512_bf16"]
EPS = 1e-6


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_SPARSE_ATTENTION_CPU_LEVEL", request.param)
    try:
        cpu.load_kernel().cpu_level()
    except RuntimeError:
        pytest.skip("this machine does not have it")
    return request.param


def inputs(dtype: torch.dtype, size: int, length: int = 131, batch: int = 2) -> list[Tensor]:
    """x `[B, 3, L, D]` with each position's heads side by side, cos and sin `[B, L, D]`."""
    torch.manual_seed(0)
    x = torch.randn(batch, length, 3, size).to(dtype).transpose(1, 2)
    angle = torch.randn(batch, length, size) * 3
    return [x, angle.cos().to(dtype), angle.sin().to(dtype)]


def exact(x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None) -> tuple[Tensor, Tensor]:
    """In float64: the result, and the sum of its two terms' magnitudes."""
    x, cos, sin = (t.double() for t in (x, cos[:, None], sin[:, None]))
    if norm is not None:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * norm.double()[:, None]
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin, (x * cos).abs() + (turned * sin).abs()


@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("size", [2, 16, 34, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_once(dtype: torch.dtype, size: int, with_norm: bool, level: str) -> None:
    x, cos, sin = inputs(dtype, size)
    norm = torch.rand(3, size) + 0.5 if with_norm else None
    expected, terms = exact(x, cos, sin, norm)
    cpu.rotate_(x, cos, sin, norm, EPS)
    # Half a unit of the dtype in the last place of the result. Before it, in float32: two products
    # and a sum; with a norm each x has a sum of squares of `size` terms behind it, which enters
    # under a root, and five operations more.
    steps = 3 + (size / 2 + 5 if with_norm else 0)
    allowed = torch.finfo(dtype).eps / 2 * expected.abs() + steps * 2.0**-24 * terms
    allowed += torch.finfo(dtype).smallest_normal  # below it a dtype rounds to fixed steps
    assert bool(((x.double() - expected).abs() <= 1.01 * allowed).all())


def test_tables_of_one_batch_item_serve_all() -> None:
    x, cos, sin = inputs(torch.float32, 16)
    alone, shared = x.clone(), x.clone()
    cpu.rotate_(alone, cos[:1].expand_as(cos).contiguous(), sin[:1].repeat(2, 1, 1), None, 0.0)
    cpu.rotate_(shared, cos[:1], sin[:1], None, 0.0)
    assert torch.equal(alone, shared)


def test_only_the_heads_given_are_touched() -> None:
    x, cos, sin = inputs(torch.float32, 16)
    before = x.clone()
    cpu.rotate_(x[:, :2], cos, sin, None, 0.0)
    assert torch.equal(x[:, 2], before[:, 2])
    assert not torch.equal(x[:, :2], before[:, :2])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int) -> None:
    x, cos, sin = inputs(torch.bfloat16, 64)
    expected, before = x.clone(), torch.get_num_threads()
    torch.set_num_threads(1)
    cpu.rotate_(expected, cos, sin, None, 0.0)
    torch.set_num_threads(threads)
    try:
        cpu.rotate_(x, cos, sin, None, 0.0)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(x, expected)


def test_the_op_is_as_torch_wants_it() -> None:
    op = cpu.load_kernel().ops.rotate_.default
    x, cos, sin = inputs(torch.float32, 16, length=5)
    torch.library.opcheck(op, (x, cos, sin, torch.ones(1, 16), EPS))
    torch.library.opcheck(op, (x, cos, sin, None, 0.0))


def test_compiled_it_is_one_graph() -> None:
    x, cos, sin = inputs(torch.float32, 16)
    expected = x.clone()
    cpu.rotate_(expected, cos, sin, None, 0.0)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def twice(x: Tensor) -> Tensor:
        y = x.clone()
        cpu.rotate_(y, cos, sin, None, 0.0)
        return 2 * y

    assert torch.equal(twice(x), 2 * expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, c, s, n: (x[..., :15], c, s, n), "x: expected .* even head size"),
        (lambda x, c, s, n: (x.transpose(2, 3), c, s, n), "dense rows"),
        (lambda x, c, s, n: (x, c[:, 1:], s, n), "cos: expected"),
        (lambda x, c, s, n: (x, c, s.double(), n), "sin: expected"),
        (lambda x, c, s, n: (x, c, s, n[:2]), "norm: expected"),
        (lambda x, c, s, n: (x, c, s, n.double()), "norm: expected"),
    ],
)
def test_bad_arguments_are_named(change, message: str) -> None:
    x, cos, sin = inputs(torch.float32, 16, length=16)
    x, cos, sin, norm = change(x, cos, sin, torch.ones(3, 16))
    with pytest.raises(RuntimeError, match=message):
        cpu.rotate_(x, cos, sin, norm, EPS)


def test_nothing_to_do() -> None:
    for shape in ((0, 3, 5, 16), (2, 0, 5, 16), (2, 3, 0, 16)):
        table = torch.ones(shape[0], shape[2], shape[3])
        cpu.rotate_(torch.ones(shape), table, table, None, 0.0)
