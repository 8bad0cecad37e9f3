"""Several linear layers of one input as one matrix product, with the weight laid out for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class PackedLinear:
    """`nn.Linear` layers side by side, for inference: a copy of their weights.

    oneDNN lays the weight out beforehand where it can, as Inductor's freezing does; else the plain
    product runs. The sums are the layers' own, in another order at most.

    Args:
        layers: with one input size, all on the CPU and of one dtype, all with a bias or none.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        with torch.no_grad():
            weight = torch.cat([layer.weight.detach() for layer in layers])
            biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.is_packed = _can_pack(weight.dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.is_packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., inputs]` to `[..., outputs of all layers]`."""
        if not self.is_packed:
            return linear(x, self.weight, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


def _can_pack(dtype: torch.dtype) -> bool:
    """Whether torch's oneDNN has the op, and this machine the instructions."""
    if not (torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
