"""Attention that skips blocks of keys whose softmax weight cannot matter (BLASST, BSFA).

On the CPU the level of instructions is chosen at run time; the environment variable
HF_SPARSE_ATTENTION_CPU_LEVEL = portable | avx2 | avx512 | avx512_bf16 forces it down.
"""

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .transformers_attention import flash_attn_forward, supports_flash_attn

__all__ = [
    "ASCENDING",
    "DESCENDING",
    "SINK_DIAGONAL",
    "append_int8_keys",
    "cpu_level",
    "empty_int8_keys",
    "flash_attn_forward",
    "forward",
    "observe",
    "supports_flash_attn",
]

ASCENDING, SINK_DIAGONAL, DESCENDING = 0, 1, 2
_DECODE_MAX_QUERIES = 8


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_valid: Tensor | None = None,
    q_offset: Tensor | None = None,
    sinks: Tensor | None = None,
    log_lambda: Tensor | None = None,
    block_threshold: Tensor | None = None,
    max_dropped_mass: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    block_q: int = 64,
    block_k: int = 64,
    order: int = SINK_DIAGONAL,
    split_k: int = 1024,
    keep_sink: bool = True,
    return_skips: bool = False,
    return_dropped_mass: bool = False,
    int8_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention of `q` over `k` and `v` without the blocks that every given rule agrees to skip.

    Differentiable once, in q, k, v and sinks, through out and lse: the gradients are those of the
    attention over the blocks that this call kept, and skipped blocks cost nothing in the backward
    either. It reads the skip bits, so with a rule that needs `return_skips`.

    B batch, Hq query heads, Hkv key/value heads, Lq queries, Lk keys, D and Dv head sizes, NQ block
    rows, NK blocks. A call with at most 8 queries and more keys is decoding: there the heads of a
    group vote together, one position at a time, and NQ = Lq; otherwise `block_q` rows of one head
    vote together.

    Args:
        q: `[B, Hq, Lq, D]` float32, bfloat16 or float16; D up to 512.
        k: `[B, Hkv, Lk, D]`.
        v: `[B, Hkv, Lk, Dv]`; Dv up to 512.
        key_valid: bool `[B, Lk]`, False for keys that nobody sees.
        q_offset: int64 `[1]` or `[B]`, the key column of query row 0; None is `Lk - Lq`.
        sinks: float32 `[Hq]`, logits that join the softmax's denominator.
        log_lambda: float32 `[B|1, Hq|1]`, skip if a block's max lies this far (< 0) below the
            running max.
        block_threshold: float32 `[B|1, Hq|1, NQ|1]`, skip if a block's max is below; never on the
            causal diagonal.
        max_dropped_mass: float32 `[B|1, Hq|1]`, skip only while the dropped mass stays below this
            share of the kept mass.
        scale: factor on `q k^T`.
        causal: row r sees columns <= `q_offset + r`.
        window: a row sees the last `window` columns only; 0 is no window.
        softcap: scores become `softcap * tanh(score / softcap)`; 0.0 is none.
        block_q: rows of a block, 1 to 64.
        block_k: keys of a block: a divisor of 64, or a multiple of it up to 1024.
        order: in which blocks are visited: ASCENDING, SINK_DIAGONAL or DESCENDING.
        split_k: decode: keys after which the running max starts anew from the sink and the newest
            block.
        keep_sink: with `block_threshold`, never skip block 0.
        return_skips: whether `skips` is wanted.
        return_dropped_mass: whether `dropped_mass` is wanted.
        int8_keys: an int8 copy of `k`, see `empty_int8_keys`. It saves reading blocks of K in
            decode and changes no result, provided that it is a copy of these very keys.

    Returns:
        out: `[B, Lq, Hq, Dv]`; lse: float32 `[B, Hq, Lq]`; counts: int64 `[B, Hq, 2]`, blocks
        visited and skipped; skips: uint8 `[B, Hq, NQ, ceil(NK / 8)]` (decode: Hkv), bit j % 8 of
        byte j // 8 for block j, or empty; dropped_mass: float32 `[B, Hq, Lq]`, a bound on the share
        of softmax mass dropped, or empty.
    """
    return ops.forward(
        q,
        k,
        v,
        key_valid,
        q_offset,
        sinks,
        log_lambda,
        block_threshold,
        max_dropped_mass,
        scale,
        causal,
        window,
        softcap,
        block_q,
        block_k,
        order,
        split_k,
        keep_sink,
        return_skips,
        return_dropped_mass,
        int8_keys,
    )


def empty_int8_keys(batch: int, heads: int, length: int, head_size: int) -> Tensor:
    """An int8 copy of a cache of `length` keys, as yet of none of them.

    Returns:
        uint8 `[batch, heads, 1 + ceil(length / 64), 64 * (head_size rounded up to 4, + 12)]`, all
        zeros, which means: nothing known. Each head is 64 keys a row, with their scales and norms,
        behind one row that holds a mean. Rows of the batch may be selected, repeated or zeroed.
    """
    width = (head_size + 3) // 4 * 4
    return torch.zeros(batch, heads, 1 + (length + 63) // 64, 64 * (width + 12), dtype=torch.uint8)


def append_int8_keys(k: Tensor, position: Tensor, copy: Tensor) -> None:
    """Enters `k` `[B, Hkv, n, D]` into `copy` at `position` (int64, one element) and behind."""
    ops.append_int8_keys(k, position, copy)


def observe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    geometries: Tensor,
    kept: Tensor,
    groups: Tensor,
    group_count: int,
    eps: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    keep_sink: bool = True,
    bins: int,
    u_min: float,
    bins_per_nat: float,
    mass_unit: float,
    sample_from: int,
    sample_every: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Dense causal attention of one request, and what every threshold would skip of it.

    Block rows are 64 queries, and blocks are visited sink and diagonal first. N geometries, E
    values of eps, NQ block rows, of which P are complete; other letters as in `forward`.

    Args:
        q: `[1, Hq, L, D]`.
        k: `[1, Hkv, L, D]`.
        v: `[1, Hkv, L, Dv]`.
        sinks: float32 `[Hq]` or None.
        geometries: int64 `[N, 2]`: `block_k`, 1 or a multiple of 64, and `split_k`.
        kept: int64 `[N, levels]`, ascending: how many competing blocks each level keeps.
        groups: int64 `[1, NQ]`: in which of `group_count` rows a block row's decoding is counted.
        group_count: rows for decoding.
        eps: float32 `[E]`, budgets to simulate.
        scale: as in `forward`.
        window: as in `forward`.
        softcap: as in `forward`.
        keep_sink: block 0 does not compete for `kept`.
        bins: a block is counted in bin `(gap + ln L - u_min) * bins_per_nat`, at most `bins - 2`,
            or in the last if its gap is not below 0.
        u_min: see `bins`.
        bins_per_nat: see `bins`.
        mass_unit: what softmax shares are counted in.
        sample_from: single keys: the budget is simulated in every block row up to this query.
        sample_every: single keys: beyond it, in one of so many block rows, which counts that often.

    Returns:
        out: `[1, L, Hq, Dv]`; prefill: int64 `[N, Hq, 2 * bins + 1 + E]`, blocks and their mass by
        bin, blocks visited and skipped under each eps; decode: int64 `[N, group_count, Hkv, ...]`,
        the same for the last query of each block row as a decode step; prefill_tops: float32
        `[N, levels, Hq, P]`, the thresholds that keep just so many blocks, or -inf; decode_tops:
        `[N, levels, Hkv, P]`.
    """
    return ops.observe(
        q,
        k,
        v,
        sinks,
        scale,
        window,
        softcap,
        geometries,
        kept,
        keep_sink,
        groups,
        group_count,
        eps,
        bins,
        u_min,
        bins_per_nat,
        mass_unit,
        sample_from,
        sample_every,
    )


