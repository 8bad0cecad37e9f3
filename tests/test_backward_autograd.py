"""The kernel's gradients as training uses them: compiled, checkpointed, autocast, in a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gradient_checks
import pytest
import tiny_models
import torch
from comparisons import assert_as_exact_as
from test_attention_compile import skipping_keys
from test_cpu_kernel import make_call
from tiny_models import build, padded, token_ids
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import hf_sparse_attention as hsa
from hf_sparse_attention.backends import cpu
from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, SkipRule

pytestmark = pytest.mark.usefixtures("cpu_kernel")

KEYS = BlockGeometry(64, 1)
RULE = SkipRule.blasst(0.1)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[AttentionCall, AttentionResult]]:
    """Every call of the kernel from now on, with its skip bits."""
    calls: list[tuple[AttentionCall, AttentionResult]] = []
    run = cpu.run

    def recording(call: AttentionCall, *args: Any, **kwargs: Any) -> AttentionResult:
        result = run(call, *args, **{**kwargs, "return_skips": True})
        calls.append((call, result))
        return result

    monkeypatch.setattr(cpu, "run", recording)
    return calls


def op_arguments(call: AttentionCall, *, return_skips: bool) -> tuple:
    tensors = (call.q, call.k, call.v, call.key_valid, call.q_offset, call.sinks)
    numbers = (call.scale, True, call.window or 0, call.softcap or 0.0, 64, 1, 1, 1024, True)
    return (*tensors, RULE.log_lambda, None, None, *numbers, return_skips, False)


@pytest.mark.parametrize("q_len", [90, 3])
def test_opcheck(q_len: int) -> None:
    call = make_call("sink", (1, 2, 1, q_len, 130, 8), sinks=torch.zeros(2), softcap=5.0)
    call = replace(call, **gradient_checks.inputs_of(call))
    op = getattr(torch.ops, cpu._namespace()).forward.default
    torch.library.opcheck(op, op_arguments(call, return_skips=True))


def test_without_skip_bits_there_is_no_gradient() -> None:
    call = make_call("sink", (1, 2, 1, 90, 130, 8))
    call = replace(call, **gradient_checks.inputs_of(call))
    op = getattr(torch.ops, cpu._namespace()).forward
    with pytest.raises(ValueError, match="expected return_skips=True"):
        op(*op_arguments(call, return_skips=False))


def test_double_backward_is_refused() -> None:
    call = make_call("sink", (1, 2, 1, 90, 130, 8))
    leaves = gradient_checks.inputs_of(call)
    out = cpu.run(replace(call, **leaves), RULE, KEYS).out
    (dq,) = torch.autograd.grad(out.square().sum(), leaves["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(dq.sum(), leaves["q"])


@pytest.mark.parametrize("part", ["out", "lse"])
def test_one_output_alone(part: str) -> None:
    call = make_call("sink", (1, 2, 1, 90, 130, 8))
    leaves = gradient_checks.inputs_of(call)
    result = cpu.run(replace(call, **leaves), RULE, KEYS, return_skips=True)
    weight = {name: torch.zeros_like(getattr(result, name)) for name in ("out", "lse")}
    weight[part] = torch.randn_like(weight[part])
    total = (getattr(result, part) * weight[part]).sum()
    found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    gradients = dict(zip(leaves, found, strict=True))
    gradient_checks.check(call, KEYS, result, gradients, weight["out"], weight["lse"])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_a_checkpointed_call_decides_the_same_again(reentrant: bool, recorded: list) -> None:
    call = make_call("sink", (1, 4, 2, 200, 260, 32))

    def block(*qkv: Tensor) -> Tensor:
        return cpu.run(replace(call, **dict(zip("qkv", qkv, strict=True))), RULE, KEYS).out.square()

    leaves = gradient_checks.inputs_of(call)
    checkpoint(block, *leaves.values(), use_reentrant=reentrant).sum().backward()
    assert len(recorded) == 2
    assert recorded[0][1].skips.any()
    assert torch.equal(recorded[0][1].skips, recorded[1][1].skips)
    plain = gradient_checks.inputs_of(call)
    block(*plain.values()).sum().backward()
    assert all(torch.equal(plain[name].grad, leaves[name].grad) for name in leaves)


def backward(model: Any, run: Any = None, **autocast: Any) -> Tensor:
    """One training step's gradients, of every parameter, in one vector."""
    ids, mask = padded([200, 161], "left")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1:] = labels[:, 1:].masked_fill(mask[:, :-1] == 0, -100)  # padding predicts nothing
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(autocast)):
        call = model if run is None else run
        loss = call(ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_a_checkpointed_model_counts_once(reentrant: bool, recorded: list) -> None:
    model = skipping_keys().train()
    with hsa.collect_stats(model) as plain_stats:
        plain = backward(model)
    calls = len(recorded)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with hsa.collect_stats(model) as stats:
        again = backward(model)
    assert len(recorded) == 3 * calls  # once more in the backward
    assert torch.equal(again, plain)
    assert 0 < stats.sparsity("prefill") < 1
    assert stats.to_dict() == plain_stats.to_dict()


def test_a_compiled_step_is_the_same() -> None:
    model = skipping_keys()
    plain = backward(model)
    torch.compiler.reset()
    compiled = backward(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5 * float(plain.abs().max()))
    torch.compiler.reset()


def masked_eager(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Eager attention under the masks that `masked_eager.calls` gives, one after the other."""
    call, result = next(masked_eager.calls)
    kept = gradient_checks.kept(call, result.skips, KEYS)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (scaling * q @ k.transpose(2, 3)).masked_fill(~kept, -torch.inf)
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32))
    weights = weights.masked_fill(~kept.any(-1, keepdim=True), 0.0)
    return (weights.to(v.dtype) @ v).transpose(1, 2).contiguous(), None


AttentionInterface.register("masked_eager", masked_eager)
AttentionMaskInterface.register("masked_eager", sdpa_mask)


def test_training_is_eager_training_under_the_forwards_masks(recorded: list) -> None:
    """Three steps of SGD; at each, the gradients of all parameters agree."""
    ours = skipping_keys()
    eager, exact = build(tiny_models.llama, "masked_eager"), build(tiny_models.llama).double()
    exact.set_attn_implementation("masked_eager")
    models = (ours, eager, exact)
    steps = [torch.optim.SGD(model.parameters(), lr=1e-2) for model in models]
    for _ in range(3):
        recorded.clear()
        with hsa.collect_stats(ours) as stats:
            gradients = [backward(ours)]
        assert 0.05 < stats.sparsity("prefill") < 0.95
        for model in (eager, exact):
            masked_eager.calls = iter(recorded)
            gradients.append(backward(model))
            assert next(masked_eager.calls, None) is None
        assert_as_exact_as(*gradients)
        for step in steps:
            step.step()
        with torch.no_grad():  # else the three drift apart, each along its own rounding
            for a, b, c in zip(*(model.parameters() for model in models), strict=True):
                b.copy_(a)
                c.copy_(a)


def test_autocast(recorded: list) -> None:
    """Mixed precision: bfloat16 in the attention, as close to exact as eager under autocast."""
    ours, eager = skipping_keys(), build(tiny_models.llama, "masked_eager")
    exact = build(tiny_models.llama).double()
    exact.set_attn_implementation("masked_eager")
    mixed = backward(ours, autocast=True)
    assert {call.q.dtype for call, _ in recorded} == {torch.bfloat16}
    gradients = []
    for model, options in ((eager, {"autocast": True}), (exact, {})):
        masked_eager.calls = iter(recorded)
        gradients.append(backward(model, **options))
    error = (gradients[0] - gradients[1]).abs().mean()
    assert error > 0
    assert (mixed - gradients[1]).abs().mean() <= 1.5 * error


def test_generating_needs_no_gradient_and_training_on_a_cache_works() -> None:
    """A few new tokens against a cache are decoding: gradients reach their queries all the same."""
    model = skipping_keys()
    ids = token_ids(1, 203)
    with torch.no_grad():
        past = model(ids[:, :200], use_cache=True).past_key_values
    model(ids[:, 200:], past_key_values=past).logits.square().sum().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert found
    assert all(x.isfinite().all() for x in found)
