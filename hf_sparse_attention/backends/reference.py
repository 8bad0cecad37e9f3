"""The specification as code: block-skipping attention in plain torch. Short, slow, obviously right.

Float64 inputs are computed in float64, everything else in float32. Running sums are kept as
logarithms, so that no rescaling hides the rules. Gradients come from autograd: the decisions are
constants, so they are those of the forward that was really computed. Memory grows with
`Hq * block_q * Lk`, not with `Lq * Lk` (unless autograd keeps the graph).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse_attention.types import (
    LARGEST_LAMBDA,
    AttentionCall,
    AttentionResult,
    BlockGeometry,
    SkipRule,
    pack_bits,
)

NAME = "reference"
GEOMETRIES: tuple[str, ...] | None = None  # None: any
PREFERRED: tuple[str, ...] = ()


def available() -> str | None:
    """Why this machine cannot run the backend, or None: it is plain torch, so it always can."""
    return None


def supports(call: AttentionCall, rule: SkipRule, geometry: BlockGeometry) -> str | None:
    """Why this call cannot be served, or None."""
    if call.mask is not None:
        return "an arbitrary mask has no block structure"
    if torch.compiler.is_compiling():
        return "it reads tensor values, which a compiled graph cannot"
    if call.dropout > 0:
        return "attention dropout cannot be combined with block skipping"
    return None


def run(
    call: AttentionCall,
    rule: SkipRule,
    geometry: BlockGeometry,
    *,
    return_skips: bool = False,
    return_dropped_mass: bool = False,
) -> AttentionResult:
    """Computes `call` under `rule`; see `AttentionResult` for what comes back."""
    batch, heads, q_len, _ = call.q.shape
    kv_heads, kv_len, v_dim = call.v.shape[1:]
    decode = call.phase == "decode"
    dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    device = call.q.device
    voters = kv_heads if decode else heads  # how many groups of rows vote at a time
    rows_per_vote = 1 if decode else geometry.block_q
    n_rows, n_blocks = -(-q_len // rows_per_vote), -(-kv_len // geometry.block_k)

    outs = []
    lse = torch.full((batch, heads, q_len), -math.inf, dtype=dtype, device=device)
    log_c = lse.clone()
    counts = torch.zeros((batch, heads, 2), dtype=torch.int64, device=device)
    skips = torch.zeros((batch, voters, n_rows, n_blocks), dtype=torch.bool, device=device)
    for b in range(batch):
        request = _Request.of(call, b, dtype)
        rows_out = [torch.zeros((heads, request.first_row, v_dim), dtype=dtype, device=device)]
        for i, start in enumerate(range(request.first_row, q_len, rows_per_vote)):
            rows = slice(start, min(start + rows_per_vote, q_len))
            scores, visible = request.scores(rows)  # [Hq, R, K], [R, K]
            votes = scores.reshape(
                voters, -1, scores.shape[-1]
            )  # decode: the group's heads are rows
            decision = _decide(
                votes.detach(),
                _to_blocks(visible, geometry.block_k, False).any(-1).any(0),
                _RowRule.of(rule, b, i, voters, heads),
                geometry,
                diagonal=request.diagonal(rows, geometry.block_k) if call.causal else range(0),
                split=decode,
                voting=request.voting(rows, decode),
            )
            skipped = decision.skipped.repeat_interleave(heads // voters, 0)  # [Hq, NK]
            hidden = skipped.repeat_interleave(geometry.block_k, 1)[:, None, : scores.shape[-1]]
            out_rows, lse_rows = request.attend(scores.masked_fill(hidden, -math.inf))
            # A row that sees nothing has no softmax, whether or not there are sinks.
            lse[b, :, rows] = lse_rows.masked_fill(~visible.any(-1), -math.inf)
            rows_out.append(out_rows)
            log_c[b, :, rows] = decision.log_c.reshape(heads, -1)
            if rows.start < request.end_row:
                counts[b, :, 0] += decision.visited
                counts[b, :, 1] += skipped.sum(1)
            skips[b, :, i, : decision.skipped.shape[1]] = decision.skipped
        outs.append(torch.cat(rows_out, dim=1).transpose(0, 1))
    out = torch.stack(outs) if outs else torch.zeros((0, q_len, heads, v_dim), dtype=dtype)
    # c / (l + c); a row without keys has dropped nothing.
    dropped = torch.sigmoid(log_c - lse.detach()).nan_to_num(nan=0.0)
    return AttentionResult(
        out=out.to(call.q.dtype).contiguous(),
        lse=lse,
        counts=counts,
        skips=pack_bits(skips) if return_skips else None,
        dropped_mass=dropped if return_dropped_mass else None,
        backend=NAME,
    )


@dataclass(frozen=True)
class _Request:
    """One batch item without its padding: keys from the first to the last valid one."""

    q: Tensor  # [Hq, Lq, D]
    k: Tensor  # [Hq, K, D]
    v: Tensor  # [Hq, K, Dv]
    valid: Tensor  # bool [K]
    offset: int  # column of query row 0, counted from the first valid key
    first_row: int  # the first query row that may see a key
    end_row: int  # the query row after the last valid key; from here on queries are padding
    call: AttentionCall

    @classmethod
    def of(cls, call: AttentionCall, b: int, dtype: torch.dtype) -> _Request:
        q_len, kv_len = call.q.shape[2], call.k.shape[2]
        valid = torch.ones(kv_len, dtype=torch.bool, device=call.q.device)
        if call.key_valid is not None:
            valid = call.key_valid[b]
        columns = valid.nonzero().flatten().tolist()
        first, end = (columns[0], columns[-1] + 1) if columns else (0, 0)
        offset = (
            kv_len - q_len if call.q_offset is None else int(call.q_offset.expand(len(call.q))[b])
        )
        first_row = min(max(first - offset, 0), q_len) if call.causal else 0
        return cls(
            q=call.q[b].to(dtype),
            k=call.k[b, :, first:end].to(dtype).repeat_interleave(call.group, 0),
            v=call.v[b, :, first:end].to(dtype).repeat_interleave(call.group, 0),
            valid=valid[first:end],
            offset=offset - first,
            first_row=first_row if columns else q_len,
            end_row=min(max(end - offset, 0), q_len) if call.causal else q_len,
            call=call,
        )

    def scores(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Scores of `rows`, `[Hq, R, K]`, -inf where `visible`, bool `[R, K]`, says so."""
        call = self.call
        scores = call.scale * self.q[:, rows] @ self.k.transpose(1, 2)
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        column = torch.arange(self.k.shape[1], device=scores.device)
        position = self.offset + torch.arange(rows.start, rows.stop, device=scores.device)[:, None]
        visible = self.valid.expand(len(position), -1)
        if call.causal:
            visible = visible & (column <= position)
        if call.window is not None:
            visible = visible & (column > position - call.window)
        return scores.masked_fill(~visible, -math.inf), visible

    def voting(self, rows: slice, decode: bool) -> Tensor:
        """Which of `rows` vote, bool `[R]`: not right padding, unless there is nothing else."""
        row = torch.arange(rows.start, rows.stop, device=self.q.device)
        everyone = decode or rows.start >= self.end_row
        return torch.ones_like(row, dtype=torch.bool) if everyone else row < self.end_row

    def diagonal(self, rows: slice, block_k: int) -> range:
        """The key blocks that the causal diagonal crosses in `rows`."""
        first, last = self.offset + rows.start, self.offset + rows.stop - 1
        return range(first // block_k, last // block_k + 1)

    def attend(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax over the remaining scores times v: out `[Hq, R, Dv]` and lse `[Hq, R]`."""
        logits = scores
        if self.call.sinks is not None:
            sink = self.call.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:2], 1)
            logits = torch.cat([scores, sink], dim=-1)
        # Rows that see nothing: the max is -inf, and a difference of infinities must not appear.
        top = logits.detach().amax(-1, keepdim=True).nan_to_num(nan=math.nan, neginf=0.0)
        weights = (scores - top).exp()
        total = (logits - top).exp().sum(-1, keepdim=True)
        nothing = total == 0
        out = weights @ self.v / total.masked_fill(nothing, 1.0)
        return out, (total.log() + top).squeeze(-1)


@dataclass(frozen=True)
class _RowRule:
    """A `SkipRule` cut down to one block row: each condition `[voters, 1 | rows]`."""

    log_lambda: Tensor | None
    threshold: Tensor | None
    log_eps: Tensor | None
    keep_sink: bool

    @classmethod
    def of(cls, rule: SkipRule, b: int, i: int, voters: int, heads: int) -> _RowRule:
        def pick(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            x = x[b if x.shape[0] > 1 else 0]
            x = x if x.dim() == 1 else x[:, i if x.shape[1] > 1 else 0]
            return x.expand(heads).reshape(voters, -1)

        log_lambda, eps = pick(rule.log_lambda), pick(rule.max_dropped_mass)
        return cls(
            None if log_lambda is None else log_lambda.clamp(max=math.log(LARGEST_LAMBDA)),
            pick(rule.block_threshold),
            None if eps is None else eps.log(),
            rule.keep_sink,
        )

    def forbids(self, j: int, diagonal: range) -> bool:
        """Whether block `j` must be kept whatever its scores."""
        if self.threshold is not None and (j in diagonal or (j == 0 and self.keep_sink)):
            return True
        return self.log_lambda is None and self.threshold is None and self.log_eps is None

    def allows(self, m_new: Tensor, m: Tensor, log_l: Tensor, log_c: Tensor) -> Tensor:
        """Which rows `[voters, rows]` agree to skip a block with row maxima `m_new`.

        `m` is the running max, `log_l` the mass kept so far, and `log_c` the bound on what was
        dropped, this block included.
        """
        agrees = torch.ones_like(m_new, dtype=torch.bool)
        if self.log_lambda is not None:
            agrees &= m_new - m < self.log_lambda
        if self.threshold is not None:
            agrees &= m_new < self.threshold
        if self.log_eps is not None:
            agrees &= log_c <= self.log_eps + log_l
        return agrees | (m_new == -math.inf)  # a row that sees nothing of the block does not mind


@dataclass(frozen=True)
class _Decision:
    skipped: Tensor  # bool [voters, NK]
    visited: int  # blocks that hold a visible key
    log_c: Tensor  # [voters, rows]: log of the bound on the dropped mass, in units of exp(score)


@torch.no_grad()
def _decide(
    scores: Tensor,
    visible: Tensor,
    rule: _RowRule,
    geometry: BlockGeometry,
    *,
    diagonal: range,
    split: bool,
    voting: Tensor,
) -> _Decision:
    """Walks one block row in its order and decides block by block; scores `[voters, rows, K]`."""
    blocks = _to_blocks(scores, geometry.block_k, -math.inf)  # [voters, rows, NK, block_k]
    block_max, block_lse = blocks.amax(-1), blocks.logsumexp(-1)
    log_block_k = math.log(geometry.block_k)
    skipped = torch.zeros(
        (scores.shape[0], blocks.shape[2]), dtype=torch.bool, device=scores.device
    )
    nothing = torch.full(scores.shape[:2], -math.inf, dtype=scores.dtype, device=scores.device)
    seen = visible.nonzero().flatten().tolist()
    seed, splits = visit_order(seen, geometry, diagonal, split)

    seed_m, seed_log_l = nothing, nothing
    for j in seed:  # never skipped
        seed_m = torch.maximum(seed_m, block_max[:, :, j])
        seed_log_l = torch.logaddexp(seed_log_l, block_lse[:, :, j])
    total_log_c = nothing
    for blocks_of_split in splits:
        # Each split starts from what the seed found, and may spend an equal share of its mass.
        m, log_l, log_c = seed_m, seed_log_l - math.log(len(splits)), nothing
        for j in blocks_of_split:
            m_new = block_max[:, :, j]
            log_c_then = torch.logaddexp(log_c, log_block_k + m_new)
            if rule.forbids(j, diagonal):
                skip = torch.zeros_like(m_new[:, :1], dtype=torch.bool)
            else:
                agrees = rule.allows(m_new, m, log_l, log_c_then) | ~voting
                skip = agrees.all(dim=1, keepdim=True)
            m = torch.where(skip, m, torch.maximum(m, m_new))
            log_l = torch.where(skip, log_l, torch.logaddexp(log_l, block_lse[:, :, j]))
            log_c = torch.where(skip, log_c_then, log_c)
            skipped[:, j] = skip[:, 0]
        total_log_c = torch.logaddexp(total_log_c, log_c)
    return _Decision(skipped, len(seen), total_log_c)


def visit_order(
    seen: list[int], geometry: BlockGeometry, diagonal: range, split: bool
) -> tuple[list[int], list[list[int]]]:
    """The blocks `seen` in the order of `geometry`.

    A seed that is never skipped (decode only), and the splits that follow it independently of each
    other (prefill: a single one).
    """
    if geometry.order == "ascending":
        return [], [seen]
    if geometry.order == "descending":
        return [], [seen[::-1]]
    first = [j for j in seen if j == 0] + [j for j in seen if j in diagonal and j != 0]
    rest = [j for j in seen if j not in first]
    if not split:
        return [], [first + rest]
    by_split: dict[int, list[int]] = {}
    for j in rest:
        by_split.setdefault(j * geometry.block_k // geometry.split_k, []).append(j)
    return first, list(by_split.values())


def _to_blocks(x: Tensor, block_k: int, fill: float | bool) -> Tensor:
    """`[..., K]` to `[..., NK, block_k]`, padded with `fill`."""
    padding = -x.shape[-1] % block_k
    x = torch.nn.functional.pad(x, (0, padding), value=fill)
    return x.reshape(*x.shape[:-1], x.shape[-1] // block_k, block_k)
