"""Every model, in every way it is run, gives what eager attention gives when nothing is skipped."""

from __future__ import annotations

import pytest
import scenarios
import tiny_models
import torch
from comparisons import assert_as_exact_as, never_skipping, two_precisions


@pytest.mark.parametrize("scenario", scenarios.ALL)
@pytest.mark.parametrize("name", tiny_models.DECODERS)
def test_decoder_equals_eager(name: str, scenario: str) -> None:
    builder, run = tiny_models.DECODERS[name], scenarios.ALL[scenario]
    eager, exact = two_precisions(builder, run)
    with torch.no_grad():
        ours = run(never_skipping(builder))
    assert_as_exact_as(ours, eager, exact)


@pytest.mark.parametrize("scenario", scenarios.FOR_ENCODERS)
@pytest.mark.parametrize("name", tiny_models.ENCODERS)
def test_encoder_equals_eager(name: str, scenario: str) -> None:
    builder, run = tiny_models.ENCODERS[name], scenarios.ALL[scenario]
    eager, exact = two_precisions(builder, run)
    with torch.no_grad():
        ours = run(never_skipping(builder))
    assert_as_exact_as(ours, eager, exact)
