"""Calibration: thresholds from dense passes over text, one pass a sample."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from torch import Tensor, nn

from hf_sparse_attention import config_values as values
from hf_sparse_attention._version import __version__
from hf_sparse_attention.calibration.allocation import coefficients
from hf_sparse_attention.calibration.attach import attached
from hf_sparse_attention.calibration.choice import Limits, choose
from hf_sparse_attention.calibration.data import token_samples, without_prefixes
from hf_sparse_attention.calibration.fitting import fit_blasst
from hf_sparse_attention.calibration.observation import DEFAULT_GEOMETRIES, Observations
from hf_sparse_attention.calibration.prediction import with_predictions
from hf_sparse_attention.calibration.progress import forget, run
from hf_sparse_attention.calibration.report import write_report
from hf_sparse_attention.config import (
    GRANULARITIES,
    METHOD_NAMES,
    Granularity,
    MethodName,
    SparseAttentionConfig,
)
from hf_sparse_attention.fingerprint import ModelFingerprint
from hf_sparse_attention.fits import Fit
from hf_sparse_attention.html_report import require_matplotlib
from hf_sparse_attention.sharding import is_first
from hf_sparse_attention.thresholds import Thresholds
from hf_sparse_attention.types import PHASES, BlockGeometry, Phase

logger = logging.getLogger(__name__)

DEFAULT_LEVELS = (8, 16, 32, 64)
DEFAULT_TARGETS = (0.5, 0.3, 0.4, 0.6, 0.7)
DEFAULT_GRANULARITY: Granularity = "head"
#: Rows of the bundled texts that results are checked on: one of each kind.
VALIDATION_SAMPLES = 3

ByPhase = float | Mapping[Phase, float] | None


def calibrate(
    model: nn.Module,
    data: Any = None,
    *,
    method: MethodName = "blasst",
    lengths: Sequence[int] | None = None,
    target_sparsity: float | Sequence[float] | None = None,
    granularity: Granularity | None = None,
    levels: Sequence[int] = DEFAULT_LEVELS,
    geometries: str | BlockGeometry | Sequence[str | BlockGeometry] | None = None,
    keep_sink: bool = True,
    max_kl: ByPhase = None,
    max_ppl_increase: ByPhase = None,
    validation: Any = None,
    tokenizer: Any = None,
    samples: int | None = None,
    output_dir: str | Path | None = None,
    report: str | Path | None = None,
    progress: bool = True,
) -> SparseAttentionConfig:
    """Finds thresholds for `model` on `data`; the model itself is left as it was.

    Each sample takes one dense pass, in which the scores are looked at block row by block row. It
    serves both methods, every target and level, and all geometries. Every sample of n tokens also
    gives n / block_q single positions, from which decoding is calibrated.

    Args:
        model: a transformers model with causal attention.
        data: None for the bundled texts, a path, a dataset, texts or token ids: see
            `data.token_samples`.
        method: which of the two will run, until `set_sparse_attention` says otherwise.
        lengths: cut every sample to each of these lengths; None: samples as they are, and the
            bundled texts at 2048, 4096 and 8192 tokens.
        target_sparsity: several: BLASST's `a * exp(b * s) / L` is fitted over all, and the first
            is what runs until another is set. One: `lambda = a / L`, which no other target can be
            set under. None: 0.5, fitted over 0.3 to 0.7. Under BSFA the level that comes nearest
            to the first runs, by what each skips in prefill of the calibrated samples.
        granularity: BLASST: one threshold for all ("global"), or one for each "layer" or "head",
            which together skip as much. None: "head", which costs least at equal
            sparsity (docs/calibration-results.md).
        levels: BSFA's k. Without `keep_sink` that many off-diagonal blocks are kept in each block
            row; with it, that many besides block 0, which neither competes nor is skipped. Empty:
            no thresholds for BSFA.
        geometries: the blocks to calibrate for, or their names; None is all that a backend runs:
            64x128, 64x64 and 64x1.
        keep_sink: never skip block 0 under BSFA.
        max_kl: choose what runs by its cost: the highest target sparsity (under BSFA the smallest
            level) whose divergence from the dense model, in nats, is at most this on `validation`.
            One number, or one for each phase; for each geometry its own target.
        max_ppl_increase: the same for the perplexity: 0.01 allows one per cent more.
        validation: held-out data, read like `data`: what the fits skip there goes into their table
            `held_out`, and limits are kept there. None: the bundled texts' validation part, if
            the data are bundled or there is a limit to keep.
        tokenizer: for text; None loads the one that lies beside the model.
        samples: at most so many of each length.
        output_dir: the settings are saved there, and until then the state from which a run that was
            killed continues.
        report: the HTML file that shows how well the thresholds fit; needs matplotlib.
        progress: show a progress bar.

    Returns:
        The settings, for `set_sparse_attention(model, config)` or `config.save_pretrained(folder)`.

    Raises:
        TypeError: data of another kind, or text without a tokenizer.
        ValueError: bad arguments, no usable sample, no causal attention, or a target out of reach.
        ImportError: a report is asked for and matplotlib is not installed.
    """
    if report is not None:
        require_matplotlib()
    if method not in METHOD_NAMES:
        raise ValueError(f"method: expected one of {list(METHOD_NAMES)}, got {method!r}")
    if granularity is not None and granularity not in GRANULARITIES:
        raise ValueError(f"granularity: expected one of {list(GRANULARITIES)}, got {granularity!r}")
    if method == "bsfa" and not levels:
        raise ValueError("levels: expected at least one for method 'bsfa', got none")
    targets = _targets(target_sparsity)
    limits = Limits.of(max_kl, max_ppl_increase)
    if limits.phases and method == "blasst" and len(targets) == 1:
        raise ValueError(
            "target_sparsity: expected None or several to choose from, as max_kl and "
            f"max_ppl_increase do, got {targets[0]}"
        )
    observed = Observations(_geometries(geometries), levels, keep_sink)
    if tokenizer is None:
        tokenizer = getattr(model, "name_or_path", None) or None
    rows = token_samples(data, tokenizer, lengths, samples)
    if validation is not None:
        held_out = list(token_samples(validation, tokenizer, lengths, samples))
    elif limits.phases and tokenizer is None:
        raise ValueError(
            "validation: expected held-out data to keep max_kl and max_ppl_increase on, or a "
            "tokenizer for the bundled texts, got neither"
        )
    with attached(model, observed):
        tokens = run(model, rows, observed, output_dir, progress)
    if validation is None:
        held_out = []
        if data is None or limits.phases:
            cut = lengths or sorted({min(tokens), max(tokens)})
            few = min(samples or VALIDATION_SAMPLES, VALIDATION_SAMPLES)
            held_out = list(token_samples(None, tokenizer, cut, few, part="validation"))

    config = settings_from(observed, model, method, targets, granularity or DEFAULT_GRANULARITY)
    config = replace(config, provenance={**_provenance(tokens, held_out), **config.provenance})
    seen = _observe(model, observed, held_out, progress)
    config = with_predictions(config, observed, seen, targets)
    if limits.phases:
        config = choose(model, without_prefixes(held_out), config, limits, progress and is_first())
    if report is not None and is_first():
        write_report(config, observed, report, title=_title(model))
    if output_dir is not None and is_first():
        config.save_pretrained(output_dir)
        forget(output_dir)
    return config


def _title(model: nn.Module) -> str:
    """The model's name; of a local folder its last part: a report may go elsewhere."""
    name = str(getattr(model, "name_or_path", ""))
    return Path(name).resolve().name if Path(name).is_dir() else name


