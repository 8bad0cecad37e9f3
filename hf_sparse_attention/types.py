"""The vocabulary of the package.

`AttentionCall` is what is asked, `SkipRule` when a block may be skipped, `BlockGeometry` how the
score matrix is cut, and `AttentionResult` what comes back.

Letters used in every shape: B batch, Hq query heads, Hkv key/value heads, G = Hq / Hkv the GQA
group, Lq queries, Lk keys, D head size of q and k, Dv head size of v, NQ block rows, NK key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

Phase = Literal["prefill", "decode"]
Order = Literal["sink_diagonal", "ascending", "descending"]
PHASES: tuple[Phase, ...] = get_args(Phase)
ORDERS: tuple[Order, ...] = get_args(Order)

#: A call with at most this many queries against a longer key sequence is decoding: one new token,
#: or the few that speculative decoding verifies. Each of its positions is decided by itself, so
#: the thresholds fitted for one new token hold for all of them.
DECODE_MAX_QUERIES = 8


@dataclass(frozen=True)
class BlockGeometry:
    """How scores are cut into blocks and in which order a block row visits them.

    Part of a threshold's meaning: the same threshold skips other blocks under another geometry.

    Args:
        block_q: query rows of one head that vote together in prefill. In decode the G query heads
            of one key/value head vote together at one position, whatever `block_q`.
        block_k: keys in a block.
        order: `sink_diagonal` visits block 0, then the blocks that the causal diagonal crosses,
            then the others ascending; `ascending` and `descending` are for experiments.
        split_k: decode only, under `sink_diagonal`: the remaining blocks are cut into splits of
            `split_k` keys, and each split starts anew from the running max that block 0 and the
            newest block gave. A fixed size, so decisions never depend on threads or hardware.
    """

    block_q: int = 64
    block_k: int = 64
    order: Order = "sink_diagonal"
    split_k: int = 1024

    @property
    def name(self) -> str:
        """`"64x128"`: rows by keys, the name used in configs, tables and error messages."""
        return f"{self.block_q}x{self.block_k}"

    @classmethod
    def from_name(cls, name: str, order: Order = "sink_diagonal") -> BlockGeometry:
        """The geometry called `name`, for example `"64x128"`."""
        rows, _, keys = name.partition("x")
        if not (rows.isdigit() and keys.isdigit()):
            raise ValueError(f"geometry: expected '<rows>x<keys>' such as '64x128', got {name!r}")
        return cls(int(rows), int(keys), order)


@dataclass(frozen=True)
class SkipRule:
    """When a block may be skipped: only if **every** condition given here agrees.

    All tensors are float32 and broadcast over the dimensions of size 1, so that a rule can hold for
    everything, for one head, or for one request. They are tensors, not numbers, so that a compiled
    graph can change them without recompiling.

    Args:
        log_lambda: `[B|1, Hq|1]`, BLASST: skip if `m_new_i - m_i < log_lambda` for all rows i of
            the block; each < 0 (`-inf` never skips).
        block_threshold: `[B|1, Hq|1, NQ|1]`, BSFA: skip if `max_j s_ij < block_threshold` for all
            rows; never on the causal diagonal.
        max_dropped_mass: `[B|1, Hq|1]`, the budget eps >= 0: skip only while the bound c on the
            mass dropped so far, this block included, is at most `eps * l` for every row.
        keep_sink: with `block_threshold`, never skip block 0. Ours: the paper's rule may drop the
            attention sink, which costs far more accuracy than it saves time.
        expected_sparsity: what share of the blocks this was seen to skip, 0 to 1, or None if
            nobody knows. It decides how a GPU fetches V, and changes no result.
    """

    log_lambda: Tensor | None = None
    block_threshold: Tensor | None = None
    max_dropped_mass: Tensor | None = None
    keep_sink: bool = True
    expected_sparsity: float | None = None

    @classmethod
    def never(cls) -> SkipRule:
        """Skip nothing: exact attention."""
        return cls()

    @classmethod
    def blasst(cls, lam: float | Tensor) -> SkipRule:
        """The relative rule with threshold `lam`: a number, or a tensor `[B|1, Hq|1]`.

        `lam` is clamped to just below 1, where a skipped block can no longer raise the running max.
        """
        lam = torch.as_tensor(lam, dtype=torch.float32)
        if bool((lam < 0).any()) or bool(lam.isnan().any()):
            raise ValueError(f"lambda: expected values in [0, 1), got {lam.tolist()}")
        lam = lam.clamp(max=LARGEST_LAMBDA)
        return cls(log_lambda=lam.log().reshape(lam.shape if lam.dim() == 2 else (1, 1)))

    @classmethod
    def bsfa(cls, threshold: float | Tensor, *, keep_sink: bool = True) -> SkipRule:
        """The absolute rule with `threshold`: a number, or a tensor `[B|1, Hq|1, NQ|1]`."""
        threshold = torch.as_tensor(threshold, dtype=torch.float32)
        if bool(threshold.isnan().any()):
            raise ValueError("threshold: expected finite values or -inf, got NaN")
        shape = threshold.shape if threshold.dim() == 3 else (1, 1, 1)
        return cls(block_threshold=threshold.reshape(shape), keep_sink=keep_sink)

    @classmethod
    def budget(cls, max_dropped_mass: float | Tensor) -> SkipRule:
        """The budget rule: at most `eps / (1 + eps)` of every row's softmax mass is dropped."""
        eps = torch.as_tensor(max_dropped_mass, dtype=torch.float32)
        if bool((eps < 0).any()) or bool(eps.isnan().any()):
            raise ValueError(f"max_dropped_mass: expected values >= 0, got {eps.tolist()}")
        return cls(max_dropped_mass=eps.reshape(eps.shape if eps.dim() == 2 else (1, 1)))

    @property
    def is_never(self) -> bool:
        """Whether no condition is given, so that nothing is ever skipped."""
        return (
            self.log_lambda is None
            and self.block_threshold is None
            and self.max_dropped_mass is None
        )


