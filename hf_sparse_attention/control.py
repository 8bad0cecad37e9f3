"""Changing a live model: method, thresholds, budget, backend, and where the settings are kept."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from torch import nn
from transformers import PreTrainedModel

from hf_sparse_attention.backends import BACKENDS
from hf_sparse_attention.changes import ByPhase, merged, updated
from hf_sparse_attention.config import METHOD_NAMES, MethodName, SparseAttentionConfig
from hf_sparse_attention.config_schema import CONFIG_KEY, is_ours
from hf_sparse_attention.fingerprint import ModelFingerprint
from hf_sparse_attention.interface import foreign_message
from hf_sparse_attention.methods import METHODS
from hf_sparse_attention.saving import keep_on_save
from hf_sparse_attention.settings import ATTRIBUTE, LayerSettings, announce
from hf_sparse_attention.types import PHASES

logger = logging.getLogger(__name__)


def set_sparse_attention(
    model: nn.Module,
    method: MethodName | SparseAttentionConfig | None = None,
    *,
    target_sparsity: ByPhase = None,
    threshold_scale_factor: ByPhase = None,
    max_dropped_mass: ByPhase = None,
    level: int | None = None,
    backend: str | None = None,
    min_length: int | None = None,
) -> SparseAttentionConfig:
    """Gives a live model block-sparse attention, or changes how it skips.

    What is not mentioned stays as it is. The settings hold for this model only, even if others were
    made from the same config object: the model gets a copy of its own. They are saved and pushed
    with the model, tables included. Changing numbers does not recompile a compiled model.

    Args:
        model: a transformers model, plain or wrapped (PEFT, `torch.compile`).
        method: `"blasst"`, `"bsfa"`, a whole `SparseAttentionConfig` (as `calibrate` returns), or
            None for the present one.
        target_sparsity: BLASST, the share of blocks to skip, in [0, 1); needs a calibrated model.
            Takes the place of a constant `threshold_scale_factor` that was set before.
        threshold_scale_factor: BLASST, lambda times the number of keys; 0 never skips.
        max_dropped_mass: budget eps: at most `eps / (1 + eps)` of a row's softmax mass is dropped.
        level: BSFA's k, one of the calibrated levels.
        backend: one of `available_backends()`, or "auto" (the default at first).
        min_length: requests with fewer keys run dense.

    Each number by phase is one for both phases, or `{"prefill": x, "decode": y}`; a phase that is
    left out stays as it is.

    Returns:
        The settings that now hold.

    Raises:
        ValueError: a value is out of its range, the method lacks its calibration, or the model's
            attention cannot be reached; the message names what was expected and what was got.
    """
    pretrained = pretrained_model(model)
    _check_reachable(pretrained)
    if isinstance(method, SparseAttentionConfig):
        config = method
    elif method is None or method in METHOD_NAMES:
        config = _present(pretrained, method, dense=_never_skips(threshold_scale_factor))
    else:
        valid = ", ".join(repr(name) for name in get_args(MethodName))
        raise ValueError(f"method: expected one of {valid} or a config, got {method!r}")
    if backend not in (None, "auto", *BACKENDS):
        raise ValueError(
            f"backend: expected one of {', '.join(['auto', *BACKENDS])}, got {backend!r}"
        )
    config = updated(
        config,
        target_sparsity=target_sparsity,
        threshold_scale_factor=threshold_scale_factor,
        max_dropped_mass=max_dropped_mass,
        level=level,
        backend=backend,
        min_length=min_length,
    )
    _apply(model, pretrained, config)
    return config


def load_thresholds(
    model: nn.Module, repo_or_folder: str | Path, revision: str | None = None, **download: Any
) -> SparseAttentionConfig:
    """Gives `model` the settings and thresholds of a local folder or a Hub repository.

    Args:
        model: a transformers model, plain or wrapped (PEFT).
        repo_or_folder: where they are: a model, an adapter, or the thresholds alone.
        revision: branch, tag or commit of the repository.
        download: more of what `huggingface_hub.hf_hub_download` takes: `token`, `cache_dir`, ...

    Raises:
        FileNotFoundError, ValueError: nothing is there, it is damaged, or another model's.
    """
    config = SparseAttentionConfig.from_pretrained(repo_or_folder, revision=revision, **download)
    check_same_model(model, config, str(repo_or_folder))
    return set_sparse_attention(model, config)


def check_same_model(model: nn.Module, config: SparseAttentionConfig, source: str) -> None:
    """Refuses tables that were calibrated on another model than `model`.

    Raises:
        ValueError: names `source`, where `config` is from, and what differs.
    """
    if config.tables is None:
        return
    expected = ModelFingerprint.of(pretrained_model(model).config)
    if differences := expected.differences(config.tables.fingerprint):
        raise ValueError(
            f"{source}: expected thresholds of this model, got another's ({'; '.join(differences)})"
        )


def present_config(model: nn.Module) -> SparseAttentionConfig:
    """The settings that `model` has now: set, or from its config.json; else the defaults."""
    return _present(pretrained_model(model), None, dense=False)


def running_method(model: nn.Module) -> str | None:
    """The name of the attention implementation that `model` decodes text with."""
    name: str | None = pretrained_model(model).config.get_text_config()._attn_implementation
    return name


def pretrained_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers (PEFT, DDP): the outermost one.

    Raises:
        TypeError: there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")


def _check_reachable(model: PreTrainedModel) -> None:
    name = type(model).__name__
    text = _text_model(model)
    if not all(x._can_set_attn_implementation() for x in {model, text}):
        raise ValueError(f"model: {foreign_message(name)}")
    present = getattr(model.config, CONFIG_KEY, None)
    if present is not None and not is_ours(present):
        raise ValueError(
            f"model: {name} uses the config key {CONFIG_KEY!r} for a sparse attention of its own, "
            "so ours cannot be kept there"
        )


def _text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a composite model that decodes text; the model itself if it is not composite."""
    text_config = model.config.get_text_config()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config is text_config:
            return module
    return model


