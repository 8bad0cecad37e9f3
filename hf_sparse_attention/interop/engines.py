"""Our settings for engines that skip softmax blocks: ModelOpt, TensorRT-LLM, SGLang, vLLM.

All of them run BLASST's rule with lambda = factor / kv_len. ModelOpt and TensorRT-LLM can read the
fit `a * exp(b * target_sparsity)` from config.json; the other two take one number a phase, which is
the fit at the target sparsity. None of them runs BSFA, the error budget, or thresholds by layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_sparse_attention._version import __version__
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.config_schema import CONFIG_KEY, EVERY_ATTENTION, FORMULA, OWN_KEY
from hf_sparse_attention.types import PHASES, Phase


@dataclass(frozen=True)
class Export:
    """What one engine takes.

    Args:
        engine: one of `ENGINES`.
        content: the settings as data, JSON-ready.
        text: the same as the user hands it to the engine: JSON, YAML, variables or flags.
        notes: how that engine decides otherwise than we do, a sentence each.
    """

    engine: str
    content: dict[str, Any]
    text: str
    notes: list[str]


@dataclass(frozen=True)
class _Calibrated:
    """The part of our settings that other engines understand.

    `factors` and `targets` hold the calibrated phases only; `lengths` and `sparsity` are the ranges
    that the factors are made of, where known; `geometry` and `order` are
    those that the factors were calibrated on; `left_out` names settings that no engine knows.
    """

    factors: dict[Phase, dict[str, float]]
    targets: dict[Phase, float]
    geometry: str
    order: str
    lengths: dict[Phase, tuple[int, int]]
    sparsity: dict[Phase, tuple[float, float]]
    classes: list[str]
    ignore: list[str]
    left_out: list[str]

    def values(self) -> dict[str, float]:
        """The scale factor of each phase at its target, six digits."""
        found = {}
        for phase, fit in self.factors.items():
            exponent = fit["b"] * self.targets[phase] if fit["b"] else 0.0
            found[str(phase)] = float(f"{fit['a'] * math.exp(min(exponent, 700.0)):.6g}")
        return found


_Made = tuple[dict[str, Any], str, list[str]]  # content, text, notes


def export(
    config: SparseAttentionConfig,
    engine: str,
    *,
    target_sparsity: float | Mapping[Phase, float] | None = None,
) -> Export:
    """`config` in the form that `engine` takes.

    Args:
        config: settings with a BLASST scale factor, calibrated or set by hand.
        engine: one of `ENGINES`.
        target_sparsity: one for both phases or one a phase, in [0, 1); None: the config's own.

    Raises:
        ValueError: an unknown engine, no BLASST factor, or a target that is missing or out of
            range.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    calibrated = _calibrated(config, target_sparsity)
    content, text, notes = ENGINES[engine](calibrated)
    return Export(engine, content, text, [*notes, *_shared_notes(calibrated, engine)])


def _calibrated(
    config: SparseAttentionConfig, target_sparsity: float | Mapping[Phase, float] | None
) -> _Calibrated:
    data = config.to_dict()
    own = data[OWN_KEY]
    group = data.get("config_groups", {}).get("group_0")
    if group is None:
        raise ValueError(
            "export: expected a BLASST threshold_scale_factor, the only rule that other engines "
            f"run, got the method {config.method!r} without one; calibrate with method='blasst'"
        )
    factors = {phase: group["threshold_scale_factor"].get(phase) for phase in PHASES}
    factors = {phase: fit for phase, fit in factors.items() if fit is not None}
    targets = _targets(group.get("target_sparsity", {}), target_sparsity, factors)
    # The group repeats the fit closest to what those engines run; a factor set by hand goes first.
    fits = {} if "threshold_scale_factor" in own else own.get("fits", {})
    fit: dict[str, Any] = fits.get("64x128") or next(iter(fits.values()), {})
    geometry = fit.get("geometry") or own.get("geometry") or {}
    left_out = [f"{name}={own[name]}" for name in ("max_dropped_mass", "min_length") if name in own]
    if own.get("granularity", "global") != "global":
        left_out.append(f"the factors of each {own['granularity']}")
    return _Calibrated(
        factors=factors,
        targets=targets,
        geometry=f"{geometry.get('block_q', 64)}x{geometry.get('block_k', 64)}",
        order=geometry.get("order", "sink_diagonal"),
        lengths={p: tuple(fit[p]["lengths"]) for p in factors if "lengths" in fit.get(p, {})},
        sparsity={p: tuple(fit[p]["sparsity"]) for p in factors if "sparsity" in fit.get(p, {})},
        classes=group["targets"],
        ignore=group["ignore"],
        left_out=left_out,
    )


