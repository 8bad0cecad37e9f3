"""From tensors to launches: `backward` in Triton, with the same arguments as the compiled op."""

import math

import torch
import triton
from torch import Tensor

from .backward_kv import dkv_kernel
from .backward_q import dq_kernel
from .requests import DECODE_MAX_QUERIES, requests, strides
from .start import start


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    skips: Tensor,
    key_valid: Tensor | None,
    q_offset: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the sinks; see the compiled op."""
    batch, heads, q_len, head_size = q.shape
    kv_heads, kv_len, value_size = v.shape[1:]
    decode = q_len <= DECODE_MAX_QUERIES and kv_len > q_len
    request = requests(q, k, key_valid, q_offset)
    dout = dout.contiguous()
    delta = (dout.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
    if dlse is not None:
        delta -= dlse
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.zeros(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    tensors = (
        q,
        k,
        v,
        dout,
        lse,
        delta,
        skips.contiguous() if skips.numel() else None,
        None if key_valid is None else key_valid.contiguous(),
        request,
    )
    shape = dict(
        scale=scale,
        softcap=softcap,
        window=window,
        q_len=q_len,
        kv_len=kv_len,
        heads=heads,
        group=heads // kv_heads,
        n_votes=skips.shape[2] if skips.numel() else 0,
        skip_bytes=skips.shape[3] if skips.numel() else 0,
        HEAD_SIZE=head_size,
        VALUE_SIZE=value_size,
        PADDED_HEAD=max(16, triton.next_power_of_2(head_size)),
        PADDED_VALUE=max(16, triton.next_power_of_2(value_size)),
        BLOCK_Q=16 if decode else block_q,
        BLOCK_K=block_k,
        CAUSAL=causal,
        HAS_WINDOW=window > 0,
        HAS_SOFTCAP=softcap > 0,
        DECODE=decode,
        **strides("q", "bhld", q),
        **strides("k", "bhld", k),
        **strides("v", "bhld", v),
    )
    if q.numel() and k.numel():
        rows = triton.cdiv(q_len, shape["BLOCK_Q"])
        start(dq_kernel, (rows, heads, batch), *tensors, dq, **shape)
        columns = triton.cdiv(kv_len, block_k)
        start(dkv_kernel, (columns, kv_heads, batch), *tensors, dk, dv, **shape)
    dsinks = q.new_zeros(heads if sinks is not None else 0, dtype=torch.float32)
    if sinks is not None:
        # The sink's weight has no value, so its dP is 0.
        weight = (sinks[:, None] - lse).exp().masked_fill(lse == -math.inf, 0.0)
        dsinks = -(weight * delta).sum((0, 2))
    return dq, dk, dv, dsinks