def settings_from(
    observed: Observations,
    model: nn.Module,
    method: MethodName,
    targets: Sequence[float],
    granularity: Granularity,
) -> SparseAttentionConfig:
    """What was observed, as settings for both methods."""
    fits = _fits(observed, targets, needed=method == "blasst")
    tensors: dict[str, Tensor] = {}
    predicted: dict[str, dict[str, dict[str, float]]] = {}
    for name in observed.geometries:
        for phase in PHASES:
            table = observed.tops(name, phase) if observed.levels else None
            if table is not None:
                tensors[f"{name}.{phase}.T"] = table
                levels = observed.predicted_sparsity(name, phase)
                predicted.setdefault(name, {})[phase] = levels
            if granularity != "global" and name in fits:
                log_a, b = coefficients(observed, name, phase, targets, granularity)
                tensors |= {f"{name}.{phase}.log_a": log_a, f"{name}.{phase}.b": b}
    if method == "bsfa" and not predicted:
        least = min(geometry.block_q for geometry in observed.geometries.values())
        raise ValueError(
            f"calibrate: expected samples of at least {least} tokens, got shorter ones"
        )
    tables = None
    if tensors:
        tables = Thresholds(
            tensors,
            observed.geometries,
            levels=observed.levels if predicted else [],
            keep_sink=observed.keep_sink,
            fingerprint=ModelFingerprint.of(model.config),
        )
    return SparseAttentionConfig(
        method=method,
        fits=fits,
        granularity=granularity if fits else "global",
        level=_nearest_level(predicted, targets[0]),
        target_sparsity=dict.fromkeys(PHASES, targets[0]) if fits else None,
        keep_sink=observed.keep_sink,
        tables=tables,
        provenance={"predicted_sparsity": predicted} if predicted else {},
    )


