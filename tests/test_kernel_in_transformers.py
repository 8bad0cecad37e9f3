"""`attn_implementation="org/repo"`: the kernel repo bound by transformers itself, without us."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import build, gemma2, llama, padded, token_ids
from transformers.integrations import hub_kernels

from hf_sparse_attention.backends import cpu, kernel

pytestmark = pytest.mark.usefixtures("cpu_kernel")

GROUP = {
    "algorithm": "skip_softmax",
    "threshold_scale_factor": {
        "formula": "a * exp(b * target_sparsity)",
        "prefill": {"a": 20.0, "b": 3.0},
    },
    "target_sparsity": {"prefill": 0.5},
}


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.23 wants a newer `kernels` than there is; what it would load is our build."""
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *_, **__: cpu.load_kernel())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The rules of the op's calls from now on."""
    bound = vars(cpu.load_kernel())["flash_attn_forward"].__globals__
    found: list[dict[str, Any]] = []
    ops_for = bound["ops_for"]

    class Recording(ModuleType):
        def forward(self, *args: Any) -> Any:
            results = self.real.forward(*args)
            names = {"key_valid": args[3], "log_lambda": args[6], "budget": args[8]}
            names["expected_sparsity"] = args[21]
            found.append({**names, "skipped": int(results[2][..., 1].sum())})
            return results

    def recorded(*args: Any) -> Recording:
        ops = Recording("ops")
        ops.real = ops_for(*args)
        return ops

    monkeypatch.setitem(bound, "ops_for", recorded)
    return found


def bound(**config: Any) -> Any:
    model = build(llama)
    for name, value in config.items():
        setattr(model.config, name, value)
    model.set_attn_implementation(kernel.REPO_ID)
    return model


@pytest.mark.parametrize("side", ["left", "right"])
def test_generates_as_under_eager(side: str, calls: list) -> None:
    ids, mask = padded([290, 271], side)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    expected = build(llama).generate(ids, **options)
    assert torch.equal(bound().generate(ids, **options), expected)
    # The padded prefill is SDPA's; each later token of each layer is the kernel's.
    assert len(calls) == 2 * 3
    assert all(call["key_valid"] is not None for call in calls)


def test_without_thresholds_it_keeps_a_budget(calls: list) -> None:
    bound()(token_ids(1, 400))
    assert [call["budget"].item() for call in calls] == [pytest.approx(0.1)] * 2
    assert all(call["log_lambda"] is None for call in calls)


def test_thresholds_come_from_the_config(calls: list) -> None:
    bound(sparse_attention_config={"config_groups": {"group_0": GROUP}})(token_ids(1, 400))
    expected = torch.tensor(20.0 * torch.e**1.5 / 400).log().item()
    assert [call["log_lambda"].item() for call in calls] == [pytest.approx(expected)] * 2
    assert [call["expected_sparsity"] for call in calls] == [0.5] * 2
    fit = {"prefill": {"a": 1000.0}}  # lambda would be above 1, which drops what matters most
    eager = {"config_groups": {"group_0": {**GROUP, "threshold_scale_factor": fit}}}
    bound(sparse_attention_config=eager)(token_ids(1, 400))
    assert all(call["log_lambda"] < 0 for call in calls[2:])
    assert any(call["skipped"] > 0 for call in calls[2:])


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({"ignore": ["model.layers.1.self_attn"]}, [1]),
        ({"targets": ["MistralAttention"]}, [0, 1]),
        ({"ignore": ["*"]}, [0, 1]),
    ],
    ids=["ignore", "targets", "unreadable"],
)
def test_layers_that_the_config_leaves_out(changes: dict, dense: list, calls: list) -> None:
    group = {**GROUP, **changes}
    bound(sparse_attention_config={"config_groups": {"group_0": group}})(token_ids(1, 300))
    ruleless = [i for i, c in enumerate(calls) if c["log_lambda"] is None and c["budget"] is None]
    assert ruleless == dense


def test_gradients_reach_the_model(calls: list) -> None:
    model = bound().train()
    model(token_ids(1, 300), labels=token_ids(1, 300)).loss.backward()
    assert len(calls) == 2
    assert all(x.grad is not None and x.grad.isfinite().all() for x in model.parameters())


def test_short_inputs_run_dense(calls: list) -> None:
    ids = token_ids(1, 100)
    torch.testing.assert_close(bound()(ids).logits, build(llama)(ids).logits)
    assert calls == []


def test_what_it_cannot_do_is_refused() -> None:
    model = build(gemma2)  # softcap
    model.set_attn_implementation(kernel.REPO_ID)
    ids, mask = padded([300, 280], "left")
    with pytest.raises(NotImplementedError, match="softcap or attention sinks together with"):
        model(ids, attention_mask=mask)