def cpu_level() -> str:
    """The level of instructions that the next call would use."""
    return ops.cpu_level()


@torch.library.register_fake(add_op_namespace_prefix("append_int8_keys"), allow_override=True)
def _append_fake(_k, _position, _copy):
    return None


# allow_override: the module may be imported twice, from two paths that hold the same build.
@torch.library.register_fake(add_op_namespace_prefix("forward"), allow_override=True)
def _forward_fake(q, k, v, *args):
    # The schema's order; rules and masks do not change any shape.
    block_q, block_k, return_skips, return_dropped_mass = args[10], args[11], args[15], args[16]
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len, v_dim = k.shape[1], k.shape[2], v.shape[3]
    skips = q.new_empty((0,), dtype=torch.uint8)
    if return_skips:  # only then do shapes depend on the phase
        decode = q_len <= _DECODE_MAX_QUERIES and kv_len > q_len
        rows = q_len if decode else (q_len + block_q - 1) // block_q
        blocks = (kv_len + block_k - 1) // block_k
        skips = q.new_empty(
            (batch, kv_heads if decode else heads, rows, (blocks + 7) // 8), dtype=torch.uint8
        )
    dropped = (batch, heads, q_len) if return_dropped_mass else (0,)
    return (
        q.new_empty((batch, q_len, heads, v_dim)),
        q.new_empty((batch, heads, q_len), dtype=torch.float32),
        q.new_empty((batch, heads, 2), dtype=torch.int64),
        skips,
        q.new_empty(dropped, dtype=torch.float32),
    )


@torch.library.register_fake(add_op_namespace_prefix("observe"), allow_override=True)
def _observe_fake(q, k, v, *args):
    kept, group_count, eps, bins = args[5], args[8], args[9], args[10]
    _, heads, length, _ = q.shape
    (n, levels), kv_heads, width = kept.shape, k.shape[1], 2 * bins + 1 + eps.shape[0]
    return (
        q.new_empty((1, length, heads, v.shape[3])),
        q.new_empty((n, heads, width), dtype=torch.int64),
        q.new_empty((n, group_count, kv_heads, width), dtype=torch.int64),
        q.new_empty((n, levels, heads, length // 64), dtype=torch.float32),
        q.new_empty((n, levels, kv_heads, length // 64), dtype=torch.float32),
    )


@torch.library.register_fake(add_op_namespace_prefix("backward"), allow_override=True)
def _backward_fake(*args):
    q, k, v, sinks = (*args[2:5], args[10])
    gradients = [x.new_empty(x.shape) for x in (q, k, v)]
    heads = 0 if sinks is None else q.shape[1]
    return (*gradients, q.new_empty((heads,), dtype=torch.float32))


def _save_for_backward(ctx, inputs, output):
    q, k, v, key_valid, q_offset, sinks, *rules = inputs[:9]
    return_skips = inputs[18]
    out, lse, counts, skips, dropped_mass = output
    if not return_skips and any(rule is not None for rule in rules):
        raise ValueError(
            "forward: expected return_skips=True where gradients are wanted, got False"
        )
    ctx.save_for_backward(q, k, v, out, lse, skips, key_valid, q_offset, sinks)
    ctx.options = inputs[9:15]  # scale to block_k
    ctx.mark_non_differentiable(counts, skips, dropped_mass)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse, *_):
    *tensors, sinks = ctx.saved_tensors
    out = tensors[3]
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, dsinks = ops.backward(dout, dlse, *tensors, sinks, *ctx.options)
    return dq, dk, dv, None, None, None if sinks is None else dsinks, *[None] * 15


def _refuse_second_backward(ctx, *grads):
    raise NotImplementedError(
        "block-skipping attention: second derivatives (create_graph=True) are not implemented in "
        "the kernels; backend='reference' has them"
    )


if not hasattr(ops, "_is_differentiable"):  # the module may be imported twice
    torch.library.register_autograd(
        add_op_namespace_prefix("forward"), _backward, setup_context=_save_for_backward
    )
    torch.library.register_autograd(add_op_namespace_prefix("backward"), _refuse_second_backward)
    ops._is_differentiable = True
