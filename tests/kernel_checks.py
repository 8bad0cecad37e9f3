"""The oracle for compiled kernels: float64, with error bounds derived from the arithmetic.

A kernel decides in float32, so near a threshold it may decide otherwise than exact arithmetic. The
oracle therefore walks the blocks along the kernel's *own* skip bits: each decision must be the
exact one for that state, unless its margin is smaller than the rounding error that the scores can
carry; and output, lse and certificate must be those of exact attention over just the blocks that
the kernel kept.

The bounds, with u = 2^-24: a dot product of length D computed in float32, in any order, is off by
at most (D + 4) u sum|q k|; scaling it, subtracting a max and the like add a few u |s|. A relative
error d of every weight moves a weighted mean of v by at most 2 d times the weighted mean of |v|.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from hf_sparse_attention.backends.reference import _Request, _RowRule, _to_blocks, visit_order
from hf_sparse_attention.types import (
    AttentionCall,
    AttentionResult,
    BlockGeometry,
    SkipRule,
    unpack_bits,
)

U = 2.0**-24
EXP_ERROR = 16 * U  # of the kernel's 2^x and tanh, relative; their own tests say half of it


def check(
    call: AttentionCall,
    rule: SkipRule,
    geometry: BlockGeometry,
    result: AttentionResult,
    *,
    weights_dtype: torch.dtype | None = None,
) -> None:
    """Raises AssertionError unless `result`, with skip bits and certificate, is right.

    `weights_dtype` is what weights are rounded to before V is multiplied with them; None: bfloat16
    if that is what the call is in, else float32.
    """
    if weights_dtype is None:
        weights_dtype = torch.bfloat16 if call.q.dtype == torch.bfloat16 else torch.float32
    exact = replace(
        call,
        q=call.q.double(),
        k=call.k.double(),
        v=call.v.double(),
        sinks=None if call.sinks is None else call.sinks.double(),
    )
    heads, q_len = call.q.shape[1:3]
    voters, rows_per_vote = (
        (call.k.shape[1], 1) if call.phase == "decode" else (heads, geometry.block_q)
    )
    blocks = -(-call.k.shape[2] // geometry.block_k)
    bits = unpack_bits(result.skips, blocks)
    counts = torch.zeros_like(result.counts)
    seen_rows = torch.zeros(len(call.q), q_len, dtype=torch.bool)
    for b in range(len(call.q)):
        request = _Request.of(exact, b, torch.float64)
        for i, start in enumerate(range(request.first_row, q_len, rows_per_vote)):
            rows = slice(start, min(start + rows_per_vote, q_len))
            row = BlockRow(request, call, rows, geometry)
            seen_rows[b, rows] = row.visible.any(-1)
            skipped = bits[b, :, i, : row.n_blocks]
            row_rule = _RowRule.of(rule, b, i, voters, heads)
            visited = row.check_decisions(skipped, row_rule)
            per_head = skipped.repeat_interleave(heads // voters, 0)
            if start < request.end_row:  # right padding is not counted
                counts[b, :, 0] += visited
                counts[b, :, 1] += per_head.sum(-1)
            row.check_numbers(
                per_head,
                result.out[b, rows].transpose(0, 1).double(),
                result.lse[b, :, rows].double(),
                result.dropped_mass[b, :, rows].double(),
                weights_dtype,
            )
    assert torch.equal(result.counts, counts), "blocks visited and skipped"
    unseen = ~seen_rows
    assert (result.out[unseen] == 0).all(), "rows that see nothing are zeros"
    assert (result.lse.transpose(1, 2)[unseen] == -math.inf).all(), "and their lse is -inf"


class BlockRow:
    """One block row in float64, with the rounding error that its scores may carry in float32."""

    def __init__(
        self, request: _Request, call: AttentionCall, rows: slice, geometry: BlockGeometry
    ) -> None:
        self.request, self.call, self.geometry = request, call, geometry
        self.scores, self.visible = request.scores(rows)  # [Hq, R, K], [R, K]
        self.keys = self.scores.shape[-1]
        self.n_blocks = -(-self.keys // geometry.block_k)
        magnitude = abs(call.scale) * request.q[:, rows].abs() @ request.k.abs().transpose(1, 2)
        largest = magnitude.masked_fill(~self.visible, 0).amax(-1)  # [Hq, R]
        self.error = (call.q.shape[-1] + 12) * U * largest
        if call.softcap is not None:
            self.error = self.error + EXP_ERROR * call.softcap
        self.diagonal = request.diagonal(rows, geometry.block_k) if call.causal else range(0)
        self.voting = request.voting(rows, call.phase == "decode")

    def check_decisions(self, skipped: Tensor, rule: _RowRule) -> int:
        """Each of the decisions `skipped` `[voters, NK]`; returns how many blocks are visited."""
        voters = len(skipped)
        blocks = _to_blocks(self.scores, self.geometry.block_k, -math.inf)
        blocks = blocks.reshape(voters, -1, *blocks.shape[2:])
        block_max, block_lse = blocks.amax(-1), blocks.logsumexp(-1)
        band = 2 * self.error.reshape(voters, -1) + 8 * U
        visible = _to_blocks(self.visible, self.geometry.block_k, False).any(-1).any(0)
        seen = visible.nonzero().flatten().tolist()
        decode = self.call.phase == "decode"
        seed, splits = visit_order(seen, self.geometry, self.diagonal, decode)
        assert not skipped[:, ~visible].any(), "a block that nobody sees cannot be skipped"
        assert not skipped[:, seed].any(), "the seed is never skipped"

        seed_m = torch.full(block_max.shape[:2], -math.inf, dtype=torch.float64)
        seed_l = seed_m
        for j in seed:
            seed_m = torch.maximum(seed_m, block_max[:, :, j])
            seed_l = torch.logaddexp(seed_l, block_lse[:, :, j])
        for split in splits:
            m, log_l = seed_m, seed_l - math.log(len(splits))
            log_c = torch.full_like(m, -math.inf)
            for j in split:
                m_new = block_max[:, :, j]
                log_c_then = torch.logaddexp(log_c, math.log(self.geometry.block_k) + m_new)
                skip = skipped[:, j, None]
                if rule.forbids(j, self.diagonal):
                    assert not skip.any(), f"block {j} must be kept"
                else:
                    margin = self._margin(rule, m_new, m, log_l, log_c_then)
                    margin = margin.masked_fill(~self.voting, -math.inf)
                    sure_skip = (margin < -band).all(1, keepdim=True)
                    sure_keep = (margin > band).any(1, keepdim=True)
                    wrong = (sure_skip & ~skip) | (sure_keep & skip)
                    assert not wrong.any(), f"block {j}: margins {margin[wrong[:, 0]].tolist()}"
                m = torch.where(skip, m, torch.maximum(m, m_new))
                log_l = torch.where(skip, log_l, torch.logaddexp(log_l, block_lse[:, :, j]))
                log_c = torch.where(skip, log_c_then, log_c)
        return len(seen)

    def _margin(
        self, rule: _RowRule, m_new: Tensor, m: Tensor, log_l: Tensor, log_c: Tensor
    ) -> Tensor:
        """How far each row is from agreeing to skip; negative: it agrees."""
        margin = torch.full_like(m_new, -math.inf)
        if rule.log_lambda is not None:
            margin = torch.maximum(margin, m_new - m - rule.log_lambda)
        if rule.threshold is not None:
            margin = torch.maximum(margin, m_new - rule.threshold)
        if rule.log_eps is not None:
            # c and l are sums of up to `keys` weights, each off by its score's error and the exp's.
            slack = 2 * (self.keys * U + EXP_ERROR)
            over = log_c - rule.log_eps - log_l
            over = torch.sign(over) * (over.abs() - slack).clamp(min=0)
            margin = torch.maximum(margin, over)
        return margin.nan_to_num(nan=math.inf).masked_fill(m_new == -math.inf, -math.inf)

    def check_numbers(
        self,
        skipped: Tensor,
        out: Tensor,
        lse: Tensor,
        dropped: Tensor,
        weights_dtype: torch.dtype,
    ) -> None:
        """`out` `[Hq, R, Dv]`, `lse` and `dropped` `[Hq, R]` for the blocks that were kept."""
        hidden = skipped.repeat_interleave(self.geometry.block_k, 1)[:, None, : self.keys]
        kept = self.scores.masked_fill(hidden, -math.inf)
        sees = self.visible.any(-1)
        exact, exact_lse = self.request.attend(kept)
        exact_lse = exact_lse.masked_fill(~sees, -math.inf)
        weights = (kept - exact_lse[..., None]).exp().nan_to_num(nan=0.0)
        low = torch.finfo(self.call.q.dtype)
        relative = self.error + EXP_ERROR + (self.keys + 8) * U
        rounding = 0.0
        if weights_dtype != torch.float32:
            rounding = torch.finfo(weights_dtype).eps / 2
        allowed = (2 * relative + rounding)[..., None] * (weights @ self.request.v.abs())
        allowed += low.eps / 2 * exact.abs() + low.smallest_normal * low.eps
        if weights_dtype == torch.float16:  # small weights are rounded in its subnormal steps
            step = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps / 2
            allowed += step * (weights > 0).double() @ self.request.v.abs()
        worst = ((out - exact).abs() - allowed).max().item()
        assert worst <= 0, f"out is off by {worst:.3e} more than rounding explains"

        finite = exact_lse > -math.inf
        assert torch.equal(lse > -math.inf, finite), "lse is -inf just where nothing is kept"
        allowed = (relative + 4 * U * exact_lse.abs())[finite]
        assert ((lse - exact_lse)[finite].abs() <= allowed).all(), "lse"

        blocks = _to_blocks(self.scores, self.geometry.block_k, -math.inf)
        bound = blocks.amax(-1).masked_fill(~skipped[:, None], -math.inf).logsumexp(-1)
        bound = bound + math.log(self.geometry.block_k)
        exact_dropped = torch.sigmoid(bound - exact_lse).nan_to_num(nan=0.0)
        allowed = 2 * relative + 8 * U * (bound - exact_lse).nan_to_num(0, 0, 0).abs()
        assert ((dropped - exact_dropped).abs() <= allowed * exact_dropped + 1e-30).all(), (
            "dropped_mass"
        )


def structured(
    kind: str, batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, head_size: int
) -> tuple[Tensor, Tensor]:
    """q and k, float32, with scores (at scale 1/sqrt(D)) as attention has them.

    `noise`; `sink`: the first key outweighs all; `local`: near keys do; `needle`: a few rare keys
    do.
    """
    q = torch.randn(batch, heads, q_len, head_size)
    k = torch.randn(batch, kv_heads, kv_len, head_size)
    if kind == "noise" or kv_len == 0 or q_len == 0:
        return q, k
    strength = 3.0 * head_size**0.25
    if kind == "local":
        position = torch.arange(kv_len - q_len, kv_len)
        angle, key_angle = 0.01 * position, 0.01 * torch.arange(kv_len)
        half = head_size // 2
        q[..., :half], q[..., half : 2 * half] = (
            strength * x[:, None].expand(-1, half) / max(half, 1) ** 0.5
            for x in (angle.cos(), angle.sin())
        )
        k[..., :half], k[..., half : 2 * half] = (
            strength * x[:, None].expand(-1, half) / max(half, 1) ** 0.5
            for x in (key_angle.cos(), key_angle.sin())
        )
        return q, k
    direction = torch.nn.functional.normalize(torch.randn(head_size), dim=0)
    q += strength * direction
    special = [0] if kind == "sink" else torch.randint(kv_len, (2,)).tolist()
    k[:, :, special] += strength * direction
    return q, k
