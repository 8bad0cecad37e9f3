"""Lets observations watch a model's attention, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.settings import ATTRIBUTE as SETTINGS
from hf_sparse_attention.settings import LayerSettings
from hf_sparse_attention.types import PHASES, AttentionCall

OBSERVER = "_sparse_attention_observer"


class Observer(Protocol):
    """What attention calls can be handed to, such as `Observations`."""

    def observe(self, layer: int, call: AttentionCall) -> Tensor | None:
        """Looks at `call` of layer number `layer`.

        Returns:
            The call's output `[B, Lq, Hq, Dv]`, if it came of looking; None has it computed, dense.
        """


@contextmanager
def attached(model: Any, observer: Observer) -> Iterator[None]:
    """`model` in eval mode, its attention ours, dense, and watched; all as it was afterwards.

    Args:
        model: a transformers model with causal attention.
        observer: what its attentions are handed to.

    Raises:
        TypeError: it is not a transformers model.
    """
    # Any method serves: observed attention is dense. A budget needs no calibration and no comment.
    exact = SparseAttentionConfig(method="blasst", max_dropped_mass=dict.fromkeys(PHASES, 0.0))
    with running(model, exact):
        try:
            for module in model.modules():
                vars(module)[OBSERVER] = observer
            yield
        finally:
            for module in model.modules():
                vars(module).pop(OBSERVER, None)


@contextmanager
def running(model: Any, config: SparseAttentionConfig) -> Iterator[None]:
    """`model` in eval mode with the settings `config`; all as it was afterwards.

    Raises:
        TypeError: it is not a transformers model.
    """
    own = getattr(model, "config", None)
    if own is None or not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    before = {"": own._attn_implementation}
    for key in own.sub_configs:
        if getattr(own, key, None) is not None:
            before[key] = getattr(own, key)._attn_implementation
    training = model.training
    settings = {module: vars(module).get(SETTINGS) for module in model.modules()}
    try:
        model.set_attn_implementation(config.method)
        model.eval()
        for module in settings:
            vars(module)[SETTINGS] = LayerSettings.of(module, config)
        yield
    finally:
        for module, kept in settings.items():
            vars(module).pop(SETTINGS, None)
            if kept is not None:
                vars(module)[SETTINGS] = kept
        model.train(training)
        model.set_attn_implementation(before)
