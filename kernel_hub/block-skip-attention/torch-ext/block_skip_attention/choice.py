"""Which kernels serve a call: the variant's own, or Triton's for what those in CUDA C++ do not.

The variant for CUDA carries the Triton kernels too, as ops of the same schema in a namespace of
their own: they take float32, any scale, and larger blocks and groups.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from . import _ops

logger = logging.getLogger(__name__)

#: The Triton kernels' ops, if this variant has them beside its own; and what they are called.
triton_ops: Any = getattr(_ops, "triton_ops", None)

_DECODE_MAX_QUERIES = 8
_MAX_GROUP = 16  # decode in CUDA: the heads of a group are the rows of one product
_SHARED_BYTES_WIDE = 131584  # what blocks of 128 keys take at head sizes above 128
_said: set[str] = set()


def triton_op_name(op_name: str) -> str:
    """The full name of an op of `triton_ops`."""
    return _ops.add_op_namespace_prefix("").removesuffix("::") + f"_triton::{op_name}"


def ops_for(q: Tensor, k: Tensor, v: Tensor, scale: float, block_q: int, block_k: int) -> Any:
    """The ops whose `forward` serves such a call.

    Raises:
        ValueError: neither kernels do.
    """
    reason = _not_in_cuda(q, k, v, scale, block_q, block_k)
    if reason is None:
        return _ops.ops
    other = "it is not installed"
    if triton_ops is not None:
        other = _ops.triton_kernels.refusal(q, v, block_q, block_k)
    if other is not None:
        raise ValueError(
            f"block_skip_attention: the kernels in CUDA do not take {reason}, nor does Triton: "
            f"{other}"
        )
    say_once(f"the kernels in CUDA do not take {reason}: Triton's run")
    return triton_ops


def _not_in_cuda(
    q: Tensor, k: Tensor, v: Tensor, scale: float, block_q: int, block_k: int
) -> str | None:
    """What the compiled kernels for CUDA would refuse; None if nothing, or if this has others."""
    if getattr(_ops, "KIND", "") != "cuda":
        return None
    sizes = (q.shape[-1], v.shape[-1])
    decode = q.shape[2] <= _DECODE_MAX_QUERIES and k.shape[2] > q.shape[2]
    group = q.shape[1] // max(k.shape[1], 1)
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"{q.dtype}"
    if max(sizes) > 256 or any(size % 8 for size in sizes):
        return f"head sizes {sizes[0]} and {sizes[1]}"
    if block_k not in (64, 128) or (not decode and block_q != 64):
        return f"blocks of {block_q}x{block_k}"
    if block_k == 128 and max(sizes) > 128:
        compiled = sizes[0] <= 192 and sizes[1] <= 128
        if not compiled or _shared_bytes(q.device) < _SHARED_BYTES_WIDE:
            return f"blocks of 128 keys at head sizes {sizes[0]} and {sizes[1]}"
    if decode and group > _MAX_GROUP:
        return f"{group} query heads to a key/value head in decode"
    if scale <= 0:
        return f"a scale of {scale}"
    return None


@torch.compiler.assume_constant_result
def _shared_bytes(device: torch.device) -> int:
    """The shared memory that a thread block may have; emulated, that of an A100."""
    if device.type != "cuda":
        return 163 << 10
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 99 << 10)


@torch.compiler.assume_constant_result
def say_once(message: str) -> None:
    """Logs a warning, once in this process."""
    if message not in _said:
        _said.add(message)
        logger.warning("block-skip-attention: %s", message)
