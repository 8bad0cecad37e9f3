"""What share of the blocks a rule is expected to skip: from calibration to the op."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_sparse_attention import SparseAttentionConfig
from hf_sparse_attention.backends import kernel
from hf_sparse_attention.fits import Fit, PhaseFit
from hf_sparse_attention.methods import METHODS
from hf_sparse_attention.types import AttentionCall, BlockGeometry, Phase, SkipRule

GEOMETRY = BlockGeometry(64, 64)


class OnGpu(torch.Tensor):
    """A tensor on the CPU that says it lies on a GPU: enough for a rule, which reads shapes."""

    device = torch.device("cuda")  # type: ignore[assignment]


def made(q_len: int = 300, **features: Any) -> AttentionCall:
    q, k = (torch.zeros(1, 2, n, 16).as_subclass(OnGpu) for n in (q_len, 400))
    offset = torch.tensor([400 - q_len])  # else the rule would make a tensor on the GPU
    return AttentionCall(q, k, k, scale=1.0, q_offset=offset, **features)


def config(**settings: Any) -> SparseAttentionConfig:
    phases: dict[Phase, PhaseFit] = {"prefill": PhaseFit(2.0, 5.0), "decode": PhaseFit(1.0, 8.0)}
    fits = {GEOMETRY.name: Fit(GEOMETRY, phases)}
    return SparseAttentionConfig(fits=fits, **settings)


def expected(settings: SparseAttentionConfig, call: AttentionCall) -> float | None:
    method = METHODS["blasst"]
    settings.prepared.clear()
    tensors = method._tensors(settings, torch.device("cpu"), GEOMETRY)  # there is no GPU
    settings.prepared[f"blasst {GEOMETRY.name} on cuda"] = tensors
    return method.rule(settings, 0, call, GEOMETRY).expected_sparsity


def test_it_is_the_target_of_the_phase_in_quarters() -> None:
    settings = config(target_sparsity={"prefill": 0.8, "decode": 0.4})
    assert expected(settings, made()) == 0.75
    assert expected(settings, made(q_len=1)) == 0.25


@pytest.mark.parametrize(
    ("factor", "share"),
    [(2.0 * torch.e**3.5, 0.5), (2.0 * torch.e**1.0, 0.0), (0.0, 0.0), (1e9, 1.0), (0.1, 0.0)],
)
def test_a_factor_that_was_set_is_taken_back_through_the_fit(factor: float, share: float) -> None:
    """0.7, 0.2, never, and beyond either end."""
    targets = {"prefill": 0.3, "decode": 0.3}
    settings = config(threshold_scale_factor={"prefill": factor}, target_sparsity=targets)
    assert expected(settings, made()) == share
    assert expected(settings, made(q_len=1)) == 0.25, "the other phase has its own"


def test_without_a_fit_nobody_knows() -> None:
    settings = SparseAttentionConfig(threshold_scale_factor={"prefill": 30.0})
    assert expected(settings, made()) is None
    assert expected(settings, made(q_len=1)) is None  # under the budget


def test_only_inference_on_gpus_reads_it() -> None:
    """Elsewhere a compiled graph would be guarded by a number that nobody uses."""
    settings = config(target_sparsity={"prefill": 0.8, "decode": 0.4})
    call = made()
    assert expected(settings, replace(call, q=call.q.requires_grad_())) is None
    here = {name: torch.zeros(1, 2, 300, 16) for name in "qkv"}
    rule = METHODS["blasst"].rule(settings, 0, replace(call, **here), GEOMETRY)
    assert rule.expected_sparsity is None


@pytest.mark.parametrize(("known", "told"), [(None, 0.5), (0.25, 0.25)])
def test_the_op_is_told(monkeypatch: pytest.MonkeyPatch, known: float | None, told: float) -> None:
    calls: list[tuple[Any, ...]] = []

    def forward(*args: Any) -> tuple[torch.Tensor, ...]:
        calls.append(args)
        return (torch.zeros(1),) * 5

    monkeypatch.setattr(torch.ops, "recording", SimpleNamespace(forward=forward), raising=False)
    x = torch.zeros(1, 1, 9, 16)
    rule = replace(SkipRule.blasst(0.5), expected_sparsity=known)
    kernel.runner("cuda", lambda: "recording")(AttentionCall(x, x, x, scale=1.0), rule, GEOMETRY)
    assert calls[0][21] == told


def test_it_changes_no_result() -> None:
    """Of the schema; which of Hopper's versions it chooses is tested with those."""
    q, k = torch.randn(1, 2, 300, 64), torch.randn(1, 1, 300, 64)
    found = kernel.load("cpu")
    if isinstance(found, str):
        pytest.skip(found)
    rule = torch.full((1, 1), -1.0)
    outs = [
        found.forward(q, k, k, log_lambda=rule, scale=0.125, expected_sparsity=x)[0]
        for x in (0.0, 1.0)
    ]
    assert torch.equal(*outs)
