"""The Triton backend through the public API, interpreted on the CPU: numbers, gradients, choice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gradient_checks
import pytest
import torch
from kernel_checks import check
from test_triton_kernels import RULES, make_call, padded
from tiny_models import build, llama, token_ids
from tiny_models import padded as padded_ids

import hf_sparse_attention as hsa
from hf_sparse_attention.backends import choose_geometry, kernel, select, triton
from hf_sparse_attention.functional import attend, attend_dense
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.usefixtures("universal_variant"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of infinities
]

SQUARE, WIDE = BlockGeometry(64, 64, split_k=128), BlockGeometry(64, 128, split_k=128)
CALLS: dict[str, dict[str, Any]] = {
    "prefill": {"q_len": 200, "kv_len": 200},
    "padded": {"batch": 2, "q_len": 150, "kv_len": 200, "key_valid": padded(2, 200)},
    "decode": {"heads": 4, "kv_heads": 2, "q_len": 2, "kv_len": 400, "with_sinks": True},
}


@pytest.mark.parametrize("rule", ["blasst", "bsfa", "budget"])
@pytest.mark.parametrize("geometry", [SQUARE, WIDE], ids=lambda geometry: geometry.name)
@pytest.mark.parametrize("name", CALLS)
def test_against_float64(name: str, geometry: BlockGeometry, rule: str) -> None:
    call = make_call(**CALLS[name])
    result = attend(
        call, RULES[rule], geometry, "triton", return_skips=True, return_dropped_mass=True
    )
    assert result.backend == "triton"
    check(call, RULES[rule], geometry, result)


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name: str) -> None:
    call = make_call(**CALLS[name])
    leaves = gradient_checks.inputs_of(call)
    result = attend(replace(call, **leaves), RULES["blasst"], SQUARE, "triton", return_skips=True)
    assert result.lse is not None
    dout, dlse = torch.randn_like(result.out), torch.randn_like(result.lse)
    total = (result.out * dout).sum() + (result.lse * dlse)[result.lse.isfinite()].sum()
    dlse = dlse.masked_fill(~result.lse.isfinite(), 0.0)
    total.backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    gradient_checks.check(call, SQUARE, result, gradients, dout, dlse)


@pytest.mark.parametrize("q_len", [20, 2])
def test_opcheck(q_len: int) -> None:
    call = make_call(q_len=q_len, kv_len=40, head_size=16, with_sinks=True)
    tensors = gradient_checks.inputs_of(call)
    op = getattr(torch.ops, triton._namespace()).forward.default
    rule = (torch.full((1, 1), -1.0), None, torch.full((1, 1), 0.1))
    numbers = (0.25, True, 0, 0.0, 64, 64, 1, 1024, True, True, True)
    qkv = (tensors["q"], tensors["k"], tensors["v"])
    torch.library.opcheck(op, (*qkv, None, None, tensors["sinks"], *rule, *numbers))


def test_compiles_without_a_break_or_a_new_graph_for_a_new_threshold() -> None:
    call = make_call(q_len=70, kv_len=70)
    graphs = []

    def counting(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def run(log_lambda: torch.Tensor) -> torch.Tensor:
        return attend(call, SkipRule(log_lambda=log_lambda), SQUARE, "triton").out

    compiled = torch.compile(run, fullgraph=True, backend=counting)
    for value in (-0.5, -30.0):
        log_lambda = torch.full((1, 1), value)
        assert torch.equal(compiled(log_lambda), run(log_lambda))
    assert len(graphs) == 1


def test_a_model_generates_as_under_eager() -> None:
    """Device emulation: a padded batch, prefill and decode, every layer interpreted."""
    model = build(llama)
    ids, mask = padded_ids([90, 73], "left")
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, **options)
    hsa.set_sparse_attention(
        model, "blasst", threshold_scale_factor=0.0, min_length=0, backend="triton"
    )
    assert torch.equal(model.generate(ids, **options), expected)


def test_a_model_skips_and_counts() -> None:
    model = build(llama)
    hsa.set_sparse_attention(
        model, "blasst", threshold_scale_factor=190.0, min_length=0, backend="triton"
    )
    with hsa.collect_stats(model) as stats, torch.no_grad():
        out = model(token_ids(1, 200)).logits
    hsa.set_sparse_attention(model, backend="reference")
    with torch.no_grad():
        expected = model(token_ids(1, 200)).logits
    assert 0 < stats.sparsity("prefill") < 1
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


CALL = AttentionCall(*(torch.zeros(1, 1, 300, 16) for _ in "qkv"), scale=1.0)


def test_auto_never_interprets() -> None:
    assert select(CALL, RULES["blasst"], SQUARE)[0].NAME != "triton"
    assert select(CALL, RULES["blasst"], SQUARE, "triton")[0].NAME == "triton"
    assert attend_dense(CALL).backend != "triton"
    geometries = [BlockGeometry(64, 1), WIDE, SQUARE]
    assert choose_geometry(CALL, geometries, "triton") == SQUARE
    assert choose_geometry(CALL, geometries) == geometries[0]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> AttentionCall:
    """A call on a GPU that is not there: enough to see who would serve it."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")  # type: ignore[assignment]

    return replace(CALL, **{x: getattr(CALL, x).as_subclass(Elsewhere) for x in "qkv"})


def test_a_gpu_is_served_by_triton(gpu: AttentionCall) -> None:
    backend, reasons = select(gpu, RULES["blasst"], SQUARE)
    assert backend.NAME == "triton"
    assert reasons["cpu"] == "q lies on cuda, not on the CPU"
    assert reasons.keys() == {"cpu", "cuda"}, "the CUDA kernels would come first"
    assert select(gpu, SkipRule.never(), SQUARE)[0].NAME == "dense", "SDPA is faster"
    assert choose_geometry(gpu, [BlockGeometry(64, 1), WIDE, SQUARE]) == SQUARE


@pytest.mark.parametrize(
    ("changes", "geometry", "reason"),
    [
        ({}, BlockGeometry(64, 1), "geometry 64x1 is not among its 64x64, 64x128"),
        ({"dropout": 0.1}, SQUARE, "dropout"),
        ({"mask": torch.ones(1)}, SQUARE, "arbitrary mask"),
        ({"v": torch.zeros(1, 1, 300, 320)}, SQUARE, "head sizes are compiled up to 256"),
        ({"q": torch.zeros(1, 1, 300, 16).double()}, SQUARE, r"q is torch.float64"),
        ({"q": torch.zeros(1, 1, 300, 16, device="meta")}, SQUARE, "q lies on meta"),
    ],
    ids=["geometry", "dropout", "mask", "head size", "dtype", "device"],
)
def test_a_refusal_says_why(changes: dict[str, Any], geometry: BlockGeometry, reason: str) -> None:
    with pytest.raises(ValueError, match=f"'triton' cannot run this call: .*{reason}"):
        select(replace(CALL, **changes), RULES["blasst"], geometry, "triton")


def test_why_it_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton.available() is None
    monkeypatch.setattr(kernel, "load", lambda _: "no build anywhere")
    assert "no Triton kernels: no build anywhere" in (triton.available() or "")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if not torch.cuda.is_available():
        assert triton.available() == "torch finds no GPU"
        assert "TRITON_INTERPRET" in (triton.supports(CALL, RULES["never"], SQUARE) or "")
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda _: None)
    assert triton.available() == "Triton is not installed"
