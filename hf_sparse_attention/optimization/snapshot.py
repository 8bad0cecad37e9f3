"""A model as it is now, to go back to."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


class Snapshot:
    """What a step may change: modules, their classes and attributes, weights by reference, configs.

    Weights are not copied: a step puts new tensors in the place of old ones and writes to none.

    Args:
        model: any module; configs are those that its modules hold.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (module, type(module), _copied(vars(module))) for module in model.modules()
        ]
        tensors = [*model.parameters(), *model.buffers()]
        self._tensors = [(tensor, tensor.data, tensor.requires_grad) for tensor in tensors]
        configs = {
            id(value): value
            for module in model.modules()
            for value in vars(module).values()
            if isinstance(value, PreTrainedConfig)
        }
        self._configs = [(config, dict(vars(config))) for config in configs.values()]

    def restore(self) -> None:
        """Makes the model what it was."""
        for tensor, data, requires_grad in self._tensors:
            tensor.data = data
            tensor.requires_grad_(requires_grad)
        for module, kind, attributes in self._modules:
            module.__class__ = kind
            _set(module, attributes)
        for config, attributes in self._configs:
            _set(config, attributes)


def _set(holder: Any, attributes: dict[str, Any]) -> None:
    vars(holder).clear()
    vars(holder).update(_copied(attributes))


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes, with containers (submodules, parameters, hooks) copied one level deep."""
    return {
        name: copy.copy(value) if isinstance(value, (dict, list, set)) else value
        for name, value in attributes.items()
    }
