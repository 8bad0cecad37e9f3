"""What a training run under sparsity refuses, before its first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from torch import nn

from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.control import check_same_model, pretrained_model, running_method
from hf_sparse_attention.methods import METHODS
from hf_sparse_attention.types import PHASES

Quantity = Literal["target_sparsity", "threshold_scale_factor", "level"]


def check_goal(**given: Any) -> tuple[Quantity, Any]:
    """What the schedule ramps, and that at full strength: the one of `given` that is not None.

    Raises:
        ValueError: none is given, or several, or one out of its range.
    """
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(
            f"expected exactly one of {', '.join(given)}, got {', '.join(named) or 'none'}"
        )
    quantity = cast(Quantity, named[0])
    full = given[quantity]
    if quantity == "level":
        if isinstance(full, bool) or not isinstance(full, int) or full < 1:
            raise ValueError(f"level: expected a positive integer, got {full!r}")
        return quantity, full
    by_phase = dict(full) if isinstance(full, Mapping) else {"prefill": full}
    if not by_phase or (unknown := sorted(set(by_phase) - set(PHASES))):
        raise ValueError(f"{quantity}: expected phases {list(PHASES)}, got {unknown or 'none'}")
    for value in by_phase.values():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0.0 <= value < (
            1.0 if quantity == "target_sparsity" else float("inf")
        ):
            wanted = "[0, 1)" if quantity == "target_sparsity" else "[0, inf)"
            raise ValueError(f"{quantity}: expected values in {wanted}, got {value!r}")
    return quantity, by_phase if isinstance(full, Mapping) else full


def check_run(
    model: nn.Module, config: SparseAttentionConfig, quantity: Quantity, full: Any
) -> None:
    """Refuses a model, settings and a goal that do not go together.

    Args:
        model: what is going to be trained.
        config: the settings it will be trained with.
        quantity: what the schedule ramps.
        full: that, at full strength.

    Raises:
        ValueError: names what was expected and what was found.
    """
    running = running_method(model)
    if running not in METHODS:
        raise ValueError(
            f"model: expected attn_implementation {' or '.join(map(repr, METHODS))}, got "
            f"{running!r}; load it with one of these, or call set_sparse_attention"
        )
    if config.method != running:
        raise ValueError(
            f"config: expected settings for {running!r}, which the model runs, got some for "
            f"{config.method!r}"
        )
    if (quantity == "level") != (running == "bsfa"):
        wanted = "level" if running == "bsfa" else "target_sparsity or threshold_scale_factor"
        raise ValueError(f"{running}: expected {wanted} to be scheduled, got {quantity}")
    check_same_model(model, config, "config")
    METHODS[running].check(config)
    if quantity == "level" and full not in config.levels:
        raise ValueError(f"level: expected one of {config.levels}, got {full!r}")
    dropout = max(_attention_dropouts(model), default=0.0)
    if dropout > 0:
        raise ValueError(
            f"attention_dropout: expected 0.0, since attention with dropout runs dense, got "
            f"{dropout}; load the model with attention_dropout=0.0"
        )


def _attention_dropouts(model: nn.Module) -> list[float]:
    found = (getattr(module, "attention_dropout", None) for module in model.modules())
    return [x for x in found if isinstance(x, float)]


def excluded_modules(model: nn.Module, layers: Sequence[int]) -> list[str]:
    """The names of the attention modules of `layers`.

    Raises:
        ValueError: there is no attention with such a layer number.
    """
    found: dict[int, list[str]] = {}
    for name, module in pretrained_model(model).named_modules():
        number = getattr(module, "layer_idx", None)
        if number is not None and hasattr(module, "is_causal"):
            found.setdefault(int(number), []).append(name)
    if missing := sorted(set(layers) - set(found)):
        raise ValueError(f"exclude_layers: expected numbers among {sorted(found)}, got {missing}")
    return [name for layer in layers for name in found[layer]]
