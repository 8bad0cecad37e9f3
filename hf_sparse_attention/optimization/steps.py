"""The steps that `optimize_for_cpu` tries, one after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hf_sparse_attention.backends import available_backends
from hf_sparse_attention.control import (
    present_config,
    pretrained_model,
    running_method,
    set_sparse_attention,
)
from hf_sparse_attention.fusion import fuse_attention, fused_modules
from hf_sparse_attention.methods import METHODS
from hf_sparse_attention.optimization import cache, machine
from hf_sparse_attention.optimization.linear import (
    Int8Linear,
    ManyRows,
    PrepackedLinear,
    compiled_dynamic_int8,
    dequantized,
    linear_layers,
    put,
)

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "fp32", "bf16", "int8"]


class LeftOut(Exception):
    """A step has nothing to do, or (`impossible`) cannot be taken; the message says why."""

    def __init__(self, reason: str, impossible: bool = False) -> None:
        super().__init__(reason)
        self.impossible = impossible


@dataclass(frozen=True)
class Step:
    """One change of a model.

    Args:
        name: for the report.
        apply: makes the change and says what it was.
        gain: it is kept if the model's time falls at least by this factor.
        asked: the user named it: kept whatever it gains, and an error if it cannot be.
    """

    name: str
    apply: Callable[[Any], str]
    gain: float = 1.05
    asked: bool = False


def steps_for(model: nn.Module, dtype: Dtype, threads: int | None) -> list[Step]:
    """What to try, in order."""
    steps = [Step("threads", lambda _: set_threads(threads), asked=threads is not None)]
    if dtype == "fp32":
        steps.append(Step("float32", lambda m: convert(m, torch.float32), asked=True))
    else:
        steps.append(Step("bfloat16", lambda m: convert(m, torch.bfloat16), asked=dtype != "auto"))
    # It costs nothing: kept unless it is slower.
    steps.append(Step("growing cache", growing_cache, gain=0.97))
    if running_method(model) in METHODS:
        steps.append(Step("attention as set", keep_attention))
    elif getattr(pretrained_model(model).config, "sparse_attention_config", None):
        steps.append(Step("attention as calibrated", calibrated_attention))
    else:
        steps.append(Step("attention, never skipping", exact_attention))
        steps.append(Step("attention within a budget", budget_attention))
    steps.append(Step("fused projections", fuse))
    if dtype == "int8":
        steps.append(Step("int8 weights", quantize_weights, asked=True))
        steps.append(Step("int8 products in prefill", quantize_prefill))
    steps.append(Step("prepacked weights", pack_weights))
    return steps


def set_threads(threads: int | None) -> str:
    """Torch's number of threads: `threads`, or the cores there are."""
    before, wanted = torch.get_num_threads(), threads or machine.usable_cores()
    if wanted == before:
        raise LeftOut(f"{before} already, one for each physical core")
    torch.set_num_threads(wanted)
    return f"{wanted} in place of {before}"


