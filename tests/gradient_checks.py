"""The oracle for gradients: the masked dense graph in float64, and bounds on its rounding errors.

A backward must give the gradients of the attention that its forward computed: the blocks of the
forward's own skip bits are left out, and nothing else. So the oracle builds a bool mask from those
bits, and lets autograd differentiate a softmax under it that is written out in float64.

The bounds, entry by entry, are sums of what each rounding can do; u is that of the arithmetic
(2^-24), r that of the dtype. A weight P is off by the error of its score and of the lse, relative
to it; dP and delta are dot products; delta is made of an output that was rounded to the dtype; P
and dS are rounded to the dtype where bfloat16 products are used; and each gradient is a sum,
rounded once more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from kernel_checks import EXP_ERROR, U
from torch import Tensor

from hf_sparse_attention.backends.dense import visibility
from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, unpack_bits

Gradients = dict[str, Tensor]


def kept(call: AttentionCall, skips: Tensor | None, geometry: BlockGeometry) -> Tensor:
    """What the forward attended to, bool `[B, Hq, Lq, Lk]`: visible, and in no skipped block."""
    batch, heads, q_len, _ = call.q.shape
    kv_len = call.k.shape[2]
    mask = visibility(call, 0, q_len).expand(batch, heads, q_len, kv_len).clone()
    if skips is None:
        return mask
    bits = unpack_bits(skips, -(-kv_len // geometry.block_k))
    bits = bits.repeat_interleave(heads // bits.shape[1], 1)
    rows_per_vote = 1 if call.phase == "decode" else geometry.block_q
    for b in range(batch):
        valid = torch.ones(kv_len, dtype=torch.bool)
        if call.key_valid is not None:
            valid = call.key_valid[b]
        if not valid.any():
            continue
        first = int(valid.nonzero()[0])
        offset = kv_len - q_len
        if call.q_offset is not None:
            offset = int(call.q_offset.expand(batch)[b])
        first_row = min(max(first - offset, 0), q_len) if call.causal else 0
        rows = torch.arange(q_len - first_row) // rows_per_vote
        columns = torch.arange(kv_len - first) // geometry.block_k
        hidden = bits[b][:, rows[:, None], columns]
        mask[b, :, first_row:, first:] &= ~hidden
    return mask


@dataclass(frozen=True)
class Dense:
    """The attention over `mask` in float64, from scores to gradients."""

    call: AttentionCall  # float64
    mask: Tensor
    straight_through: bool = False  # a wrong softcap, for the tests of the tests

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        scores = self.call.scale * q @ k.transpose(2, 3)
        cap = self.call.softcap
        if cap is not None:
            capped = cap * torch.tanh(scores / cap)
            scores = scores + (capped - scores).detach() if self.straight_through else capped
        return scores.masked_fill(~self.mask, -math.inf)

    def run(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """out `[B, Lq, Hq, Dv]` and lse `[B, Hq, Lq]`; rows that see nothing: 0 and -inf."""
        k, v = (x.repeat_interleave(self.call.group, 1) for x in (k, v))
        logits = scores = self.scores(q, k)
        if sinks is not None:
            sink = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            logits = torch.cat([scores, sink], -1)
        sees = visibility(self.call, 0, q.shape[2]).any(-1).expand(scores.shape[:3])
        alive = sees & (logits.detach().amax(-1) > -math.inf) if logits.shape[-1] else sees
        logits = logits.masked_fill(~alive[..., None], 0.0)
        lse = logits.logsumexp(-1)
        weights = (scores - lse[..., None]).exp().masked_fill(~alive[..., None], 0.0)
        return (weights @ v).transpose(1, 2), lse.masked_fill(~alive, -math.inf)


def loss(out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """A loss whose gradients in out and lse are `dout` and, where there is an lse, `dlse`."""
    total = (out * dout.to(out.dtype)).sum()
    if dlse is not None:
        finite = lse.detach() > -math.inf
        total = total + (lse.masked_fill(~finite, 0.0) * dlse.to(lse.dtype)).sum()
    return total


def inputs_of(call: AttentionCall, dtype: torch.dtype | None = None) -> Gradients:
    """The call's tensors as leaves that want gradients, in `dtype` or in their own."""
    named = {"q": call.q, "k": call.k, "v": call.v, "sinks": call.sinks}
    return {
        name: x.detach().to(dtype or x.dtype, copy=True).requires_grad_()
        for name, x in named.items()
        if x is not None
    }


