"""`Int8KeyCache`: StaticCache's tokens, bit for bit, whatever is done to the cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import build, padded, token_ids
from transformers import StaticCache

import hf_sparse_attention as hsa
from hf_sparse_attention.backends import cpu
from hf_sparse_attention.int8_keys import attached
from hf_sparse_attention.key_cache import Int8KeyCache, Int8KeyLayer

pytestmark = pytest.mark.usefixtures("cpu_kernel")

LENGTH = 900
CACHES = {"static": StaticCache, "int8": Int8KeyCache}


@pytest.fixture(scope="module")
def model() -> Any:
    return sparse(tiny_models.llama)


def sparse(builder: Any, **changes: Any) -> Any:
    model = build(builder, "blasst")
    hsa.set_sparse_attention(model, threshold_scale_factor=60.0, backend="cpu", **changes)
    return model


def logits_of(model: Any, cache: Any, steps: int = 6, mask: Any = None) -> torch.Tensor:
    """The logits of a prompt and of a few single tokens behind it, without gradients."""
    start, batch = int(cache.get_seq_length()), 2
    ids = token_ids(batch, LENGTH if not start else 3, seed=7 + start)
    rows = []
    with torch.no_grad():
        for step in range(steps + 1):
            now = ids if step == 0 else token_ids(batch, 1 + step % 3, seed=step)
            rows.append(model(now, past_key_values=cache).logits[:, -1])
    return torch.stack(rows)


def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each decode call that follows came with an int8 copy."""
    seen: list[bool] = []
    run = cpu.run

    def spy(call: Any, *args: Any, **kwargs: Any) -> Any:
        if call.phase == "decode":
            seen.append(call.int8_keys is not None)
        return run(call, *args, **kwargs)

    monkeypatch.setattr(cpu, "run", spy)
    return seen


def same_on_both(model: Any, play: Any, size: int = LENGTH + 60) -> None:
    outputs = [play(model, kind(model.config, max_cache_len=size)) for kind in CACHES.values()]
    assert torch.equal(*outputs)


def test_same_logits(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = used(monkeypatch)
    with hsa.collect_stats(model) as stats:
        same_on_both(model, logits_of)
    assert stats.sparsity("decode") > 0.05
    half = len(seen) // 2
    assert seen == [False] * half + [True] * half


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_same_logits_in_half_precision(dtype: torch.dtype) -> None:
    same_on_both(sparse(tiny_models.llama).to(dtype), logits_of)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2}], ids=str)
def test_generates_the_same_tokens(name: str, options: dict) -> None:
    model = sparse(tiny_models.DECODERS[name])
    ids, mask = padded([LENGTH, LENGTH - 130], "left")
    sequences = [
        model.generate(
            ids,
            attention_mask=mask,
            past_key_values=kind(model.config, max_cache_len=LENGTH + 20),
            max_new_tokens=8,
            do_sample="num_return_sequences" in options,
            disable_compile=True,
            **options,
        )
        for kind in CACHES.values()
        if torch.manual_seed(3)
    ]
    assert torch.equal(*sequences)


def test_sliding_layers_have_no_copy() -> None:
    cache = Int8KeyCache(sparse(tiny_models.gemma3).config, max_cache_len=64)
    assert [type(layer) is Int8KeyLayer for layer in cache.layers] == [False, True]


def test_reorder_reset_and_copies(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def play(model: Any, cache: Any) -> torch.Tensor:
        rows = [logits_of(model, cache)]
        cache.reorder_cache(torch.tensor([1, 0]))
        rows.append(logits_of(model, cache))
        twin = copy.deepcopy(cache)
        rows.append(logits_of(model, cache))
        rows.append(logits_of(model, twin))
        cache.reset()
        rows.append(logits_of(model, cache))
        return torch.cat(rows)

    seen = used(monkeypatch)
    same_on_both(model, play)
    assert seen == sorted(seen), "every call of the second cache has its copy"


def test_writing_behind_its_back(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is seen, and the copy is not trusted again until the keys are known anew."""

    def play(model: Any, cache: Any) -> torch.Tensor:
        rows = [logits_of(model, cache)]
        for layer in cache.layers:
            layer.keys[:, :, 200:600] = layer.keys[:, :, 300:700].clone() * 3
        if isinstance(cache, Int8KeyCache):
            assert all(attached(layer.keys) is None for layer in cache.layers)
        rows.append(logits_of(model, cache))
        return torch.cat(rows)

    same_on_both(model, play)


def test_going_back(model: Any) -> None:
    """Tokens are taken back, as assisted decoding does, and others take their place."""

    def play(model: Any, cache: Any) -> torch.Tensor:
        rows = [logits_of(model, cache)]
        for layer in cache.layers:
            layer.cumulative_length -= 9
        rows.append(logits_of(model, cache))
        return torch.cat(rows)

    same_on_both(model, play)


def test_inference_mode(model: Any) -> None:
    """Where torch does not count what is written."""

    def play(model: Any, cache: Any) -> torch.Tensor:
        with torch.inference_mode():
            return logits_of(model, cache)

    same_on_both(model, play)


def test_compiled_and_eager_steps_mix(model: Any) -> None:
    """Compiled steps keep no copy; what eager steps do afterwards is right all the same."""

    def play(model: Any, cache: Any) -> torch.Tensor:
        rows = [logits_of(model, cache, steps=2)]
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            for step in range(2):
                ids = token_ids(2, 1, seed=90 + step)
                rows.append(compiled(ids, past_key_values=cache).logits[None, :, -1])
        rows.append(logits_of(model, cache, steps=2))
        return torch.cat(rows)

    torch._dynamo.reset()
    same_on_both(model, play)
