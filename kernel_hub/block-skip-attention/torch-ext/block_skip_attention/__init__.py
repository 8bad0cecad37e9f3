"""Attention that skips blocks of keys whose softmax weight cannot matter (BLASST, BSFA).

On the CPU the level of instructions is chosen at run time; the environment variable
HF_SPARSE_ATTENTION_CPU_LEVEL = portable | avx2 | avx512 | avx512_bf16 | avx512_amx forces it down.
"""

import torch
from torch import Tensor

from . import registration as registration  # the ops' shapes and gradients
from ._ops import add_op_namespace_prefix as add_op_namespace_prefix
from ._ops import ops
from .choice import ops_for
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
    "rotate_",
    "supports_flash_attn",
]

ASCENDING, SINK_DIAGONAL, DESCENDING = 0, 1, 2


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
    expected_sparsity: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention of `q` over `k` and `v` without the blocks that every given rule agrees to skip.

    Differentiable once, in q, k, v and sinks, through out and lse: the gradients are those of the
    attention over the blocks that this call kept, and skipped blocks cost nothing in the backward
    either. It reads the skip bits, so with a rule that needs `return_skips`.

    B batch, Hq query heads, Hkv key/value heads, Lq queries, Lk keys, D and Dv head sizes, NQ block
    rows, NK blocks. A call with at most 8 queries and more keys is decoding: there the heads of a
    group vote together, one position at a time, and NQ = Lq; otherwise `block_q` rows of one head
    vote together.

    Where there is a GPU, the kernels in CUDA C++ compute it; what they do not take, Triton's do.

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
        expected_sparsity: what share of the blocks will be skipped, as far as is known, 0 to 1. On
            GPUs it decides how V is fetched; it changes no result.

    Returns:
        out: `[B, Lq, Hq, Dv]`; lse: float32 `[B, Hq, Lq]`; counts: int64 `[B, Hq, 2]`, blocks
        visited and skipped; skips: uint8 `[B, Hq, NQ, ceil(NK / 8)]` (decode: Hkv), bit j % 8 of
        byte j // 8 for block j, or empty; dropped_mass: float32 `[B, Hq, Lq]`, a bound on the share
        of softmax mass dropped, or empty.
    """
    return ops_for(q, k, v, scale, block_q, block_k).forward(
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
        expected_sparsity,
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


def rotate_(
    x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None = None, eps: float = 0.0
) -> None:
    """Rotary position embedding of `x` in place, rounded once; on the CPU only.

    Each row becomes `x * cos + (-x2, x1) * sin` with x1 and x2 its halves, after an RMSNorm of the
    row, `x / sqrt(mean(x^2) + eps) * norm`, where `norm` is given.

    Args:
        x: `[B, H, L, D]` float32, bfloat16 or float16 with dense rows; D even, up to 512.
        cos: `[B|1, L, D]` in x's dtype.
        sin: the same.
        norm: float32 `[H|1, D]`.
        eps: of the norm.
    """
    ops.rotate_(x, cos, sin, norm, eps)


def cpu_level() -> str:
    """The level of instructions that the next call would use."""
    return ops.cpu_level()
