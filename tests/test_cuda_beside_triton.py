"""The CUDA variant loaded by itself: what its kernels do not take, Triton's in the package do."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import cuda_source
import gradient_checks
import pytest
import torch
from kernel_checks import check
from test_triton_kernels import RULES, make_call

from hf_sparse_attention.backends import cuda
from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry

pytest.importorskip("triton", reason="Triton is not installed")
# Where NumPy, which interprets, warns: infinities are how a row that sees nothing is spelt.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SQUARE, WIDE = BlockGeometry(64, 64), BlockGeometry(64, 128)

#: What the kernels in CUDA refuse, by the reason they give.
REFUSED: dict[str, tuple[dict[str, Any], BlockGeometry]] = {
    "float32": ({"dtype": torch.float32}, SQUARE),
    "head sizes 20": ({"head_size": 20}, SQUARE),
    "blocks of 128 keys": ({"head_size": 256, "heads": 1}, WIDE),
    "blocks of 32x64": ({}, BlockGeometry(32, 64)),
    "20 query heads": ({"q_len": 1, "heads": 20}, SQUARE),
    "a scale of -0.1": ({"scale": -0.1}, SQUARE),
}


@pytest.fixture
def variant() -> ModuleType:
    return cuda_source.load()


def made(**features: Any) -> AttentionCall:
    scale = features.pop("scale", None)
    call = make_call(**{"dtype": torch.bfloat16, "q_len": 70, "kv_len": 140, **features})
    return call if scale is None else replace(call, scale=scale)


def forward(
    variant: ModuleType, call: AttentionCall, geometry: BlockGeometry, **changes: Any
) -> AttentionResult:
    options = {"return_skips": True, "return_dropped_mass": True, **changes}
    results = variant.forward(
        call.q,
        call.k,
        call.v,
        log_lambda=RULES["blasst"].log_lambda,
        scale=call.scale,
        block_q=geometry.block_q,
        block_k=geometry.block_k,
        **options,
    )
    return AttentionResult(*results)


@pytest.mark.parametrize("reason", REFUSED)
def test_the_package_says_the_same_of_them(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    """Its backend and the kernel repo, which stand apart, each know what the kernels take."""
    monkeypatch.setenv("HF_SPARSE_ATTENTION_EMULATE", "1")
    features, geometry = REFUSED[reason]
    named = geometry.name in (cuda.GEOMETRIES or ())  # others are refused before `supports`
    assert (cuda.supports(made(**features), RULES["blasst"], geometry) is not None) == named
    for served in ({}, {"q_len": 1}, {"head_size": 256}):
        assert cuda.supports(made(**served), RULES["blasst"], SQUARE) is None


@pytest.mark.parametrize("reason", REFUSED)
def test_triton_takes_over(
    variant: ModuleType, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    features, geometry = REFUSED[reason]
    call = made(**features)
    compiled = getattr(torch.ops, variant.add_op_namespace_prefix("").removesuffix("::"))
    with pytest.raises(RuntimeError):  # else nothing would be proved
        compiled.forward(
            *(call.q, call.k, call.v, None, None, None, RULES["blasst"].log_lambda, None, None),
            *(call.scale, True, 0, 0.0, geometry.block_q, geometry.block_k, 1, 1024, True),
            *(True, True),
        )
    variant.choice._said.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            result = forward(variant, call, geometry)
    assert len([x for x in caplog.messages if reason in x]) == 1
    check(call, RULES["blasst"], geometry, result, weights_dtype=call.q.dtype)


def test_the_rest_runs_in_cuda(variant: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variant.choice, "triton_ops", None)
    for call, geometry in (
        (made(), SQUARE),
        (made(dtype=torch.float16, head_size=128), WIDE),
        (made(q_len=1, heads=16), SQUARE),
        (made(head_size=192, v_size=128), WIDE),
        (made(q_len=100, kv_len=100, heads=20), SQUARE),  # prefill: any group
    ):
        check(call, RULES["blasst"], geometry, forward(variant, call, geometry))


def test_neither_takes_it(variant: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    call = made(head_size=320)
    with pytest.raises(ValueError, match=r"head sizes 320 and 320, nor does Triton: .* up to 256"):
        forward(variant, call, SQUARE)
    monkeypatch.setattr(variant.choice, "triton_ops", None)
    with pytest.raises(ValueError, match=r"torch\.float32, nor does Triton: it is not installed"):
        forward(variant, made(dtype=torch.float32), SQUARE)


def test_gradients(variant: ModuleType) -> None:
    """Those of float32, which a trainer may use."""
    call = made(dtype=torch.float32)
    leaves = gradient_checks.inputs_of(call)
    there = replace(call, **{name: leaves[name] for name in ("q", "k", "v")})
    result = forward(variant, there, SQUARE)
    dout = torch.randn_like(result.out)
    result.out.backward(dout)
    found = SimpleNamespace(
        out=result.out, lse=result.lse, skips=result.skips, dropped_mass=result.dropped_mass
    )
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    gradient_checks.check(call, SQUARE, found, gradients, dout, torch.zeros_like(result.lse))


def test_what_transformers_binds(variant: ModuleType) -> None:
    """In float32, and in bfloat16 at a head size that blocks of 128 keys are not compiled for."""
    module = torch.nn.Module()
    module.is_causal = True
    for features in ({"dtype": torch.float32}, {"head_size": 256, "heads": 1}):
        call = made(q_len=280, kv_len=280, **features)
        out, _ = variant.flash_attn_forward(
            module, call.q, call.k, call.v, None, scaling=call.scale
        )
        k, v = (x.repeat_interleave(call.group, 1).double() for x in (call.k, call.v))
        dense = torch.nn.functional.scaled_dot_product_attention(
            call.q.double(), k, v, is_causal=True, scale=call.scale
        )
        # At most eps / (1 + eps) of a row is dropped, and the output off by twice that share.
        allowed = 2 * 0.1 / 1.1 * v.abs().amax() + 0.02
        assert (out.transpose(1, 2) - dense).abs().max() <= allowed


def test_compiles_without_a_break(variant: ModuleType) -> None:
    call = made(dtype=torch.float32)

    def run(q: torch.Tensor) -> torch.Tensor:
        return forward(variant, replace(call, q=q), SQUARE).out

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.equal(compiled(call.q), run(call.q))
