"""Every model, in every way it is run, gives what eager attention gives when nothing is skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import scenarios
import tiny_models
import torch
from comparisons import assert_as_exact_as, never_skipping, two_precisions

import hf_sparse_attention as hsa


def check(builder: Callable[[], Any], scenario: str, ours: Any) -> None:
    run = scenarios.ALL[scenario]
    eager, exact = two_precisions(builder, run)
    with torch.no_grad():
        assert_as_exact_as(run(ours), eager, exact)


@pytest.mark.parametrize("scenario", scenarios.ALL)
@pytest.mark.parametrize("name", tiny_models.DECODERS)
def test_decoder_equals_eager(name: str, scenario: str) -> None:
    builder = tiny_models.DECODERS[name]
    check(builder, scenario, never_skipping(builder))


@pytest.mark.parametrize("scenario", scenarios.FOR_ENCODERS)
@pytest.mark.parametrize("name", tiny_models.ENCODERS)
def test_encoder_equals_eager(name: str, scenario: str) -> None:
    builder = tiny_models.ENCODERS[name]
    check(builder, scenario, never_skipping(builder))


@pytest.mark.parametrize("backend", ["reference", "dense"])
@pytest.mark.parametrize("scenario", [s for s in scenarios.ALL if not s.startswith("user")])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_other_backends_equal_eager(name: str, scenario: str, backend: str) -> None:
    builder = tiny_models.DECODERS[name]
    check(builder, scenario, never_skipping(builder, backend=backend))


@pytest.mark.parametrize("scenario", scenarios.ALL)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_bsfa_that_keeps_all_blocks_equals_eager(name: str, scenario: str) -> None:
    builder = tiny_models.DECODERS[name]
    model = tiny_models.build(builder)
    sample = tiny_models.token_ids(1, 64)
    config = hsa.calibrate(
        model, [sample], method="bsfa", levels=[999], geometries="64x64", progress=False
    )
    hsa.set_sparse_attention(model, config, min_length=0)
    check(builder, scenario, model)


#: The calls that cannot skip; everything else must not have run dense behind our back.
MUST_BE_DENSE = {"user_bool_mask", "user_additive_mask"}


@pytest.mark.parametrize("scenario", scenarios.ALL)
@pytest.mark.parametrize("name", tiny_models.DECODERS)
def test_only_what_must_runs_dense(name: str, scenario: str) -> None:
    builder = tiny_models.DECODERS[name]
    model = never_skipping(builder)
    with torch.no_grad(), hsa.collect_stats(model) as stats:
        scenarios.ALL[scenario](model)
    chunked = name == "llama4" and scenario != "one_token"  # one query's mask is key validity
    assert bool(stats.dense()) == (scenario in MUST_BE_DENSE or chunked)
    if chunked and scenario not in MUST_BE_DENSE:  # the other layers attend to everything
        assert stats.counts("prefill")