def _targets(
    present: Mapping[Phase, float],
    given: float | Mapping[Phase, float] | None,
    factors: Mapping[Phase, Mapping[str, float]],
) -> dict[Phase, float]:
    asked = dict.fromkeys(factors, given) if isinstance(given, (int, float)) else given or {}
    if unknown := sorted(set(asked) - set(factors)):
        raise ValueError(
            f"target_sparsity: expected calibrated phases, {list(factors)}, got {unknown}"
        )
    targets = {**present, **asked}
    for phase, fit in factors.items():
        target = targets.get(phase)
        if target is None and fit["b"] != 0:
            raise ValueError(
                f"target_sparsity: expected one for {phase}, whose factor depends on it, got none"
            )
        if target is not None and not 0.0 <= target < 1.0:
            raise ValueError(f"target_sparsity: expected [0, 1) for {phase}, got {target}")
    return {phase: targets[phase] for phase in factors if phase in targets}


_MODELOPT_KEY = (
    "This is the key of config.json that ModelOpt's serving plugins and TensorRT-LLM read."
)
_MODELOPT_VOTES = (
    "In decode each query head decides by itself in ModelOpt; here the heads that share keys "
    "decide together."
)
_MODELOPT_LENGTH = (
    "ModelOpt's Hugging Face path takes the padded length for kv_len, its vLLM plugin the longest "
    "request of the batch; here each request counts its own keys."
)
_TENSORRT_LLM = "Needs TensorRT-LLM's TRTLLM attention backend; its others ignore this in silence."
_SGLANG = (
    "SGLang hands these to FlashInfer's TensorRT-LLM kernels (attention backends trtllm_mha and "
    "trtllm_mla on Blackwell); no other backend looks at them."
)
_VLLM = (
    "vLLM has these flags in open pull requests only (vllm-project/vllm#42989): check that your "
    "build knows them. Its kernels are FlashInfer's TensorRT-LLM ones, on Blackwell."
)


def _modelopt(found: _Calibrated) -> _Made:
    group: dict[str, Any] = {
        "algorithm": "skip_softmax",
        "targets": found.classes or [EVERY_ATTENTION],
        **({"ignore": found.ignore} if found.ignore else {}),
        "threshold_scale_factor": {"formula": FORMULA, **found.factors},
        "target_sparsity": found.targets,
    }
    producer = {"name": "hf-sparse-attention", "version": __version__}
    content = {CONFIG_KEY: {"config_groups": {"group_0": group}, "producer": producer}}
    notes = [_MODELOPT_KEY, _MODELOPT_VOTES, _MODELOPT_LENGTH]
    if flat := [phase for phase, fit in found.factors.items() if fit["b"] <= 0]:
        notes.append(
            f"The factor of {' and '.join(flat)} does not grow with the target (b <= 0): ModelOpt "
            "takes that for no fit, and runs its static threshold instead."
        )
    if missing := [phase for phase in PHASES if phase not in found.factors]:
        notes.append(
            f"Not calibrated: {' and '.join(missing)}. ModelOpt's Hugging Face path runs its own "
            "static threshold there (0.1 unless set); TensorRT-LLM and the vLLM plugin stay dense."
        )
    return content, json.dumps(content, indent=2), notes


