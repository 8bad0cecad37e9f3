"""The `cuda` backend through the public API, on an emulated GPU: numbers, gradients, choice."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import cuda_source
import gradient_checks
import pytest
import torch
from kernel_checks import check
from test_triton_kernels import CALLS, RULES, make_call
from torch._dynamo.testing import CompileCounter

from hf_sparse_attention.backends import choose_geometry, cuda, kernel, select
from hf_sparse_attention.functional import attend
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

SQUARE, WIDE = BlockGeometry(64, 64, split_k=128), BlockGeometry(64, 128, split_k=128)


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_source.load()
    monkeypatch.setenv("HF_SPARSE_ATTENTION_EMULATE", "1")
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)


def made(**features: Any) -> AttentionCall:
    return make_call(**{"dtype": torch.bfloat16, **features})


@pytest.mark.parametrize("geometry", [SQUARE, WIDE], ids=lambda geometry: geometry.name)
@pytest.mark.parametrize("name", ["odd length", "padding", "decode"])
def test_against_float64(name: str, geometry: BlockGeometry) -> None:
    call = made(**CALLS[name])
    for rule in ("blasst", "bsfa", "budget"):
        wanted = {"return_skips": True, "return_dropped_mass": True}
        result = attend(call, RULES[rule], geometry, "cuda", **wanted)
        assert result.backend == "cuda"
        check(call, RULES[rule], geometry, result, weights_dtype=call.q.dtype)


def test_opcheck() -> None:
    ops = getattr(torch.ops, kernel.namespace("emulated"))
    for features in ({}, {"q_len": 2}):
        call = made(**features)
        arguments = (call.q, call.k, call.v, None, None, None, torch.full((1, 1), -1.0), None, None)
        options = (0.25, True, 0, 0.0, 64, 64, 1, 1024, True, True, True)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(ops.forward.default, (*arguments, *options), test_utils=checks)


def test_compiles_without_a_break_or_a_new_graph_for_a_new_threshold() -> None:
    call = made(q_len=70, kv_len=70)

    def run(log_lambda: torch.Tensor) -> torch.Tensor:
        return attend(call, SkipRule(log_lambda=log_lambda), SQUARE, "cuda").out

    counter = CompileCounter()
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for value in (-0.5, -30.0):
        log_lambda = torch.full((1, 1), value)
        assert torch.equal(compiled(log_lambda), run(log_lambda))
    assert counter.frame_count == 1


def test_the_variants_backward_is_tritons() -> None:
    """Whoever loads the variant itself can train with it: Triton's backward reads its skip bits."""
    pytest.importorskip("triton", reason="Triton is not installed")
    call = made(q_len=100, kv_len=150)
    leaves = gradient_checks.inputs_of(call)
    module = kernel.load("emulated")
    assert not isinstance(module, str)
    rule = RULES["blasst"]
    out, lse, counts, skips, dropped = module.forward(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        log_lambda=rule.log_lambda,
        scale=call.scale,
        return_skips=True,
    )
    dout = torch.randn_like(out)
    out.backward(dout)
    result = SimpleNamespace(out=out, lse=lse, counts=counts, skips=skips, dropped_mass=dropped)
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    gradient_checks.check(call, SQUARE, result, gradients, dout, torch.zeros_like(lse))


def test_what_it_cannot_serve_has_a_reason() -> None:
    call, rule = made(), RULES["blasst"]
    grouped = made(q_len=1, heads=32, kv_heads=1)
    refused = {
        "float16 are compiled": replace(call, q=call.q.float()),
        "differ in dtype": replace(call, q=call.q.half()),
        "has no backward": replace(call, q=call.q.clone().requires_grad_()),
        "multiples of 8, not 20": made(head_size=20),
        "compiled up to 256": made(head_size=320),
        "16 query heads": grouped,
        "must be positive": replace(call, scale=-1.0),
        "no block structure": replace(call, mask=torch.zeros(1)),
        "dropout": replace(call, dropout=0.1),
    }
    assert cuda.supports(call, rule, SQUARE) is None
    for reason, other in refused.items():
        assert reason in (cuda.supports(other, rule, SQUARE) or ""), reason
    assert "up to 192, and 128 of v" in (cuda.supports(made(head_size=192), rule, WIDE) or "")


def test_blocks_of_128_keys_at_192_dimensions_need_shared_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which an RTX 4090 has not got: 99 KiB."""
    call = made(head_size=192, v_size=128)
    assert cuda.supports(call, RULES["blasst"], WIDE) is None
    monkeypatch.setattr(cuda, "_shared_bytes", lambda _: 99 << 10)
    assert "this GPU has 101376" in (cuda.supports(call, RULES["blasst"], WIDE) or "")
    assert cuda.supports(call, RULES["blasst"], SQUARE) is None


def test_without_a_gpu_or_a_build_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_SPARSE_ATTENTION_EMULATE")
    assert cuda.supports(made(), RULES["blasst"], SQUARE) == "q lies on cpu, not on a GPU with CUDA"
    if not torch.cuda.is_available():
        assert cuda.available() == "torch finds no GPU with CUDA"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 5))
    assert cuda.available() == "expected compute capability 8.0 or newer, got 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(kernel, "load", lambda _: "no build in there")
    assert "no build in there. In a checkout" in (cuda.available() or "")


def test_a_gpu_gets_cuda_then_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of choice on a GPU, which "meta" stands in for."""
    monkeypatch.setattr("hf_sparse_attention.backends.triton.available", lambda: None)
    monkeypatch.setattr("hf_sparse_attention.backends.triton.supports", lambda *_: None)
    monkeypatch.setattr(cuda, "available", lambda: None)
    monkeypatch.setattr(cuda, "supports", lambda *_: None)
    call = made()
    there = replace(call, q=call.q.to("meta"), k=call.k.to("meta"), v=call.v.to("meta"))
    backend, reasons = select(there, RULES["blasst"], SQUARE)
    assert backend.NAME == "cuda"
    assert list(reasons) == ["cpu"]
    assert choose_geometry(there, [WIDE, SQUARE]) == SQUARE
    monkeypatch.setattr(cuda, "supports", lambda *_: "a reason")
    backend, reasons = select(there, RULES["blasst"], SQUARE)
    assert backend.NAME == "triton"
    assert reasons["cuda"] == "a reason"
    assert select(there, SkipRule.never(), SQUARE)[0].NAME == "dense"
    assert select(call, RULES["blasst"], SQUARE)[0].NAME in ("cpu", "reference")