def _present(
    model: PreTrainedModel, method: MethodName | None, *, dense: bool
) -> SparseAttentionConfig:
    """The settings the model has now, under `method` if that is given, else the one that runs.

    Bad ones do not keep a user from running `dense`.
    """
    text_config = model.config.get_text_config()
    if method is None and text_config._attn_implementation in METHODS:
        method = text_config._attn_implementation
    for module in model.modules():
        settings = getattr(module, ATTRIBUTE, None)
        if isinstance(settings, LayerSettings):
            return replace(settings.config, method=method or settings.config.method)
    try:
        kept = SparseAttentionConfig.from_model_config(model.config)
        kept = kept or SparseAttentionConfig.from_model_config(text_config)
    except ValueError as error:
        if not dense:
            raise
        logger.warning(
            "attention runs dense, as asked; the model's own settings are bad: %s", error
        )
        return SparseAttentionConfig()
    kept = kept or SparseAttentionConfig()
    return replace(kept, method=method or kept.method)


def _never_skips(factor: ByPhase) -> bool:
    """Whether a `threshold_scale_factor` given by the user rules out all skipping."""
    return merged(None, factor) == dict.fromkeys(PHASES, 0)


def _apply(model: nn.Module, pretrained: PreTrainedModel, config: SparseAttentionConfig) -> None:
    _own_config(model, pretrained)
    text = pretrained.config.get_text_config()
    if text is pretrained.config:
        pretrained.set_attn_implementation(config.method)
    else:  # vision towers and the like keep what they have: nothing is calibrated for them
        pretrained.set_attn_implementation({_key_of(pretrained.config, text): config.method})
    if text._attn_implementation != config.method:
        raise ValueError(f"model: {foreign_message(type(pretrained).__name__)}")
    run_with(pretrained, config)
    for owner in (pretrained.config, text):
        setattr(owner, CONFIG_KEY, config.to_dict())
    for saved in {model, pretrained}:
        keep_on_save(saved, config)
    announce(config)


def run_with(model: nn.Module, config: SparseAttentionConfig) -> None:
    """Lets `model` run with `config` from now on, without keeping it.

    `save_pretrained` still writes what `set_sparse_attention` was given last: for settings that
    change from step to step.

    Args:
        model: has our attention already, under the method of `config`.
        config: as `set_sparse_attention` or `updated` returned it.
    """
    pretrained = pretrained_model(model)
    for name, module in pretrained.named_modules():
        setattr(module, ATTRIBUTE, LayerSettings.of(module, config, name=name))
    method = METHODS[config.method]
    for device in {p.device for p in pretrained.parameters() if p.device.type != "meta"}:
        for geometry in method.geometries(config):
            method.prepare(config, device, geometry)


def _key_of(config: Any, sub_config: Any) -> str:
    for key in config.sub_configs:
        if getattr(config, key, None) is sub_config:
            return str(key)
    raise ValueError(f"model: expected {type(config).__name__} to hold its text config, found none")


def _own_config(model: nn.Module, pretrained: PreTrainedModel) -> None:
    """Gives the model its own copy of its config: models built from one config object share it."""
    if getattr(pretrained, "_sparse_attention_owns_config", False):
        return
    mine = copy.deepcopy(pretrained.config)
    copies = {id(pretrained.config): mine}
    pairs = [(pretrained.config, mine)]
    while pairs:
        old, new = pairs.pop()
        for key in getattr(old, "sub_configs", {}):
            if getattr(old, key, None) is not None:
                pairs.append((getattr(old, key), getattr(new, key)))
                copies[id(getattr(old, key))] = getattr(new, key)
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if id(value) in copies:
                setattr(module, key, copies[id(value)])
    pretrained._sparse_attention_owns_config = True
