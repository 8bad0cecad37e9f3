"""What `attn_implementation="hf-sparse-attention/block-skip-attention"` binds in transformers.

Calibrated models bring thresholds in their config's `sparse_attention_config` (as written by
hf-sparse-attention or ModelOpt); others run within a budget of dropped softmax mass. transformers
hands over masks as it makes them for SDPA: none where attention is plainly causal, else written
out. A mask that is written out is read where there is one query; a prefill under one runs dense, as
do dropout and short inputs. Everything else (padded prefill, windows, more methods, statistics) is
what the package hf-sparse-attention is for.
"""

import math
import re

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .choice import ops_for, say_once

#: transformers looks for this name beside `flash_attn_forward`.
supports_flash_attn = True

#: Inputs with fewer keys run dense: there the decisions cost more than they save.
MIN_LENGTH = 256
_LARGEST_LOG_LAMBDA = math.log(1.0 - 2.0**-24)
#: The budget of a model without thresholds: at most eps / (1 + eps) of a row's mass is dropped.
MAX_DROPPED_MASS = 0.1

_DECODE_MAX_QUERIES = 8
# The geometry that config.json's thresholds are for; the table of others is the package's.
_BLOCK_Q, _BLOCK_K, _SINK_DIAGONAL, _SPLIT_K = 64, 128, 1, 1024


def flash_attn_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention in transformers' signature.

    Args:
        module: the attention module; its `is_causal` and its config's thresholds are used.
        query: `[B, Hq, Lq, D]`.
        key: `[B, Hkv, Lk, D]`.
        value: `[B, Hkv, Lk, Dv]`.
        attention_mask: as for SDPA: None, or bool or additive `[B|1, Hq|1, Lq, Lk]`.
        dropout: probability; above 0 runs dense.
        scaling: factor on the scores; None is `D ** -0.5`.
        is_causal: overrides the module's.
        softcap: `softcap * tanh(score / softcap)`.
        s_aux: `[Hq]` attention sinks.
        kwargs: `position_bias` is refused; the rest concerns other layers.

    Returns:
        The output `[B, Lq, Hq, Dv]`, contiguous, and None.
    """
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError("block-skip-attention: position biases have no block structure")
    if not query.dtype == key.dtype == value.dtype:  # autocast may leave q and k in float32
        query, key = query.to(value.dtype), key.to(value.dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q_len, kv_len = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and q_len > 1
    key_valid = _read(attention_mask, query, key)
    readable = attention_mask is None or key_valid is not None
    if not readable or dropout > 0 or kv_len < MIN_LENGTH:
        if softcap is None and s_aux is None:
            out = _dense(query, key, value, attention_mask, dropout, scale, causal)
            return out.transpose(1, 2).contiguous(), None
        if not readable or dropout > 0:
            raise NotImplementedError(
                "block-skip-attention: softcap or attention sinks together with dropout or a "
                "written-out mask: expected the package hf-sparse-attention and "
                'attn_implementation="blasst"'
            )
    log_lambda, budget, expected_sparsity = _rule(module, query, key, key_valid)
    return_skips = torch.is_grad_enabled()  # the backward reads them
    return ops_for(query, key, value, scale, _BLOCK_Q, _BLOCK_K).forward(
        query,
        key,
        value,
        key_valid,
        None,
        None if s_aux is None else s_aux.float().reshape(-1),
        log_lambda,
        None,
        budget,
        scale,
        causal,
        0,
        softcap or 0.0,
        _BLOCK_Q,
        _BLOCK_K,
        _SINK_DIAGONAL,
        _SPLIT_K,
        True,
        return_skips,
        False,
        None,
        expected_sparsity,
    )[0], None


def _read(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Which keys a single query sees, bool `[B, Lk]`; None where the mask says anything else."""
    if mask is None or mask.dtype != torch.bool or q.shape[2] != 1 or mask.shape[1] != 1:
        return None
    return mask[:, 0, 0, : k.shape[2]].expand(q.shape[0], -1)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float, causal: bool
) -> Tensor:
    if mask is not None:
        mask = mask[..., : k.shape[2]]
    return scaled_dot_product_attention(
        q, k, v, mask, dropout, causal, scale=scale, enable_gqa=True
    )


def _rule(
    module: nn.Module, q: Tensor, k: Tensor, key_valid: Tensor | None
) -> tuple[Tensor | None, Tensor | None, float]:
    """The op's `log_lambda`, `max_dropped_mass` and `expected_sparsity`.

    The config's thresholds and what they were fitted to skip, else the budget.
    """
    phase = "decode" if q.shape[2] <= _DECODE_MAX_QUERIES and k.shape[2] > q.shape[2] else "prefill"
    group = skip_softmax_group(getattr(module, "config", None))
    if is_left_out(group, module):
        return None, None, 0.0
    log_factor = log_scale_factor(group, phase)
    if log_factor is None:
        say_once(
            f"no thresholds for {phase} in the model's sparse_attention_config: every attention "
            f"row keeps all but {MAX_DROPPED_MASS / (1 + MAX_DROPPED_MASS):.0%} of its softmax mass"
        )
        return None, q.new_full((1, 1), MAX_DROPPED_MASS, dtype=torch.float32), 0.0
    lengths = q.new_full((1, 1), k.shape[2], dtype=torch.float32)
    if key_valid is not None:
        lengths = key_valid.sum(1, keepdim=True).clamp(min=1).float()
    expected = (group.get("target_sparsity") or {}).get(phase, 0.5)
    return (log_factor - lengths.log()).clamp(max=_LARGEST_LOG_LAMBDA), None, expected


def skip_softmax_group(config: object) -> dict:
    """The one skip_softmax group of the config's `sparse_attention_config`; empty without one."""
    settings = getattr(config, "sparse_attention_config", None)
    groups = (settings.get("config_groups") or {}) if isinstance(settings, dict) else {}
    found = [
        group
        for group in groups.values()
        if isinstance(group, dict) and group.get("algorithm") == "skip_softmax"
    ]
    return found[0] if len(found) == 1 else {}


def is_left_out(group: dict, module: nn.Module) -> bool:
    """Whether the group's `targets` or `ignore` leave this layer dense.

    A module knows its number, not its name. An `ignore` without a number may mean any layer.
    """
    targets = group.get("targets") or []
    if targets and type(module).__name__ not in targets:
        return True
    ignored = group.get("ignore") or []
    numbers = [re.findall(r"(?:^|\.)(\d+)(?=\.|$)", pattern) for pattern in ignored]
    if not all(numbers):
        say_once(f"runs dense: expected layer numbers in the config's `ignore`, got {ignored}")
    layer = str(getattr(module, "layer_idx", None))
    return any(not each or layer in each for each in numbers)


def log_scale_factor(group: dict, phase: str) -> float | None:
    """ln(a * exp(b * target_sparsity)); None where there is no fit for the phase."""
    fit = (group.get("threshold_scale_factor") or {}).get(phase)
    if not isinstance(fit, dict) or not fit.get("a", 0) > 0:
        return None
    target = (group.get("target_sparsity") or {}).get(phase, 0.0)
    return math.log(fit["a"]) + fit.get("b", 0.0) * target
