"""Comparisons with eager attention whose tolerance is eager's own rounding error.

Eager itself rounds: its softmax is float32 in any dtype, and in float64 its fully masked rows are
NaN. So `exact` is an attention function of the tests' own, in float64 throughout, under
transformers' bool masks; that eager is close to it is asserted too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from tiny_models import build, token_ids
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import hf_sparse_attention as hsa
from hf_sparse_attention.types import BlockGeometry

#: Two float32 computations in different order: the other's error may be a few times the first's.
SLACK = 4.0
#: Eager float32 must be this close to exact, as a part of the largest value: checks the oracle.
EAGER_IS_GOOD = 1e-4

SMALL_BLOCKS = hsa.SparseAttentionConfig(method="blasst", geometry=BlockGeometry(8, 8, split_k=32))

Run = Callable[[Any], Tensor]


def exact_attention(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : k.shape[2]]
    return (weights @ v.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), weights


def exact_mask(**arguments: Any) -> Tensor | None:
    arguments.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return sdpa_mask(**arguments)


AttentionInterface.register("exact", exact_attention)
AttentionMaskInterface.register("exact", exact_mask)


@functools.cache
@torch.no_grad()
def two_precisions(builder: Callable[[], Any], run: Run) -> tuple[Tensor, Tensor]:
    """What eager gives in float32, and what is exact."""
    return run(build(builder)), run(build(builder, "exact").double())


def never_skipping(builder: Callable[[], Any], method: str = "blasst", **settings: Any) -> Any:
    """The model with our attention, in which nothing is skipped."""
    model = build(builder)
    settings = {"threshold_scale_factor": 0, "min_length": 0, **settings}
    hsa.set_sparse_attention(model, method, **settings)
    return model


def skipping(builder: Callable[[], Any], factor: float = 20.0, **settings: Any) -> Any:
    """The model with BLASST skipping many small blocks, so that short inputs will do."""
    model = build(builder)
    settings = {"threshold_scale_factor": factor, "min_length": 0, **settings}
    hsa.set_sparse_attention(model, SMALL_BLOCKS)
    hsa.set_sparse_attention(model, **settings)
    return model


def skipping_bsfa(builder: Callable[[], Any], **settings: Any) -> Any:
    """The model with BSFA, calibrated on two samples to keep 2 small blocks off the diagonal."""
    model = build(builder)
    samples = [token_ids(1, 96, seed=5), token_ids(1, 96, seed=6)]
    blocks = SMALL_BLOCKS.geometry
    config = hsa.calibrate(
        model, samples, method="bsfa", levels=[2], geometries=blocks, progress=False
    )
    hsa.set_sparse_attention(model, config, **{"min_length": 0, **settings})
    return model


def assert_as_exact_as(ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    """That `ours` is off `exact` by no more than a few times what `eager` is."""
    assert ours.shape == exact.shape
    scale = float(exact.abs().max())
    eager_error = _off(eager, exact)
    assert eager_error <= EAGER_IS_GOOD * scale, f"the oracle is off eager by {eager_error:.2e}"
    error, allowed = _off(ours, exact), max(SLACK * eager_error, 8 * 2.0**-23 * scale)
    assert error <= allowed, (
        f"off by {error:.2e}, allowed {allowed:.2e} of values up to {scale:.1f}"
    )


def _off(a: Tensor, exact: Tensor) -> float:
    return float((a.double() - exact).abs().max())
