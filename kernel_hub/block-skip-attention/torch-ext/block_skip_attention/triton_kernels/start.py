"""Starting a kernel: with how many warps and pipeline stages, by its shape.

Chosen from what the compiler reports for sm_80 and sm_90 (registers, spills, shared memory), not by
trying them out while a model runs; none of it has been timed yet. Where a GPU has less shared
memory than those, fewer stages are taken.
"""

import functools

import torch
import triton
from triton.runtime.errors import OutOfResources

# What was found to fit, as how many choices did not: {(kernel, shape, device): number}.
_fitting: dict[tuple, int] = {}


def choices(
    kernel_name: str, head_size: int, element_size: int, block_k: int
) -> list[tuple[int, int]]:
    """(warps, stages) to try, the best first.

    Args:
        kernel_name: as its function is called.
        head_size: the larger one, rounded up to a power of two.
        element_size: bytes of an element of q.
        block_k: keys of a block.
    """
    if kernel_name == "decode_kernel":  # a stream of K and V: the more on its way the better
        return [(4, stages) for stages in (3, 2, 1)]
    wide = head_size * element_size * block_k > 128 * 2 * 64
    warps = 8 if wide else 4  # with 4, wide blocks spill
    stages = (1,) if element_size == 4 and head_size > 64 else (2, 1)
    return [(warps, n) for n in stages]


@functools.cache
def votes_by_scan(device: torch.device) -> bool:
    """Whether rows must vote with a scan, which costs a little, on this GPU.

    For compute capability 10 and 11, Triton 3.6 and 3.7 fail to compile what reduces a vector that
    a reduction made of a product; 3.5 and 3.8 do compile it.
    """
    if not triton.__version__.startswith(("3.6.", "3.7.")):
        return False
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device)[0] in (10, 11)


def start(kernel: triton.JITFunction, grid: tuple[int, int, int], *args, **shape) -> None:
    """Starts `kernel`, whose first argument is q, on `grid`.

    Raises:
        ValueError: a block of this shape does not fit on this GPU.
    """
    q = args[0]
    head_size = max(shape["PADDED_HEAD"], shape["PADDED_VALUE"])
    block_k = shape["BLOCK_K"]
    options = choices(kernel.fn.__name__, head_size, q.element_size(), block_k)
    key = (kernel.fn.__name__, head_size, q.dtype, block_k, shape.get("BLOCK_Q"), q.device)
    for i in range(_fitting.get(key, 0), len(options)):
        warps, stages = options[i]
        try:
            kernel[grid](*args, **shape, num_warps=warps, num_stages=stages)
        except OutOfResources as error:
            reason = str(error)
            continue
        _fitting[key] = i
        return
    raise ValueError(
        f"block_skip_attention (Triton): blocks of {block_k} keys at head size {head_size} in "
        f"{q.dtype} do not fit on {torch.cuda.get_device_name(q.device)}: {reason}"
    )
