"""`GrowingCache`: DynamicCache's contents, bit for bit, whatever is done to the cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import build, token_ids
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer

import hf_sparse_attention as hsa
from hf_sparse_attention.growing_cache import GrowingCache, GrowingLayer

Play = Callable[[Any], None]


def states(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 2, length, 8), torch.randn(batch, 2, length, 4)


def add(cache: Any, *lengths: int, batch: int = 2) -> None:
    for length in lengths:
        k, v = cache.update(*states(batch, length), 0)
        assert k.shape[2] == v.shape[2] == cache.get_seq_length()


def grow(cache: Any) -> None:
    add(cache, 40, 1, 1, 300, 1, 700, 1)


def crop(cache: Any) -> None:
    add(cache, 40, 1)
    cache.crop(-3)
    add(cache, 1, 2)


def reorder(cache: Any) -> None:
    add(cache, 40, 1)
    cache.reorder_cache(torch.tensor([1, 0]))
    add(cache, 1, 1)


def select_and_repeat(cache: Any) -> None:
    add(cache, 40)
    cache.batch_select_indices(torch.tensor([1]))
    add(cache, 1, batch=1)
    cache.batch_repeat_interleave(3)
    add(cache, 1, batch=3)


def reset(cache: Any) -> None:
    add(cache, 40, 1)
    cache.reset()
    add(cache, 5, 1)


def other_dtype(cache: Any) -> None:
    add(cache, 40)
    cache.update(*(x.double() for x in states(2, 3)), 0)
    add(cache, 1)


@pytest.mark.parametrize(
    "play", [grow, crop, reorder, select_and_repeat, reset, other_dtype], ids=lambda f: f.__name__
)
def test_same_contents(play: Play) -> None:
    config = build(tiny_models.llama).config
    caches = []
    for kind in (DynamicCache, GrowingCache):
        torch.manual_seed(0)
        caches.append(kind(config=config))
        play(caches[-1])
    plain, growing = (cache.layers[0] for cache in caches)
    assert torch.equal(growing.keys, plain.keys)
    assert torch.equal(growing.values, plain.values)


def test_a_step_moves_nothing_until_the_room_is_used_up() -> None:
    cache = GrowingCache(config=build(tiny_models.llama).config)
    add(cache, 1000)
    places = set()
    for _ in range(255):
        add(cache, 1)
        places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 1


def test_a_copy_is_a_cache_of_its_own() -> None:
    cache = GrowingCache(config=build(tiny_models.llama).config)
    add(cache, 40, 1)
    other = copy.deepcopy(cache)
    kept = other.layers[0].keys.clone()
    cache.crop(-2)
    add(cache, 3)
    assert torch.equal(other.layers[0].keys, kept)
    add(other, 1)
    assert torch.equal(other.layers[0].keys[:, :, :-1], kept)


def test_gradients_flow_as_through_a_dynamic_cache() -> None:
    cache = GrowingCache(config=build(tiny_models.llama).config)
    add(cache, 4)
    k, v = (x.requires_grad_() for x in states(2, 3))
    keys, values = cache.update(k, v, 0)
    (keys.sum() + values.sum()).backward()
    assert torch.equal(k.grad, torch.ones_like(k))


def test_only_plain_layers_are_replaced_and_transformers_own_are_left_alone() -> None:
    kinds = dict(DYNAMIC_LAYER_TYPE_MAPPING)
    cache = GrowingCache(config=build(tiny_models.gemma3).config)
    assert [type(layer).__name__ for layer in cache.layers] == [
        "DynamicSlidingWindowLayer",
        "GrowingLayer",
    ]
    assert kinds == DYNAMIC_LAYER_TYPE_MAPPING
    assert GrowingLayer not in kinds.values()
    assert DynamicLayer in {type(x) for x in DynamicCache(config=cache_config()).layers}


def cache_config() -> Any:
    return build(tiny_models.llama).config


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("implementation", ["sdpa", "blasst"])
def test_generates_the_same(name: str, implementation: str) -> None:
    model = build(tiny_models.DECODERS[name], implementation)
    if implementation == "blasst":
        hsa.set_sparse_attention(model, threshold_scale_factor=20.0, min_length=0)
    options = {"do_sample": False, "max_new_tokens": 8, "num_beams": 2}
    ids = token_ids(2, 70)
    expected = model.generate(ids, **options)
    ours = model.generate(ids, past_key_values=GrowingCache(config=model.config), **options)
    assert torch.equal(ours, expected)