#: The largest lambda that runs: the float32 just below 1.
LARGEST_LAMBDA = 1.0 - 2.0**-24


@dataclass(frozen=True)
class AttentionCall:
    """One attention to compute, as transformers hands it over.

    A key is visible to a query if it is valid, not after the query (`causal`), and inside the
    `window`. Positions count key columns: query row r stands at column `q_offset + r`.

    Args:
        q: `[B, Hq, Lq, D]`; k: `[B, Hkv, Lk, D]`; v: `[B, Hkv, Lk, Dv]`. Any strides.
        scale: factor on `q k^T`.
        causal: row r sees columns <= `q_offset + r`.
        q_offset: column of query row 0, int64 `[1]` or `[B]`; None is `Lk - Lq` (bottom-right
            aligned). Needed where keys stand beyond the last query: static caches.
        key_valid: bool `[B, Lk]`, False for padding and unwritten cache slots; None is all True.
        window: a row sees columns > position - `window` only; needs `causal`.
        softcap: scores become `softcap * tanh(score / softcap)`.
        sinks: `[Hq]` logits that join every softmax's denominator but have no value (gpt-oss).
            They take no part in skip decisions.
        mask: an arbitrary mask `[B|1, Hq|1, Lq, Lk]`, bool (True is visible) or additive float, on
            top of all the above. Only the dense backend takes it.
        dropout: probability of dropping an attention weight. Only the dense backend takes it.
        first_head: the layer's own number of query head 0: under tensor parallelism a rank holds
            the heads `first_head` to `first_head + Hq - 1`, and per-head thresholds are numbered by
            the whole layer's.
        int8_keys: an int8 copy of k (`Int8Keys.data`), which must be one of just these keys. The
            plain backends ignore it, as it cannot change any result.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    causal: bool = True
    q_offset: Tensor | None = None
    key_valid: Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    mask: Tensor | None = None
    dropout: float = 0.0
    first_head: int = 0
    int8_keys: Tensor | None = None

    @property
    def group(self) -> int:
        """G, the query heads that share one key/value head."""
        return self.q.shape[1] // max(self.k.shape[1], 1)

    @property
    def phase(self) -> Phase:
        """`decode` for up to `DECODE_MAX_QUERIES` queries against more keys, else `prefill`."""
        q_len, kv_len = self.q.shape[2], self.k.shape[2]
        return "decode" if q_len <= DECODE_MAX_QUERIES and kv_len > q_len else "prefill"

    @property
    def needs_grad(self) -> bool:
        """Whether autograd will want gradients of this call."""
        inputs = (self.q, self.k, self.v, self.sinks)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


@dataclass(frozen=True)
class AttentionResult:
    """What a backend returns.

    Args:
        out: `[B, Lq, Hq, Dv]`, contiguous, in q's dtype. Rows that see no key are 0.
        lse: `[B, Hq, Lq]` float32, natural log of the softmax denominator over the kept blocks
            (sinks included); -inf for rows that see nothing. None from the dense backend.
        counts: int64 `[B, Hq, 2]`: blocks visited (they hold a visible key) and of these, skipped.
            None from the dense backend, which has no blocks.
        skips: on request, uint8 `[B, H', NQ, ceil(NK / 8)]`: bit j % 8 of byte j // 8 is 1 if
            block j was skipped. Prefill: H' = Hq and NQ = ceil(Lq / block_q). Decode: H' = Hkv and
            NQ = Lq. Both grids start at the request's own first valid key and at the first query
            that may see it, and queries after its last valid key have no vote (nor the budget's
            protection), so that a padded request decides exactly as it would alone.
        dropped_mass: on request, `[B, Hq, Lq]` float32, the certificate: an upper bound
            `c / (l + c)` on the share of the row's softmax mass that was dropped.
    """

    out: Tensor
    lse: Tensor | None = None
    counts: Tensor | None = None
    skips: Tensor | None = None
    dropped_mass: Tensor | None = None
    backend: str = field(default="", compare=False)


def pack_bits(bits: Tensor) -> Tensor:
    """Bool `[..., N]` to uint8 `[..., ceil(N / 8)]`, the form of `AttentionResult.skips`."""
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8))
    octets = bits.reshape(*bits.shape[:-1], bits.shape[-1] // 8, 8).to(torch.uint8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (octets * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 `[..., ceil(n / 8)]` to bool `[..., n]`."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(-2)[..., :n].bool()
