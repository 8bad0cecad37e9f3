"""From tensors to launches: `forward` in Triton, with the same arguments as the compiled op.

An unpadded call costs a launch or two beside the kernels. Nothing waits for the GPU or looks at a
value there, and what is allocated depends on shapes only, so that a call can be captured in a CUDA
graph once it has run.
"""

import math

import torch
import triton
from torch import Tensor

from .decode import decode_kernel
from .join import join_kernel
from .prefill import prefill_kernel
from .prove import proved_blocks
from .requests import DECODE_MAX_QUERIES, requests, strides
from .rules import INTERPRETED
from .start import start, votes_by_scan

SINK_DIAGONAL = 1
# There are up to 65535 programs along the second and third dimension of a launch; in decode, the
# second one takes 8 queries of each head.
MAX_BATCH, MAX_HEADS = 65535, 8191


def refusal(q: Tensor, v: Tensor, block_q: int, block_k: int) -> str | None:
    """Why these inputs cannot be served, or None."""
    if q.device.type == "cpu" and not INTERPRETED.value:
        return "expected tensors on a GPU (or TRITON_INTERPRET=1, for tests), got cpu"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"expected float32, bfloat16 or float16, got {q.dtype}"
    largest = 128 if q.dtype == torch.float32 and not INTERPRETED.value else 256
    if max(q.shape[-1], v.shape[-1]) > largest:  # else blocks do not fit into shared memory
        sizes = f"{q.shape[-1]} and {v.shape[-1]}"
        return f"expected head sizes up to {largest}, got {sizes}, in {q.dtype}"
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block not in (16, 32, 64, 128):
            return f"{name}: expected 16, 32, 64 or 128, got {block}"
    if q.shape[0] > MAX_BATCH or q.shape[1] > MAX_HEADS:
        got = f"{q.shape[0]} and {q.shape[1]}"
        return f"expected at most {MAX_BATCH} requests and {MAX_HEADS} heads, got {got}"
    if q.shape[2] + v.shape[2] >= 2**31 - 1024:  # the kernels count them in 32 bits
        got = f"{q.shape[2]} and {v.shape[2]}"
        return f"expected fewer than 2^31 queries and keys together, got {got}"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_valid: Tensor | None,
    q_offset: Tensor | None,
    sinks: Tensor | None,
    log_lambda: Tensor | None,
    block_threshold: Tensor | None,
    max_dropped_mass: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    block_q: int,
    block_k: int,
    order: int,
    split_k: int,
    keep_sink: bool,
    return_skips: bool,
    return_dropped_mass: bool,
    int8_keys: Tensor | None = None,
    expected_sparsity: float = 0.5,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `block_skip_attention.forward`. `expected_sparsity` changes no result: unread."""
    if reason := refusal(q, v, block_q, block_k):
        raise ValueError(f"block_skip_attention (Triton): {reason}")
    q_len, kv_len = q.shape[2], k.shape[2]
    decode = q_len <= DECODE_MAX_QUERIES and kv_len > q_len
    request = requests(q, k, key_valid, q_offset)
    if key_valid is not None:
        key_valid = key_valid.contiguous()
    rule = (log_lambda, block_threshold, max_dropped_mass)
    shape = dict(
        scale=scale,
        softcap=softcap,
        window=window,
        q_len=q_len,
        kv_len=kv_len,
        HEAD_SIZE=q.shape[-1],
        VALUE_SIZE=v.shape[-1],
        PADDED_HEAD=max(16, triton.next_power_of_2(q.shape[-1])),
        PADDED_VALUE=max(16, triton.next_power_of_2(v.shape[-1])),
        BLOCK_K=block_k,
        ORDER=order,
        CAUSAL=causal,
        HAS_WINDOW=window > 0,
        HAS_SOFTCAP=softcap > 0,
        KEEP_SINK=keep_sink,
        WANTS_DROPPED=return_dropped_mass or max_dropped_mass is not None,
        **strides("q", "bhld", q),
        **strides("k", "bhld", k),
        **strides("v", "bhld", v),
        **strides("l", "bh", log_lambda),
        **strides("t", "bhr", block_threshold),
        **strides("e", "bh", max_dropped_mass),
    )
    args = (q, k, v, key_valid, request, sinks, rule, shape, return_skips, return_dropped_mass)
    if decode:
        return _decode(*args, split_k=split_k, int8_keys=int8_keys)
    return _prefill(*args, block_q=block_q)


def _prefill(
    q, k, v, key_valid, request, sinks, rule, shape, return_skips, return_dropped_mass, *, block_q
):
    batch, heads, q_len, _ = q.shape
    n_rows = triton.cdiv(q_len, block_q)
    n_blocks = triton.cdiv(k.shape[2], shape["BLOCK_K"])
    # Padding, and queries before the first key, leave rows that no program writes.
    written = request is None and 0 < q_len <= k.shape[2] and q.numel() > 0
    make = torch.empty if written else torch.zeros
    out = make((batch, q_len, heads, v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = make((batch, heads, q_len), dtype=torch.float32, device=q.device)
    if not written:
        lse.fill_(-math.inf)
    counts = make((batch, heads, n_rows, 2), dtype=torch.int32, device=q.device)
    skips = (
        q.new_zeros((batch, heads, n_rows, n_blocks), dtype=torch.int8) if return_skips else None
    )
    dropped = torch.zeros_like(lse) if shape["WANTS_DROPPED"] else None
    if q.numel() and k.numel():
        start(
            prefill_kernel,
            (n_rows, heads, batch),
            q,
            k,
            v,
            key_valid,
            request,
            sinks,
            *rule,
            out,
            lse,
            counts,
            skips,
            dropped,
            heads=heads,
            group=heads // k.shape[1],
            n_rows=n_rows,
            n_blocks=n_blocks,
            BLOCK_Q=block_q,
            BY_SCAN=votes_by_scan(q.device),
            **shape,
        )
    counts = counts.sum(2, dtype=torch.int64)
    return _results(out, lse, counts, skips, dropped, return_dropped_mass)


def _decode(
    q,
    k,
    v,
    key_valid,
    request,
    sinks,
    rule,
    shape,
    return_skips,
    return_dropped_mass,
    *,
    split_k,
    int8_keys,
):
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    group = heads // kv_heads
    block_k = shape["BLOCK_K"]
    n_blocks = triton.cdiv(kv_len, block_k)
    sink_diagonal = shape["ORDER"] == SINK_DIAGONAL
    split_blocks = max(1, split_k // block_k) if sink_diagonal else n_blocks
    n_splits = max(1, triton.cdiv(n_blocks, split_blocks))
    splits = None
    if key_valid is not None:  # which may have holes as large as a split
        splits = _splits(q_len, kv_len, key_valid, request, shape, n_splits, split_blocks)
    out = torch.empty((batch, q_len, heads, v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = q.new_empty((batch, heads, q_len), dtype=torch.float32)
    partial = (batch, heads, q_len, n_splits)
    acc = q.new_empty((*partial, v.shape[-1]), dtype=torch.float32)
    sums = q.new_empty((*partial, 4), dtype=torch.float32)
    counts = q.new_empty((batch, kv_heads, q_len, n_splits, 2), dtype=torch.int32)
    skips = (
        q.new_zeros((batch, kv_heads, q_len, n_blocks), dtype=torch.int8) if return_skips else None
    )
    dropped = torch.zeros_like(lse) if shape["WANTS_DROPPED"] else None
    if out.numel():
        proved = proved_blocks(q, k, key_valid, request, rule, shape, int8_keys)
        start(
            decode_kernel,
            (n_splits, q_len * kv_heads, batch),
            q,
            k,
            v,
            key_valid,
            request,
            proved,
            splits,
            *rule,
            acc,
            sums,
            counts,
            skips,
            kv_heads=kv_heads,
            group=group,
            n_splits=n_splits,
            n_blocks=n_blocks,
            split_blocks=split_blocks,
            n_words=None if proved is None else proved.shape[3],
            PADDED_GROUP=max(16, triton.next_power_of_2(group)),
            **shape,
        )
        join_kernel[(q_len * heads, batch)](
            acc,
            sums,
            sinks,
            out,
            lse,
            dropped,
            q_len,
            heads,
            n_splits,
            VALUE_SIZE=shape["VALUE_SIZE"],
            PADDED_VALUE=shape["PADDED_VALUE"],
            PADDED_SPLITS=triton.next_power_of_2(n_splits),
        )
    counts = counts.sum((2, 3), dtype=torch.int64).repeat_interleave(group, 1)
    return _results(out, lse, counts, skips, dropped, return_dropped_mass)


def _splits(q_len, kv_len, key_valid, request, shape, n_splits, split_blocks) -> Tensor:
    """How many splits have a block that the position sees, besides the seed: int32 `[B, Lq]`."""
    rest = _blocks_seen(q_len, kv_len, key_valid, request, shape)  # [B, Lq, NK]
    n_blocks, block_k = rest.shape[-1], shape["BLOCK_K"]
    if shape["ORDER"] == SINK_DIAGONAL:
        rest[..., 0] = False
        if shape["CAUSAL"]:
            row = torch.arange(q_len, device=rest.device)
            newest = torch.div(
                request[:, 2:] - request[:, :1] + row, block_k, rounding_mode="floor"
            )
            rest &= torch.arange(n_blocks, device=rest.device) != newest[..., None]
    padding = n_splits * split_blocks - n_blocks
    rest = torch.nn.functional.pad(rest, (0, padding)).unflatten(-1, (n_splits, split_blocks))
    return rest.any(-1).sum(-1, dtype=torch.int32).clamp(min=1)


def _blocks_seen(q_len, kv_len, key_valid, request, shape) -> Tensor:
    """Which blocks hold a key that the position sees: bool `[B, Lq, NK]`."""
    first, end, offset = request.unbind(1)
    column = torch.arange(kv_len, device=request.device)
    seen = (column < (end - first)[:, None])[:, None].expand(-1, q_len, -1)
    absolute = (first[:, None] + column).clamp(max=kv_len - 1).to(torch.int64)
    seen = seen & key_valid.gather(1, absolute)[:, None]
    position = ((offset - first)[:, None] + torch.arange(q_len, device=request.device))[..., None]
    if shape["CAUSAL"]:
        seen = seen & (column <= position)
    if shape["HAS_WINDOW"]:
        seen = seen & (column > position - shape["window"])
    block_k = shape["BLOCK_K"]
    seen = torch.nn.functional.pad(seen, (0, -kv_len % block_k))
    return seen.unflatten(-1, (-1, block_k)).any(-1)


def _results(out, lse, counts, skips, dropped, return_dropped_mass):
    nothing = out.new_empty(0, dtype=torch.float32)
    return (
        out,
        lse,
        counts,
        nothing.to(torch.uint8) if skips is None else _pack(skips),
        dropped if return_dropped_mass else nothing,
    )


def _pack(bits: Tensor) -> Tensor:
    """int8 0/1 `[..., N]` to uint8 `[..., ceil(N / 8)]`, bit j % 8 of byte j // 8."""
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)
