"""Thresholds for a model that training has changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from hf_sparse_attention.calibration import calibrate
from hf_sparse_attention.calibration.data import token_samples
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.methods import METHODS
from hf_sparse_attention.sharding import shares_of

logger = logging.getLogger(__name__)

#: Settings that calibration does not find: they are the user's, and outlast it.
_NOT_CALIBRATED = ("ignore", "targets", "min_length", "backend", "geometry", "max_dropped_mass")


def calibration_samples(model: nn.Module, data: Any, options: Mapping[str, Any]) -> list[Tensor]:
    """The token ids that the trained model will be calibrated on.

    Made before training, so that bad data costs no trained model.

    Args:
        model: what is going to be trained.
        data: "bundled", or what `calibrate` takes.
        options: those of `calibrate`.

    Raises:
        TypeError, ValueError: as `calibrate`; and for a model that is split over processes, each of
            which would have to run the others' samples too.
    """
    if shares_of(model) or any(isinstance(x, FullyShardedDataParallel) for x in model.modules()):
        raise ValueError(
            "calibration_data: expected None under FSDP, since calibration needs the whole model "
            "in one process; load the saved model afterwards and calibrate(model) it"
        )
    samples = token_samples(
        None if isinstance(data, str) and data == "bundled" else data,
        options.get("tokenizer"),
        options.get("lengths"),
        options.get("samples"),
    )
    return list(samples)


def recalibrated(
    model: nn.Module,
    config: SparseAttentionConfig,
    samples: Sequence[Tensor],
    trained_with: str,
    options: Mapping[str, Any],
) -> SparseAttentionConfig:
    """The settings `config` with thresholds of `model` as it is now.

    Where none are found they stay as they were, and an error is logged: the trained model is worth
    more than its thresholds, and may not be saved yet.

    Args:
        model: has been trained.
        config: what it was trained with; the method, geometries and levels are calibrated again.
        samples: token ids, as `calibration_samples` made them.
        trained_with: the field of `config` that was scheduled; it goes on to hold.
        options: of `calibrate`.
    """
    present: dict[str, Any] = {"method": config.method}
    if config.levels:
        present["levels"] = config.levels
    if geometries := METHODS[config.method].calibrated(config):
        present |= {"geometries": geometries, "granularity": config.granularity}
    done = ("lengths", "samples", "tokenizer")  # the samples are made already
    given = {name: x for name, x in options.items() if name not in done}
    try:
        fitted = calibrate(model, list(samples), **{**present, **given})
    except ValueError as error:
        logger.error(
            "SparseAttentionCallback: the trained model keeps the thresholds it was trained with, "
            "since it could not be calibrated: %s",
            error,
        )
        return config
    kept = {name: getattr(config, name) for name in (*_NOT_CALIBRATED, trained_with)}
    if config.level not in fitted.levels:
        kept.pop("level", None)
    return replace(fitted, **kept)
