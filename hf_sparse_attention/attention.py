"""The attention functions that transformers calls under the names "blasst" and "bsfa".

With `masks.py` the only place that knows transformers' attention interface. A call is read into an
`AttentionCall`; the layer's settings and its method give the `SkipRule`; a backend does the work.
What block skipping cannot express (arbitrary masks, dropout, attention weights) and what it is not
worth for (short inputs) runs dense, counted and said once. Nothing is ignored in silence.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attention.backends import choose_geometry
from hf_sparse_attention.backends.dense import visibility
from hf_sparse_attention.config import MethodName
from hf_sparse_attention.functional import attend, attend_dense
from hf_sparse_attention.int8_keys import attached
from hf_sparse_attention.interface import config_value
from hf_sparse_attention.masks import MaskReading, read_mask
from hf_sparse_attention.methods import METHODS
from hf_sparse_attention.settings import LayerSettings, settings_of, warn_of_length
from hf_sparse_attention.types import AttentionCall

logger = logging.getLogger(__name__)

Output = tuple[Tensor, Tensor | None]

_said: set[str] = set()


def blasst_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Output:
    """Attention with BLASST's relative rule; arguments as in `sparse_attention`."""
    return sparse_attention("blasst", module, *args, **kwargs)


def bsfa_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Output:
    """Attention with BSFA's absolute thresholds; arguments as in `sparse_attention`."""
    return sparse_attention("bsfa", module, *args, **kwargs)


def sparse_attention(
    method: MethodName,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> Output:
    """The attention function in transformers' signature.

    Args:
        method: "blasst" or "bsfa".
        module: the attention module; its `is_causal`, `config` and `layer_idx` are used if present.
        query: `[B, Hq, Lq, D]`.
        key: `[B, Hkv, Lk, D]`.
        value: `[B, Hkv, Lk, Dv]`.
        attention_mask: what `masks.sparse_attention_mask` made, or the user's bool or additive mask
            `[B|1, Hq|1, Lq|1, Lk]`.
        dropout: probability; above 0 runs dense.
        scaling: factor on the scores; None is `D ** -0.5`.
        is_causal: overrides the module's.
        sliding_window: keys a query sees; used where the mask has a window.
        softcap: `softcap * tanh(score / softcap)`.
        s_aux: `[Hq]` attention sinks.
        position_bias: `[B|1, Hq, Lq, Lk]`, added to the scores; runs dense.
        cache: a paged cache; refused.
        output_attentions: also return the weights `[B, Hq, Lq, Lk]`; runs dense.
        kwargs: `cu_seq_lens_*` are checked against the mask; the rest concerns other layers.

    Returns:
        The output `[B, Lq, Hq, Dv]`, contiguous, and the weights or None.
    """
    _refuse(module, cache, attention_mask, kwargs)
    int8_keys, cached = attached(key), key
    query, key, value = _same_dtype(*_same_batch(query, key, value))
    if key.shape != cached.shape or key.dtype != cached.dtype:
        int8_keys = None
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    reading = read_mask(attention_mask, query.shape[2], key.shape[2], is_causal)
    call = AttentionCall(
        q=query,
        k=key,
        v=value,
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        causal=reading.causal,
        q_offset=reading.q_offset,
        key_valid=_expand_rows(reading.key_valid, query.shape[0]),
        window=_window(module, sliding_window, reading, attention_mask),
        softcap=softcap,
        sinks=None if s_aux is None else s_aux.reshape(-1),
        mask=_biased(reading.mask, position_bias, key.shape[2]),
        dropout=float(dropout),
        int8_keys=int8_keys,
    )
    settings = settings_of(module, method)
    if reading.sequences is None:
        return _run(module, call, settings, bool(output_attentions))
    if output_attentions or call.dropout > 0 or call.mask is not None:
        return _run(module, _masked_by_sequence(call, reading), settings, bool(output_attentions))
    return _run_packed(module, call, reading.sequences, settings), None


def _run(
    module: nn.Module, call: AttentionCall, settings: LayerSettings, weights: bool = False
) -> Output:
    # Vision towers and the like have no layer numbers; a number that no layer has keeps them apart.
    layer = -call.q.shape[1] if settings.layer is None else settings.layer
    if settings.heads != call.q.shape[1]:
        call = replace(call, first_head=settings.first_head(call.q.shape[1]))
    observer = getattr(module, "_sparse_attention_observer", None)
    observed = None if observer is None else observer.observe(layer, call)
    stats = getattr(module, "_sparse_attention_stats", None)
    reason = "calibration" if observer is not None else _dense_reason(call, settings, weights)
    if reason is not None:
        if stats is not None:
            stats.record_dense(layer, call, reason)
        if weights:
            return _with_weights(call)
        if observed is not None:
            return observed, None
        return attend_dense(call, settings.config.backend).out, None
    config = settings.config
    geometry = choose_geometry(call, settings.geometries, config.backend)
    if not torch.compiler.is_compiling():
        warn_of_length(config, geometry, call)
    rule = METHODS[config.method].rule(config, layer, call, geometry)
    result = attend(
        call,
        rule,
        geometry,
        config.backend,
        return_dropped_mass=stats is not None and stats.wants_dropped_mass,
    )
    if stats is None:
        return result.out, None
    if result.counts is None:
        reason = (
            "nothing to skip" if rule.is_never else "no block-skipping backend can run the call"
        )
        stats.record_dense(layer, call, reason)
    else:
        stats.record(layer, call, result, geometry)
    return result.out, None


def _dense_reason(call: AttentionCall, settings: LayerSettings, weights: bool) -> str | None:
    """Why this call runs dense, or None. What the user did not ask for is also said, once."""
    if settings.dense_reason is not None:
        return settings.dense_reason
    if settings.config.method == "bsfa" and not call.causal and call.mask is None:
        return "BSFA's thresholds are for causal attention"
    if call.k.shape[2] < settings.min_length:
        return f"fewer keys than min_length {settings.min_length}"
    reason = None
    if weights:
        reason = "output_attentions asks for the attention weights"
    elif call.mask is not None:
        reason = "an arbitrary attention mask or position bias has no block structure"
    elif call.dropout > 0:
        reason = "attention dropout cannot be combined with block skipping"
    if reason is not None and not torch.compiler.is_compiling() and reason not in _said:
        _said.add(reason)
        logger.warning("attention runs dense: %s", reason)
    return reason


def _run_packed(
    module: nn.Module, call: AttentionCall, sequences: Tensor, settings: LayerSettings
) -> Tensor:
    """Each packed sequence as a request of its own, which is what it is."""
    rows = []
    for b, numbers in enumerate(sequences.expand(call.q.shape[0], -1)):
        lengths = torch.unique_consecutive(numbers, return_counts=True)[1].tolist()
        q, k, v = (torch.split(x[b : b + 1], lengths, dim=2) for x in (call.q, call.k, call.v))
        parts = (replace(call, q=q[i], k=k[i], v=v[i]) for i in range(len(lengths)))
        outs = [_run(module, part, settings)[0] for part in parts]
        rows.append(torch.cat(outs, dim=1))
    return torch.cat(rows)


def _masked_by_sequence(call: AttentionCall, reading: MaskReading) -> AttentionCall:
    """A packed call as one call with a written-out mask, for dense attention."""
    assert reading.sequences is not None
    same = reading.sequences[:, None, :, None] == reading.sequences[:, None, None, :]
    if call.mask is None:
        return replace(call, mask=same)
    return replace(call, mask=call.mask.masked_fill(~same, torch.finfo(call.mask.dtype).min))


def _with_weights(call: AttentionCall) -> Output:
    """Attention written out as eager does it: the output and the weights `[B, Hq, Lq, Lk]`."""
    k, v = (x.repeat_interleave(call.group, 1) for x in (call.k, call.v))
    scores = call.scale * call.q @ k.transpose(2, 3)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    visible = visibility(call, 0, call.q.shape[2])
    if call.mask is not None and call.mask.dtype == torch.bool:
        visible = visible & call.mask
    elif call.mask is not None:
        scores = scores + call.mask
    scores = scores.float().masked_fill(~visible, -torch.inf)
    if call.sinks is not None:
        sink = call.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[2]]
    weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0.0).to(v.dtype)
    weights = nn.functional.dropout(weights, call.dropout)
    return (weights @ v).transpose(1, 2).contiguous(), weights


