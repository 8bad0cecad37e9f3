"""What both directions tell the kernels of a call: its requests, and its strides."""

import torch
from torch import Tensor

DECODE_MAX_QUERIES = 8


def requests(
    q: Tensor, k: Tensor, key_valid: Tensor | None, q_offset: Tensor | None
) -> Tensor | None:
    """First valid key, end of the valid ones, column of query row 0: int32 `[B, 3]`; no sync.

    None where all keys are valid, and the last query sees the last of them.
    """
    if key_valid is None and q_offset is None:
        return None
    batch, q_len, kv_len = q.shape[0], q.shape[2], k.shape[2]
    request = torch.zeros((batch, 3), dtype=torch.int32, device=q.device)
    request[:, 1] = kv_len
    request[:, 2] = kv_len - q_len if q_offset is None else q_offset
    if key_valid is not None and kv_len:
        valid = key_valid.to(torch.int8)
        any_valid = valid.amax(1)
        request[:, 0] = valid.argmax(1) * any_valid
        request[:, 1] = (kv_len - valid.flip(1).argmax(1)) * any_valid
    return request


def strides(name: str, dims: str, x: Tensor | None) -> dict[str, int]:
    """`stride_qb` and so on; 0 where a dimension is broadcast or there is no tensor."""
    if x is None:
        return {f"stride_{name}{d}": 0 for d in dims}
    return {
        f"stride_{name}{d}": 0 if size == 1 else step
        for d, size, step in zip(dims, x.shape, x.stride(), strict=True)
    }
