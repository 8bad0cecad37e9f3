"""Linear layers for inference on the CPU: weights prepacked for oneDNN, or in int8.

Both run operations of PyTorch that its compiler, Inductor, would choose for frozen weights; here
they need no compilation of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hf_sparse_attention.fusion import fused_modules
from hf_sparse_attention.packed_linear import PackedLinear

#: Up to so many rows int8 weights are read as they are: fast while reading them is what takes time.
FEW_ROWS = 8
#: The int8 kernel for few rows reads whole vectors: it crashes on other sizes (torch 2.13).
ROW_MULTIPLE, COLUMN_MULTIPLE = 16, 64

ManyRows = Callable[[Tensor, Tensor, Tensor], Tensor]


class InferenceLinear(nn.Module):
    """What the two kinds have in common: shape, bias, and that there is no way back to training.

    Args:
        layer: the layer whose place it takes.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = layer.weight.dtype
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), False)
        self.training = layer.training

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        moved = fn(torch.empty(0, dtype=self.dtype))
        if moved.device.type != "cpu" or moved.dtype != self.dtype:
            raise RuntimeError(
                f"{type(self).__name__}: expected to stay {self.dtype} on the CPU, as "
                f"optimize_for_cpu left it, got a move to {moved.dtype} on {moved.device}; load "
                "the model anew"
            )
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _refuse_grad(self, x: Tensor) -> None:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                f"{type(self).__name__}: expected inference, got an input that requires gradients; "
                "a model is not trainable after optimize_for_cpu"
            )


class PrepackedLinear(InferenceLinear):
    """A linear layer whose weight lies in oneDNN's own layout. The result is a linear layer's.

    In the state dict it is an ordinary linear layer, so that it can be saved.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self._product = PackedLinear([layer])

    @property
    def weight(self) -> Tensor:
        """`[out, in]`, unpacked each time it is asked for."""
        weight = self._product.weight
        return weight.to_dense() if self._product.is_packed else weight

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`."""
        self._refuse_grad(x)
        return self._product(x)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def __deepcopy__(self, memo: dict[int, Any]) -> PrepackedLinear:
        plain = nn.Linear(1, 1, self.bias is not None, dtype=self.dtype)
        plain.in_features, plain.out_features = self.in_features, self.out_features
        plain.weight = nn.Parameter(self.weight.clone(), False)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone(), False)
        memo[id(self)] = new = PrepackedLinear(plain)
        return new


class Int8Linear(InferenceLinear):
    """A linear layer with an int8 weight: one scale, `max |w| / 127`, for each output.

    Few rows (decode) are multiplied as they are. Many rows (prefill) are themselves rounded to
    int8, each row to its own scale, or the weight is multiplied out, as `many_rows` says.

    Args:
        layer: bfloat16, of a size that `is_fit` takes.
        many_rows: `dynamic_int8`, compiled; or `dequantized`.
    """

    int8: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear, many_rows: ManyRows) -> None:
        super().__init__(layer)
        weight = layer.weight.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        self.register_buffer("int8", (weight / scale[:, None]).round_().to(torch.int8), False)
        self.register_buffer("scale", scale.to(self.dtype), False)
        self.many_rows = many_rows

    @staticmethod
    def is_fit(layer: nn.Linear) -> bool:
        """Whether the kernels can take a layer of this size and dtype."""
        rows, columns = layer.weight.shape
        fits = rows % ROW_MULTIPLE == 0 and columns % COLUMN_MULTIPLE == 0
        return fits and layer.weight.dtype == torch.bfloat16

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`, rounded."""
        self._refuse_grad(x)
        rows = x.reshape(-1, self.in_features)
        if len(rows) <= FEW_ROWS:
            out = torch._weight_int8pack_mm(rows.contiguous(), self.int8, self.scale)
        else:
            out = self.many_rows(rows, self.int8, self.scale)
        if self.bias is not None:
            out = out + self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def _save_to_state_dict(self, *_: Any) -> None:
        raise RuntimeError(
            "optimize_for_cpu made the weights int8, in a form that no checkpoint knows: save the "
            "model before, or load it anew"
        )


def dequantized(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`x` `[rows, in]` times an int8 `weight` `[out, in]`, multiplied out first."""
    return linear(x, weight.to(x.dtype) * scale[:, None])


def dynamic_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The same in int8: each row of `x` is rounded to its own scale, `max |x| / 127`.

    Slow as it stands, for all the passes over `x`; compiled it is three.
    """
    own = (x.abs().amax(-1, keepdim=True).float() / 127).clamp_min(1e-12)
    rounded = (x.float() / own).round().to(torch.int8)
    product = torch._int_mm(rounded, weight.t())
    return (product.float() * own * scale.float()).to(x.dtype)


@cache
def compiled_dynamic_int8() -> ManyRows:
    """`dynamic_int8`, compiled for all sizes at once (once a process; some ten seconds)."""
    return torch.compile(dynamic_int8, dynamic=True, fullgraph=True)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The plain linear layers of `model`, by name, but those that run fused (`fuse_attention`)."""
    fused = {id(x) for name in fused_modules(model) for x in model.get_submodule(name).children()}
    return {
        name: x for name, x in model.named_modules() if type(x) is nn.Linear and id(x) not in fused
    }


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Makes `layer` the submodule of `model` called `name`."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)
