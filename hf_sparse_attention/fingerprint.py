"""`ModelFingerprint`: what tells one model's thresholds from another's."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class ModelFingerprint:
    """What tells one model's thresholds from another's; None means unknown and matches anything.

    Args:
        architecture: transformers' `model_type`, for example `"llama"`.
        layers: decoder layers; heads: query heads; kv_heads: key/value heads; head_dim: D.
    """

    architecture: str | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None

    @classmethod
    def of(cls, config: Any) -> ModelFingerprint:
        """Reads a transformers config, or the dict that its config.json holds."""
        if isinstance(config, Mapping):
            read = config.get("text_config", config).get
        else:
            text = config.get_text_config() if hasattr(config, "get_text_config") else config
            read = functools.partial(_attribute, text)

        def get(name: str, otherwise: Any = None) -> Any:
            try:
                value = read(name)
            except RuntimeError:  # layers differ in it (Gemma 4), and the config refuses to choose
                return None
            return otherwise if value is None else value

        heads, width = get("num_attention_heads"), get("hidden_size")
        head_dim = get("head_dim", otherwise=width // heads if heads and width else None)
        return cls(
            architecture=get("model_type"),
            layers=get("num_hidden_layers"),
            heads=heads,
            kv_heads=get("num_key_value_heads") or heads,
            head_dim=head_dim,
        )

    def differences(self, other: ModelFingerprint) -> list[str]:
        """`"layers: expected 2, got 4"` for each field that both know and that differs."""
        found = []
        for name in (f.name for f in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None and theirs is not None and mine != theirs:
                found.append(f"{name}: expected {mine!r}, got {theirs!r}")
        return found


def _attribute(config: Any, name: str) -> Any:
    return getattr(config, name, None)