def check(
    call: AttentionCall,
    geometry: BlockGeometry,
    result: AttentionResult,
    gradients: Gradients,
    dout: Tensor,
    dlse: Tensor | None = None,
    *,
    straight_through: bool = False,
) -> None:
    """Raises AssertionError unless `gradients` are those of the forward that gave `result`."""
    leaves = inputs_of(call, torch.float64)
    exact_call = replace(call, **{name: x.detach() for name, x in leaves.items()})
    dense = Dense(exact_call, kept(call, result.skips, geometry), straight_through)
    q, k, v, sinks = leaves["q"], leaves["k"], leaves["v"], leaves.get("sinks")
    out, lse = dense.run(q, k, v, sinks)
    if not out.numel():
        return
    exact = dict(
        zip(
            leaves,
            torch.autograd.grad(
                loss(out, lse, dout, dlse), list(leaves.values()), materialize_grads=True
            ),
            strict=True,
        )
    )
    with torch.no_grad():
        allowed = bounds(dense, out, lse, dout.double(), dlse, result.out.dtype)
        low = torch.finfo(result.out.dtype)
        for name, want in exact.items():
            got = gradients[name].double()
            assert got.isfinite().all(), f"d{name} is not finite"
            rounding = low.eps / 2 if name != "sinks" else U
            room = allowed[name] + rounding * want.abs() + low.smallest_normal * low.eps
            worst = ((got - want).abs() - room).max().item() if want.numel() else 0.0
            assert worst <= 0, f"d{name} is off by {worst:.3e} more than rounding explains"


def bounds(
    dense: Dense, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, dtype: torch.dtype
) -> Gradients:
    """How far each gradient may be off before it is rounded to its dtype."""
    call = dense.call
    u, exp_error = (2.0**-53, 2.0**-50) if dtype == torch.float64 else (U, EXP_ERROR)
    r = torch.finfo(dtype).eps / 2
    products = r if dtype == torch.bfloat16 else 0.0  # of P and dS, as factors
    size, v_size, rows, keys = call.q.shape[-1], call.v.shape[-1], *dense.mask.shape[2:]
    k, v = (x.repeat_interleave(call.group, 1) for x in (call.k, call.v))
    dout = dout.transpose(1, 2)  # [B, Hq, Lq, Dv]
    out, alive = out.transpose(1, 2), lse > -math.inf
    dout, lse = dout.masked_fill(~alive[..., None], 0.0), lse.masked_fill(~alive, 0.0)
    scores = dense.scores(call.q, k)
    p = (scores - lse[..., None]).exp().masked_fill(~alive[..., None], 0.0)

    # Errors of the scores, then of the weights, relative to them.
    magnitude = abs(call.scale) * call.q.abs() @ k.abs().transpose(2, 3)
    score = (size + 12) * u * magnitude.masked_fill(~dense.mask, 0.0)
    slope, slope_error = torch.ones_like(p), torch.zeros_like(p)
    if call.softcap is not None:
        t = scores.masked_fill(~dense.mask, 0.0) / call.softcap
        slope = 1 - t * t
        slope_error = 2 * (exp_error + score / call.softcap) + 4 * u
        score = score + exp_error * call.softcap
    worst = score.amax(-1, keepdim=True)
    weight = score + worst + 2 * exp_error + (keys + 16 + 16 * lse.abs()[..., None]) * u

    # delta is made of the rounded output.
    delta = (dout * out).sum(-1) - (0.0 if dlse is None else dlse.double())
    out_error = (p * (weight + products)) @ v.abs() + (p @ v.abs()) * weight.amax(-1, keepdim=True)
    out_error = out_error + r * out.abs() + (v_size + 4) * u * out.abs()
    delta_error = (dout.abs() * out_error).sum(-1) + 4 * u * delta.abs()

    dp = dout @ v.transpose(2, 3)
    dp_error = (v_size + 4) * u * (dout.abs() @ v.abs().transpose(2, 3))
    rest = dp - delta[..., None]
    ds = (p * rest * slope).abs()
    ds_error = p * slope.abs() * (dp_error + delta_error[..., None]) + p * rest.abs() * slope_error
    ds_error = ds_error + ds * (weight + products + 4 * u)

    def of_group(x: Tensor) -> Tensor:  # sums over the heads that share a key/value head
        return x.unflatten(1, (call.k.shape[1], call.group)).sum(2)

    scale, terms = abs(call.scale), u * (rows * call.group + 8)
    allowed = {
        "q": scale * ((ds_error + u * (keys + 8) * ds) @ k.abs()),
        "k": scale * of_group((ds_error + terms * ds).transpose(2, 3) @ call.q.abs()),
        "v": of_group((p * (weight + products + terms)).transpose(2, 3) @ dout.abs()),
    }
    if call.sinks is not None:
        sink = call.sinks.view(1, -1, 1)
        ps = (sink - lse).exp().masked_fill(~alive, 0.0)
        relative = weight.amax(-1) + 8 * u * (sink.abs().nan_to_num(0, 0, 0) + lse.abs())
        error = ps * (delta_error + delta.abs() * (relative + 16 * u + exp_error))
        allowed["sinks"] = error.sum((0, 2))
    return allowed
