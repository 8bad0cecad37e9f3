"""The kernels in Triton, for GPUs; `kernel.py` says where they are looked for.

Under TRITON_INTERPRET=1, set before Triton is imported, they also take CPU tensors: far too slow
for use, so "auto" never picks them there, but enough to test them without a GPU.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from hf_sparse_attention.backends import kernel
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

NAME = "triton"
GEOMETRIES: tuple[str, ...] | None = ("64x64", "64x128")
PREFERRED = ("64x64", "64x128")  # smaller blocks: more of them can be skipped

MAX_HEAD_SIZE = 256
MAX_HEAD_SIZE_FLOAT32 = 128  # larger blocks do not fit into a GPU's shared memory
# There are up to 65535 programs along the second and third dimension of a launch.
_MAX_BATCH, _MAX_HEADS = 65535, 8191


def is_interpreted() -> bool:
    """Whether Triton was told to interpret kernels instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


# torch.compile must not trace the loading: it runs it once and takes the result for granted.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> str | None:
    """Why this machine cannot run the backend, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not (torch.cuda.is_available() or torch.xpu.is_available() or is_interpreted()):
        return "torch finds no GPU"
    found = kernel.load("universal")
    if not isinstance(found, str):
        return None
    return f"no Triton kernels: {found}. In a checkout, run `python kernel_hub/build.py`"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _namespace() -> str:
    return kernel.namespace("universal")


def supports(call: AttentionCall, rule: SkipRule, geometry: BlockGeometry) -> str | None:
    """Why this call cannot be served, or None."""
    device = call.q.device.type
    if device == "cpu" and not is_interpreted():
        return "q lies on the CPU, and TRITON_INTERPRET is not 1"
    if device not in ("cuda", "xpu", "cpu"):
        return f"q lies on {device}, not on a GPU that Triton compiles for"
    if call.q.shape[0] > _MAX_BATCH or call.q.shape[1] > _MAX_HEADS:
        return f"launched are batches up to {_MAX_BATCH}, and up to {_MAX_HEADS} heads"
    is_float32 = torch.float32 in (call.q.dtype, call.k.dtype, call.v.dtype)
    if is_float32 and not is_interpreted():
        return kernel.unserved(call, MAX_HEAD_SIZE_FLOAT32)
    return kernel.unserved(call, MAX_HEAD_SIZE)


run = kernel.runner(NAME, _namespace)
append_int8_keys = kernel.appender(_namespace)
