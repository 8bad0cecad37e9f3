"""The kernels in CUDA C++; `kernel.py` says where they are looked for.

They serve GPUs of compute capability 8.0 and newer, forward only: where gradients are wanted,
Triton's kernels do. For tests, a build for the CPU runs the same kernels thread by thread:
HF_SPARSE_ATTENTION_EMULATE=1, with `python kernel_hub/build.py --emulate`. On Hopper,
HF_SPARSE_ATTENTION_CUDA_LEVEL=sm_80 leaves the kernels made for it aside.
"""

from __future__ import annotations

import os

import torch

from hf_sparse_attention.backends import kernel
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

NAME = "cuda"
GEOMETRIES: tuple[str, ...] | None = ("64x64", "64x128")
PREFERRED = ("64x64", "64x128")  # smaller blocks: more of them can be skipped

MAX_HEAD_SIZE = 256
MAX_HEAD_SIZES_WIDE = (192, 128)  # of k and v with blocks of 128 keys
_SHARED_BYTES_WIDE = 131584  # what head sizes above 128 then take of a GPU's shared memory
MAX_GROUP = 16  # decode: the heads of a group are the rows of one tensor-core product
# There are up to 65535 thread blocks along the second and third dimension of a launch.
_MAX_BATCH, _MAX_HEADS = 65535, 8191
_OLDEST = (8, 0)


def is_emulated() -> bool:
    """Whether the kernels are to run on the CPU, for tests."""
    return os.environ.get("HF_SPARSE_ATTENTION_EMULATE", "") == "1"


def _variant() -> kernel.Variant:
    return "emulated" if is_emulated() else "cuda"


# torch.compile must not trace the loading: it runs it once and takes the result for granted.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> str | None:
    """Why this machine cannot run the backend, or None."""
    if not is_emulated():
        if not torch.cuda.is_available() or torch.version.cuda is None:
            return "torch finds no GPU with CUDA"
        newest = max(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
        if newest < _OLDEST:
            return f"expected compute capability 8.0 or newer, got {newest[0]}.{newest[1]}"
    found = kernel.load(_variant())
    if not isinstance(found, str):
        return None
    return (
        f"no compiled CUDA kernels: {found}. In a checkout, build them with "
        "`python kernel_hub/build.py --variant cuda` (needs nvcc)"
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _namespace() -> str:
    return kernel.namespace(_variant())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_old(index: int | None) -> bool:
    """Whether GPU `index`, or the current one, is too old."""
    return not is_emulated() and torch.cuda.get_device_capability(index) < _OLDEST


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _shared_bytes(index: int | None) -> int:
    """The shared memory that a thread block may have on GPU `index`, or the current one."""
    if is_emulated():
        return 163 << 10
    properties = torch.cuda.get_device_properties(index)
    least = 99 << 10  # of all GPUs that these kernels run on
    return int(getattr(properties, "shared_memory_per_block_optin", least))


def supports(call: AttentionCall, rule: SkipRule, geometry: BlockGeometry) -> str | None:
    """Why this call cannot be served, or None."""
    device = call.q.device
    if device.type != ("cpu" if is_emulated() else "cuda"):
        return f"q lies on {device.type}, not on a GPU with CUDA"
    if _is_old(device.index):
        return f"{device} is older than compute capability 8.0"
    if call.needs_grad:
        return "it has no backward; Triton's kernels do"
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        if x.dtype not in (torch.bfloat16, torch.float16):
            return f"{name} is {x.dtype}; bfloat16 and float16 are compiled"
    if not call.q.dtype == call.k.dtype == call.v.dtype:
        return "q, k and v differ in dtype"
    return _unserved_shape(call, geometry) or kernel.unserved(call, MAX_HEAD_SIZE)


def _unserved_shape(call: AttentionCall, geometry: BlockGeometry) -> str | None:
    sizes = (call.q.shape[-1], call.v.shape[-1])
    if any(size % 8 for size in sizes):
        return f"head sizes are compiled as multiples of 8, not {sizes[0]} and {sizes[1]}"
    if geometry.block_k == 128 and (
        sizes[0] > MAX_HEAD_SIZES_WIDE[0] or sizes[1] > MAX_HEAD_SIZES_WIDE[1]
    ):
        return "with blocks of 128 keys, head sizes are compiled up to 192, and 128 of v"
    if geometry.block_k == 128 and sizes[0] > 128:
        there = _shared_bytes(call.q.device.index)
        if there < _SHARED_BYTES_WIDE:
            return (
                f"with blocks of 128 keys, head sizes above 128 take {_SHARED_BYTES_WIDE} bytes of "
                f"shared memory, and this GPU has {there}"
            )
    if call.phase == "decode" and call.group > MAX_GROUP:
        return f"decode takes up to {MAX_GROUP} query heads to a key/value head, not {call.group}"
    if call.q.shape[0] > _MAX_BATCH or call.q.shape[1] > _MAX_HEADS:
        return f"launched are batches up to {_MAX_BATCH}, and up to {_MAX_HEADS} heads"
    if call.scale <= 0:
        return f"the scale must be positive, not {call.scale}"
    return None


run = kernel.runner(NAME, _namespace)
append_int8_keys = kernel.appender(_namespace)
