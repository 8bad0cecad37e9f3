"""The settings an attention module runs with, and where they come from.

They live on the modules, not on the model's config: two models made from one config object share
that object, and changing one must not change the other. A module without settings takes them from
its config (`sparse_attention_config` of a calibrated checkpoint) when it first runs, so that
`from_pretrained(repo, attn_implementation="blasst")` is enough.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hf_sparse_attention import sharding
from hf_sparse_attention.config import MethodName, SparseAttentionConfig
from hf_sparse_attention.methods import METHODS
from hf_sparse_attention.types import AttentionCall, BlockGeometry

logger = logging.getLogger(__name__)

#: Requests with fewer keys than this run dense unless `min_length` says otherwise: below it the
#: decisions cost more than a few skipped blocks save (docs/results.md, break-even).
DEFAULT_MIN_LENGTH = 256

#: Where the settings are kept on an attention module.
ATTRIBUTE = "_sparse_attention_settings"

_LAYER_IN_NAME = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class LayerSettings:
    """What one attention module runs with.

    Args:
        config: the model's settings; shared by its modules.
        layer: the layer's index, by which thresholds are found; None if the module has none.
        dense_reason: why this layer stays dense (`targets`, `ignore`), or None.
        geometries: the blocks that may run, the default first; the backend chooses among them.
        switched: the same under the other method, for a user who switches by name
            (`model.set_attn_implementation`) and back; made when it first runs.
        heads: query heads of the layer on all ranks together; None if its config does not say.
        shares: along which meshes the module's parameters are cut (`sharding.shares_of`).
    """

    config: SparseAttentionConfig
    layer: int | None
    dense_reason: str | None = None
    heads: int | None = None
    shares: tuple[sharding.Share, ...] = ()
    geometries: tuple[BlockGeometry, ...] = (BlockGeometry(),)
    switched: dict[str, LayerSettings] = field(default_factory=dict, repr=False, compare=False)

    @property
    def min_length(self) -> int:
        """Requests with fewer keys run dense."""
        least = self.config.min_length
        return DEFAULT_MIN_LENGTH if least is None else least

    @classmethod
    def of(
        cls,
        module: nn.Module,
        config: SparseAttentionConfig,
        *,
        name: str | None = None,
    ) -> LayerSettings:
        """The settings of `module`, which is called `name` in its model if that is known."""
        kind = type(module).__name__
        layer = getattr(module, "layer_idx", None)
        reason = None
        if config.targets and kind not in config.targets:
            reason = f"{kind} is not among the targets {', '.join(config.targets)}"
        elif _is_ignored(config.ignore, name, layer):
            reason = "the layer is on the config's ignore list"
        elif layer is None and (config.method == "bsfa" or config.granularity != "global"):
            reason = "the module has no layer index, by which thresholds are found"
        return cls(
            config,
            None if layer is None else int(layer),
            reason,
            geometries=tuple(METHODS[config.method].geometries(config)),
            heads=sharding.heads_in_all(module),
            shares=sharding.shares_of(module),
        )

    def first_head(self, heads: int) -> int:
        """The layer's number of the first of the `heads` query heads that this process computes.

        Raises:
            ValueError: thresholds differ by head, and which heads are here cannot be told.
        """
        first = sharding.first_head(self.shares, heads, self.heads)
        if first is None and self.config.tables is not None and sharding.is_distributed():
            raise ValueError(
                f"layer {self.layer}: expected all {self.heads} heads, or a share of them under a "
                f"tensor-parallel plan, got {heads} heads and projections cut as {self.shares} "
                "(rank, ranks); if the model was parallelised after set_sparse_attention, call "
                "that again"
            )
        return first or 0


def _is_ignored(ignore: list[str], name: str | None, layer: int | None) -> bool:
    """Whether the module called `name` is listed; without a name, its layer number decides."""
    if name is not None:
        return any(name == entry or name.endswith("." + entry) for entry in ignore)
    numbers = [_LAYER_IN_NAME.search("." + entry + ".") for entry in ignore]
    return layer is not None and any(n is not None and int(n[1]) == layer for n in numbers)


def settings_of(module: nn.Module, method: MethodName) -> LayerSettings:
    """The settings `module` runs `method` with; found and kept on its first forward."""
    settings = getattr(module, ATTRIBUTE, None)
    if isinstance(settings, LayerSettings):
        if settings.config.method == method:
            return settings
        if method in settings.switched:
            return settings.switched[method]
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{type(module).__name__}: expected its settings before it is compiled, found none; "
            f"call set_sparse_attention(model, {method!r}) or run one forward before torch.compile"
        )
    if isinstance(settings, LayerSettings):
        config = _switched(settings.config, method)
    else:
        config = config_for(getattr(module, "config", None), method)
    METHODS[method].check(config)
    announce(config)
    found = LayerSettings.of(module, config)
    if isinstance(settings, LayerSettings):
        settings.switched[method] = found
    else:
        setattr(module, ATTRIBUTE, found)
    return found


def _switched(config: SparseAttentionConfig, method: MethodName) -> SparseAttentionConfig:
    """`config` under another method; one object for all layers, kept with what belongs to it."""
    key = f"under {method}"
    if key not in config.prepared:
        config.prepared[key] = replace(config, method=method)
    switched: SparseAttentionConfig = config.prepared[key]
    return switched


def announce(config: SparseAttentionConfig) -> None:
    """Says, once a process, what the user of this config should know."""
    for note in METHODS[config.method].notes(config):
        if note not in _said:
            _said.add(note)
            logger.warning(note)


def warn_of_length(
    config: SparseAttentionConfig, geometry: BlockGeometry, call: AttentionCall
) -> None:
    """Says, once a process, that a request is far longer or shorter than those calibrated.

    A length that only a tensor knows (a static cache's) is not looked at: that would wait for it.
    """
    fit = config.fit(call.phase, geometry)
    if fit is None or call.q_offset is not None:
        return
    keys = min(call.k.shape[2], call.window or call.k.shape[2])
    if fit.covers_length(keys) or call.phase in (config.threshold_scale_factor or {}):
        return
    assert fit.lengths is not None
    side = "longer" if keys > fit.lengths[1] else "shorter"
    key = f"{side} {call.phase} than {fit.lengths} on {geometry.name}"
    if key not in _said:
        _said.add(key)
        logger.warning(
            "%s: a request of %d keys in %s is extrapolated: %s was calibrated from %d to %d keys",
            config.method,
            keys,
            call.phase,
            geometry.name,
            *fit.lengths,
        )


def config_for(model_config: Any, method: MethodName) -> SparseAttentionConfig:
    """The settings that a transformers config carries for `method`; without any, the defaults.

    The same config object gives the same settings object, so that its tables are read only once.
    """
    cached = _cache.get(id(model_config))
    data = getattr(model_config, "sparse_attention_config", None)
    if cached is not None and cached[0] is model_config and cached[1] == (method, repr(data)):
        return cached[2]
    found = None if model_config is None else SparseAttentionConfig.from_model_config(model_config)
    if found is None:
        found = SparseAttentionConfig(method=method)
    elif found.method != method:  # one calibration serves both
        found = replace(found, method=method)
    _cache.clear()  # one entry is enough: a model's layers ask one after the other
    _cache[id(model_config)] = (model_config, (method, repr(data)), found)
    return found


_said: set[str] = set()
_cache: dict[int, tuple[Any, tuple[str, str], SparseAttentionConfig]] = {}