def _tensorrt_llm(found: _Calibrated) -> _Made:
    values = found.values()
    content = {CONFIG_KEY: {"algorithm": "skip_softmax", "threshold_scale_factor": values}}
    lines = [
        "# trtllm-serve MODEL --config THIS_FILE; in Python, sparse_attention_config=",
        f"#   SkipSoftmaxAttentionConfig(threshold_scale_factor={json.dumps(values)})",
        f"{CONFIG_KEY}:",
        "  algorithm: skip_softmax",
        "  threshold_scale_factor:",
        *(f"    {phase}: {value!r}" for phase, value in values.items()),
    ]
    return content, "\n".join(lines), [_TENSORRT_LLM, *_same_for_all_layers(found)]


def _sglang(found: _Calibrated) -> _Made:
    content = {
        f"SGLANG_SKIP_SOFTMAX_{phase.upper()}_THRESHOLD_SCALE_FACTOR": value
        for phase, value in found.values().items()
    }
    lines = [f"export {name}={value!r}" for name, value in content.items()]
    return content, "\n".join(lines), [_SGLANG, *_same_for_all_layers(found)]


def _vllm(found: _Calibrated) -> _Made:
    content = {
        f"trtllm_skip_softmax_{phase}_threshold_scale_factor": value
        for phase, value in found.values().items()
    }
    flags = [f"--attention-config.{name} {value!r}" for name, value in content.items()]
    return content, " ".join(flags), [_VLLM, *_same_for_all_layers(found)]


#: {engine: what makes its content, its text, and the notes that concern it alone}.
ENGINES: dict[str, Callable[[_Calibrated], _Made]] = {
    "modelopt": _modelopt,
    "tensorrt-llm": _tensorrt_llm,
    "sglang": _sglang,
    "vllm": _vllm,
}

#: Rows by keys of the blocks that each engine's prefill decides on.
BLOCKS = {
    "modelopt": "128x128",
    "tensorrt-llm": "128x128, or 64x128 on Hopper",
    "sglang": "128x128",
    "vllm": "128x128",
}


_ORDERS = {"sink_diagonal": "block 0 first, then the diagonal, then the rest ascending"}


def _same_for_all_layers(found: _Calibrated) -> list[str]:
    """What one number a phase cannot say."""
    dense = ", ".join(found.ignore)
    note = f"One number holds for all layers, also for those that stay dense here: {dense}."
    return [note] if found.ignore else []


def _shared_notes(found: _Calibrated, engine: str) -> list[str]:
    """Where every one of those engines differs from us."""
    order = _ORDERS.get(found.order, found.order)
    blocks = (
        f"Calibrated on blocks of {found.geometry} (rows x keys), {order}; {engine} decides on "
        f"blocks of {BLOCKS[engine]}, ascending. The same factor skips other blocks there, as "
        "a rule fewer: measure the sparsity there before you rely on the target."
    )
    notes = [blocks]
    values = found.values()
    if any(value >= 1.0 for value in values.values()):
        limits = ", ".join(f"{math.ceil(x)} keys ({phase})" for phase, x in values.items())
        notes.append(
            f"lambda = factor / kv_len reaches 1 for requests of at most {limits}. Here it is "
            "clamped below 1; there it is not, and such requests lose accuracy: keep them dense."
        )
    if found.lengths:
        ranges = ", ".join(f"{a} to {b} keys ({phase})" for phase, (a, b) in found.lengths.items())
        notes.append(f"Calibrated for {ranges}; other lengths are extrapolated.")
    for phase, (low, high) in found.sparsity.items():
        if phase in found.targets and not low - 1e-6 <= found.targets[phase] <= high + 1e-6:
            notes.append(
                f"The target {found.targets[phase]:g} for {phase} lies outside those calibrated, "
                f"{low:g} to {high:g}: the factor is extrapolated."
            )
    if found.left_out:
        notes.append(f"Left behind, as no such engine has it: {', '.join(found.left_out)}.")
    return notes
