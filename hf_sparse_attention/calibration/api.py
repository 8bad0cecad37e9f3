"""Calibration: thresholds from dense passes over text, one pass a sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_sparse_attention import config_values as values
from hf_sparse_attention._version import __version__
from hf_sparse_attention.calibration.attach import attached
from hf_sparse_attention.calibration.data import token_samples
from hf_sparse_attention.calibration.fitting import fit_blasst
from hf_sparse_attention.calibration.observation import Observations
from hf_sparse_attention.calibration.processes import is_first
from hf_sparse_attention.calibration.progress import forget, run
from hf_sparse_attention.config import METHOD_NAMES, MethodName, SparseAttentionConfig
from hf_sparse_attention.fingerprint import ModelFingerprint
from hf_sparse_attention.thresholds import Thresholds
from hf_sparse_attention.types import PHASES, BlockGeometry

DEFAULT_LEVELS = (8, 16, 32, 64)
DEFAULT_TARGETS = (0.5, 0.3, 0.4, 0.6, 0.7)


def calibrate(
    model: nn.Module,
    data: Any = None,
    *,
    method: MethodName = "bsfa",
    levels: Sequence[int] = DEFAULT_LEVELS,
    target_sparsity: float | Sequence[float] | None = None,
    lengths: Sequence[int] | None = None,
    geometry: BlockGeometry | str | None = None,
    keep_sink: bool = True,
    tokenizer: Any = None,
    samples: int | None = None,
    output_dir: str | Path | None = None,
    progress: bool = True,
) -> SparseAttentionConfig:
    """Fits `method` to `model` on `data`; the model itself is left as it was.

    Each sample takes one dense pass, in which the scores are looked at block row by block row.
    Every sample of n tokens also gives n / block_q single positions, from which decoding is
    calibrated.

    Args:
        model: a transformers model with causal attention.
        data: None for the bundled texts, a path, a dataset, texts or token ids: see
            `data.token_samples`.
        method: "bsfa" gives thresholds for each of `levels`, "blasst" a scale factor.
        levels: BSFA's k. Without `keep_sink` that many off-diagonal blocks are kept in each block
            row; with it, that many besides block 0, which neither competes nor is skipped.
        target_sparsity: BLASST's. One value: `lambda = a / L`. Several: `a * exp(b * s) / L` fitted
            over all, and the first is what runs until another target is set. None: 0.5, fitted over
            0.3-0.7.
        lengths: cut every sample to each of these lengths; None: samples as they are, and the
            bundled texts at 2048, 4096 and 8192 tokens.
        geometry: the blocks to calibrate for, or their name; None is 64x64, sink and diagonal
            first. They are the blocks that the thresholds run on.
        keep_sink: never skip block 0 under BSFA.
        tokenizer: for text; None loads the one that lies beside the model.
        samples: at most so many of each length.
        output_dir: the settings are saved there, and until then the state from which a run that was
            killed continues.
        progress: show a progress bar.

    Returns:
        The settings, for `set_sparse_attention(model, config)` or `config.save_pretrained(folder)`.

    Raises:
        ValueError: bad arguments, no usable sample, no causal attention, or a target out of reach.
    """
    if method not in METHOD_NAMES:
        raise ValueError(f"method: expected one of {list(METHOD_NAMES)}, got {method!r}")
    geometry = values.geometry(geometry or BlockGeometry())
    levels = sorted(set(levels))
    if not levels or levels[0] < 1:
        raise ValueError(f"levels: expected positive integers, got {levels}")
    targets = _targets(target_sparsity)
    if tokenizer is None:
        tokenizer = getattr(model, "name_or_path", None) or None
    rows = token_samples(data, tokenizer, lengths, samples)
    observer = Observations([geometry], levels, keep_sink)
    with attached(model, observer):
        tokens = run(model, rows, observer, output_dir, progress)
    provenance: dict[str, Any] = {
        "calibrated_by": f"hf-sparse-attention {__version__}",
        "samples": len(tokens),
        "lengths": sorted(set(tokens)),
    }
    if method == "blasst":
        fit = fit_blasst(observer, geometry.name, targets)
        config = SparseAttentionConfig(
            method="blasst",
            fits={geometry.name: fit},
            target_sparsity=dict.fromkeys(fit.phases, targets[0]),
            provenance=provenance,
        )
    else:
        tables = _thresholds(observer, ModelFingerprint.of(model.config))
        provenance["predicted_sparsity"] = {
            p: observer.predicted_sparsity(geometry.name, p) for p in PHASES
        }
        config = SparseAttentionConfig(
            method="bsfa",
            tables=tables,
            keep_sink=keep_sink,
            provenance=provenance,
        )
    if output_dir is not None and is_first():
        config.save_pretrained(output_dir)
        forget(output_dir)
    return config


def _thresholds(observer: Observations, fingerprint: ModelFingerprint) -> Thresholds:
    (geometry,) = observer.geometries.values()
    prefill = observer.tops(geometry.name, "prefill")
    if prefill is None:
        raise ValueError(
            f"calibrate: expected samples of at least {geometry.block_q} tokens, got shorter ones"
        )
    tables = {"prefill": prefill, "decode": observer.tops(geometry.name, "decode")}
    return Thresholds(
        {f"{geometry.name}.{p}.T": table for p, table in tables.items() if table is not None},
        {geometry.name: geometry},
        levels=observer.levels,
        keep_sink=observer.keep_sink,
        fingerprint=fingerprint,
    )


def _targets(target_sparsity: float | Sequence[float] | None) -> list[float]:
    if target_sparsity is None:
        return list(DEFAULT_TARGETS)
    if isinstance(target_sparsity, (int, float)):
        target_sparsity = [target_sparsity]
    targets = [float(s) for s in target_sparsity]
    if not targets or not all(0.0 < s < 1.0 for s in targets):
        raise ValueError(f"target_sparsity: expected values in (0, 1), got {targets}")
    return targets