def convert(model: nn.Module, dtype: torch.dtype) -> str:
    """Parameters to `dtype`, as `from_pretrained(dtype=...)` has them; buffers keep theirs."""
    if dtype == torch.bfloat16 and (lacks := machine.lacks_bf16()):
        raise LeftOut(lacks, impossible=True)
    kept = _kept_in_float32(model)
    found: dict[torch.dtype, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype == dtype or any(part in kept for part in name.split(".")):
            continue
        found[parameter.dtype] = found.get(parameter.dtype, 0) + 1
        parameter.data = parameter.data.to(dtype)
    if not found:
        raise LeftOut(f"the weights are {str(dtype)[6:]} already")
    config = pretrained_model(model).config
    for each in (config, config.get_text_config()):
        each.dtype = dtype
    told = ", ".join(f"{n} tensors from {str(old)[6:]}" for old, n in found.items())
    return f"{told}; rotary frequencies stay as they are"


def growing_cache(model: nn.Module) -> str:
    """A cache that is not copied for each token."""
    pretrained = pretrained_model(model)
    pretrained.register_forward_pre_hook(cache.before_forward, with_kwargs=True)
    return "keys and values are appended in place; transformers' dynamic cache copies all of them"


def keep_attention(_: nn.Module) -> str:
    """Nothing: the user has chosen."""
    raise LeftOut("the model runs this package's attention already; its settings are kept")


def calibrated_attention(model: nn.Module) -> str:
    """What config.json says."""
    config = _with_kernel(lambda: set_sparse_attention(model, present_config(model)))
    return f"{config.method} with the model's own thresholds"


def exact_attention(model: nn.Module) -> str:
    """Our kernel, skipping nothing."""
    _with_kernel(lambda: set_sparse_attention(model, "blasst", threshold_scale_factor=0.0))
    return "our kernel, exact: the model is not calibrated"


def budget_attention(model: nn.Module) -> str:
    """What an uncalibrated model runs: a budget for the softmax mass that is dropped."""
    _with_kernel(lambda: set_sparse_attention(model, type(present_config(model))()))
    return "skipping within the default max_dropped_mass; `calibrate` finds thresholds that do more"


def fuse(model: nn.Module) -> str:
    """Fewer passes around attention."""
    if fused_modules(model):
        raise LeftOut("the model runs fused already")
    _with_kernel(lambda: None)
    names = fuse_attention(model)
    if not names:
        raise LeftOut("fuse_attention does not know this model's attention")
    return (
        f"Q, K and V as one prepacked product, and the rotary embedding in one pass: {len(names)}"
    )


def pack_weights(model: nn.Module) -> str:
    """Linear layers with oneDNN's own layout."""
    if not torch._C._has_mkldnn:
        raise LeftOut("this torch has no oneDNN")
    layers = linear_layers(model)
    if not layers:
        raise LeftOut("no linear layer is left in floating point")
    for name, layer in layers.items():
        put(model, name, PrepackedLinear(layer))
    return f"{len(layers)} linear layers in oneDNN's layout"


def quantize_weights(model: nn.Module) -> str:
    """Linear layers with int8 weights."""
    if lacks := machine.lacks_int8():
        raise LeftOut(lacks)
    layers = linear_layers(model)
    fit = {name: layer for name, layer in layers.items() if Int8Linear.is_fit(layer)}
    left = len(layers) - len(fit)
    for name, layer in fit.items():
        put(model, name, Int8Linear(layer, dequantized))
    if not fit:
        raise LeftOut(
            f"none of the {left} linear layers has a size that the int8 kernel takes",
            impossible=True,
        )
    return f"{len(fit)} linear layers; {left} of other sizes stay bfloat16"


def quantize_prefill(model: nn.Module) -> str:
    """Int8 products for many rows, too."""
    layers = [layer for layer in model.modules() if isinstance(layer, Int8Linear)]
    many: ManyRows = compiled_dynamic_int8()
    if not layers:
        raise LeftOut("no layer has int8 weights")
    try:
        # Sizes that differ, or the compiler takes equal ones for always equal.
        rows, weight = torch.zeros(40, 192), torch.zeros(80, 192, dtype=torch.int8)
        many(rows.bfloat16(), weight, torch.zeros(80).bfloat16())
    except Exception as error:  # whatever a compiler that is not there may raise
        raise LeftOut(f"Inductor cannot compile: {str(error).strip().splitlines()[0]}") from error
    for layer in layers:
        layer.many_rows = many
    return "each token rounded to its own scale, one kernel compiled for all sizes"


def _with_kernel(change: Callable[[], Any]) -> Any:
    """The result of `change`; left out where there is no kernel or no way to the attention."""
    lacks = available_backends().get("cpu", "no compiled CPU kernel")
    if lacks is not None:
        raise LeftOut(lacks)
    try:
        return change()
    except ValueError as error:
        raise LeftOut(str(error)) from error


def _kept_in_float32(model: nn.Module) -> set[str]:
    """Names of submodules whose weights transformers never converts."""
    pretrained = pretrained_model(model)
    names: set[str] = set()
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        names |= set(getattr(pretrained, attribute, None) or ())
    return names