def _refuse(module: nn.Module, cache: Any, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Raises for arguments that change the result and that we do not serve."""
    name = type(module).__name__
    if cache is not None:
        raise NotImplementedError(
            f"{name}: paged caches (continuous batching) are not supported; "
            'use attn_implementation="sdpa" for it'
        )
    if kwargs.get("sinks") is not None:
        raise NotImplementedError(
            f"{name}: sinks that differ from query to query are not supported, only s_aux [heads]"
        )
    lengths = kwargs.get("cu_seq_lens_q")
    if lengths is not None and lengths.numel() > 2 and mask is None:
        raise ValueError(
            f"{name}: expected position_ids that start anew with each packed sequence, and neither "
            "attention_mask nor a cache; got cu_seq_lens_q alone, which only flash attention reads"
        )


def _same_batch(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Expands a batch of 1 to the others' (learned queries against a batch of keys)."""
    batch = max(x.shape[0] for x in tensors)
    return tuple(x.expand(batch, -1, -1, -1) if x.shape[0] == 1 else x for x in tensors)


def _same_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value in one dtype.

    Under autocast its own, as SDPA does; else, where they differ (PEFT keeps norms in float32), the
    value's, which no norm has touched.
    """
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device) and all(x.dtype != torch.float64 for x in tensors):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = tensors[-1].dtype
    return tuple(x if x.dtype == dtype else x.to(dtype) for x in tensors)


def _expand_rows(key_valid: Tensor | None, batch: int) -> Tensor | None:
    return None if key_valid is None else key_valid.expand(batch, -1)


def _window(
    module: nn.Module, keyword: int | None, reading: MaskReading, mask: Tensor | None
) -> int | None:
    """The window, if the mask has one: the keyword, else (Phi-MoE, Qwen2-MoE) the config's."""
    if not reading.windowed:
        return None
    window = keyword
    if window is None and mask is not None:
        window = config_value(getattr(module, "config", None), "sliding_window")
        if window is None:
            raise ValueError(
                f"{type(module).__name__}: expected the keyword sliding_window (or the config's) "
                "with a sliding-window mask, got none"
            )
    return window


def _biased(mask: Tensor | None, bias: Tensor | None, kv_length: int) -> Tensor | None:
    """`bias` joined with `mask` into one additive mask."""
    if bias is None:
        return mask
    bias = bias[..., :kv_length]
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
    return bias + mask