def _nearest_level(
    predicted: Mapping[str, Mapping[str, Mapping[str, float]]], target: float
) -> int | None:
    """The level whose sparsity in prefill, over all geometries, comes nearest to `target`."""
    prefills = [phases["prefill"] for phases in predicted.values() if "prefill" in phases]
    if not prefills:
        return None
    off = {level: abs(mean(x[level] for x in prefills) - target) for level in prefills[0]}
    return int(min(off, key=off.__getitem__))


def _fits(observed: Observations, targets: Sequence[float], needed: bool) -> dict[str, Fit]:
    """The fits of all geometries under which some target is within reach."""
    found = {name: _fit(observed, name, targets) for name in observed.geometries}
    errors = [fit for fit in found.values() if isinstance(fit, ValueError)]
    if needed and len(errors) == len(found):
        raise errors[0]
    for error in errors if needed else []:
        logger.warning("calibrate: a geometry is left out: %s", error)
    return {name: fit for name, fit in found.items() if isinstance(fit, Fit)}


def _fit(observed: Observations, geometry: str, targets: Sequence[float]) -> Fit | ValueError:
    try:
        return fit_blasst(observed, geometry, targets)
    except ValueError as error:
        return error


def _observe(
    model: nn.Module, like: Observations, samples: Sequence[Tensor], progress: bool
) -> Observations | None:
    """What other samples tell of the same geometries; None without samples."""
    if not samples:
        return None
    observed = Observations(list(like.geometries.values()))
    with attached(model, observed):
        run(model, samples, observed, progress=progress, description="held-out text")
    return observed


def _provenance(tokens: Sequence[int], held_out: Sequence[Tensor]) -> dict[str, Any]:
    provenance: dict[str, Any] = {
        "calibrated_by": f"hf-sparse-attention {__version__}",
        "samples": len(tokens),
        "lengths": sorted(set(tokens)),
    }
    if held_out:
        provenance["validation_samples"] = len(held_out)
        provenance["validation_lengths"] = sorted({len(ids) for ids in held_out})
    return provenance


def _geometries(
    given: str | BlockGeometry | Sequence[str | BlockGeometry] | None,
) -> Sequence[BlockGeometry]:
    if given is None:
        return DEFAULT_GEOMETRIES
    if isinstance(given, (str, BlockGeometry)):
        given = [given]
    return [values.geometry(geometry) for geometry in given]


def _targets(target_sparsity: float | Sequence[float] | None) -> list[float]:
    if target_sparsity is None:
        return list(DEFAULT_TARGETS)
    if isinstance(target_sparsity, (int, float)):
        target_sparsity = [target_sparsity]
    targets = [float(s) for s in target_sparsity]
    if not targets or not all(0.0 < s < 1.0 for s in targets):
        raise ValueError(f"target_sparsity: expected values in (0, 1), got {targets}")
    return targets
