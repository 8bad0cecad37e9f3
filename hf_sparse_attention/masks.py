"""The mask function that transformers calls for "blasst" and "bsfa", and how its answer is read.

transformers asks a mask function once a forward (once a layer type) and hands the answer to every
attention call. A 4D mask says everything but costs `B x Lq x Lk`, and hides its own structure. So a
pattern that block skipping understands is returned as a **coded mask** `[B, 1, 1, Lk]`: its dtype
says which pattern it is, its values say what each key column is. It is 4D because transformers
returns a 4D mask unchanged when it meets one a second time, as it does in `generate()` with a
static cache. All else becomes the bool mask that "sdpa" would get, and attention runs dense on it.

What we found in transformers 5.23, and why it is done this way:

- With no mask function registered the attention function gets None whatever the padding: wrong.
- `None` is returned only for what it means everywhere: plain causal, no padding, newest query at
  the newest key, and no window in the config: its keyword may reach layers that have none.
- The window's size is not in the coded mask (a compiled graph could not read it): the attention
  function takes it from the `sliding_window` keyword, as flash attention does, or from the config
  that the mask was made from (Phi-MoE and Qwen2-MoE pass no keyword).
- Bidirectional masks are real bool masks, expanded over the queries with stride 0: as small as a
  coded mask, and right for anyone who reads them. A bool mask that is the same for all queries is
  recognised as key validity wherever it comes from.
- `allow_is_causal_skip=False` asks for a real mask (indexers read it), so we never code then. It
  is also set while decoding on a static cache; there the bool mask `[B, 1, 1, Lk]` of the one
  query *is* key validity, and `read_mask` finds the query's position as the last visible column.
- Two models read their masks without asking for a real one, and one of them only an additive one
  rightly: `MASK_READERS`.
- Under `torch.compile` a packed batch cannot be told from a plain one (transformers assumes it is
  packed whenever neither a mask nor a cache is given): pass `attention_mask` to keep skipping.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing

from hf_sparse_attention.interface import config_value, refuse_foreign
from hf_sparse_attention.mask_patterns import Pattern, recognise, sequence_numbers

#: The dtype of a coded mask says which pattern it is.
CODED: dict[Pattern, torch.dtype] = {
    "causal": torch.int8,
    "windowed": torch.int16,
    "packed": torch.int32,
    "packed_windowed": torch.int64,
}
_PATTERNS = {dtype: pattern for pattern, dtype in CODED.items()}

#: Codes of key columns. Packed masks hold the number of the sequence instead.
PADDING, VALID, UNWRITTEN = 0, 1, 2  # UNWRITTEN: beyond the newest query, as in a static cache

#: `config.model_type` of models that compute with the mask they get, and so need a real one.
MASK_READERS = frozenset({"deepseek_v4", "minimax_m3_vl", "minimax_m3_vl_text"})


def sparse_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    **_: Any,
) -> Tensor | None:
    """The mask for one forward; see the module's text. The signature is transformers' own.

    Args:
        batch_size: B.
        q_length: Lq.
        kv_length: Lk.
        q_offset: position of the first query; a tensor where a static cache counts on the device.
        kv_offset: position of the first key column (sliding caches drop old keys).
        mask_function: says which key a query sees, by position; only ever recognised, never called.
        attention_mask: bool `[B, positions]`, False for padding.
        local_size: the window (or, for chunked attention, the chunk).
        allow_is_causal_skip: False where the caller needs a real mask for a causal pattern.
        use_vmap: the mask function is a user's, and may not broadcast.
        device: where the mask is made.
        dtype: of an additive mask.
        config: the config of the model whose mask this is.
        _: what other implementations need (`allow_is_bidirectional_skip`).

    Returns:
        None (plain causal, nothing padded), a coded mask, or a bool mask `[B, 1, Lq, Lk]` (an
        additive one for `MASK_READERS`).
    """
    if config is not None and not torch.compiler.is_compiling():
        refuse_foreign(config)
    valid = _key_validity(attention_mask, kv_length, kv_offset)
    reads_masks = getattr(config, "model_type", None) in MASK_READERS
    if mask_function is bidirectional_mask_function and not reads_masks:
        if valid is None:
            valid = torch.ones((1, kv_length), dtype=torch.bool, device=device)
        return valid[:, None, None, :].expand(batch_size, 1, q_length, kv_length)

    pattern = None
    if not reads_masks and not use_vmap:
        pattern = recognise(mask_function, local_size, allow_is_causal_skip, config)
    fits = isinstance(q_offset, Tensor) or q_offset + q_length <= kv_offset + kv_length
    if pattern in ("causal", "windowed") and fits:
        end = q_offset + q_length - kv_offset
        aligned = not isinstance(end, Tensor) and end == kv_length
        # With a window in the config, None could be taken for it: the keyword may come without one.
        no_window = pattern == "causal" and config_value(config, "sliding_window") is None
        if no_window and aligned and (valid is None or _is_all_true(valid)):
            return None
        codes = _code_columns(
            CODED[pattern], valid, kv_length, kv_length if aligned else end, device
        )
        return codes.expand(batch_size, -1)[:, None, None, :]
    if pattern in ("packed", "packed_windowed") and valid is None:
        return sequence_numbers(mask_function)[:, None, None, :].to(CODED[pattern])
    make = eager_mask if reads_masks else sdpa_mask
    mask: Tensor = make(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=use_vmap,
        device=device,
        dtype=dtype,
    )
    return mask


def _key_validity(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """Bool `[B, Lk]`: the columns of `attention_mask` that the cache holds; beyond it False."""
    if attention_mask is None:
        return None
    missing = kv_length + kv_offset - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length]


def _code_columns(
    dtype: torch.dtype,
    valid: Tensor | None,
    kv_length: int,
    end: int | Tensor,
    device: torch.device | str,
) -> Tensor:
    """`[B|1, Lk]`: what each key column is; those from `end` on are beyond the newest query."""
    if valid is None:
        codes = torch.ones((1, kv_length), dtype=dtype, device=device)
    else:
        codes = valid.to(dtype)
    if isinstance(end, int) and end >= kv_length:
        return codes
    return codes.masked_fill(torch.arange(kv_length, device=device) >= end, UNWRITTEN)


def _is_all_true(valid: Tensor) -> bool:
    """Whether nothing is padding; False where that cannot be read because a graph is traced."""
    return not is_tracing(valid) and bool(valid.all())


@dataclass(frozen=True)
class MaskReading:
    """What the attention function makes of the mask it was given.

    Args:
        causal, q_offset, key_valid: as in `AttentionCall`.
        windowed: the pattern has a window; where it is False a `sliding_window` keyword is ignored.
        sequences: int64 `[B, Lk]`, the number of the packed sequence that each position is in.
        mask: an arbitrary mask, for dense attention.
    """

    causal: bool
    q_offset: Tensor | None = None
    key_valid: Tensor | None = None
    windowed: bool = False
    sequences: Tensor | None = None
    mask: Tensor | None = None


def read_mask(mask: Tensor | None, q_length: int, kv_length: int, causal: bool) -> MaskReading:
    """Reads what `sparse_attention_mask` (or the user) made, without touching its values.

    Args:
        mask: None, a coded mask, or a bool or additive mask `[B|1, Hq|1, Lq|1, Lk]`.
        q_length: Lq.
        kv_length: Lk.
        causal: what the module says it is; decides only where the mask does not.
    """
    if mask is None:
        return MaskReading(causal, windowed=causal)
    if mask.dim() != 4 or mask.shape[2] not in (1, q_length) or mask.shape[3] != kv_length:
        raise ValueError(
            f"attention mask: expected [B, 1, {q_length}, {kv_length}], got {list(mask.shape)}"
        )
    if mask.dtype in _PATTERNS:
        return _read_coded(mask, q_length)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attention mask: expected bool or floating point, got {mask.dtype}")
    if mask.dtype == torch.bool and _same_for_all_queries(mask):
        valid = mask[:, 0, 0, :]
        if q_length == 1 and causal:
            column = torch.arange(kv_length, device=mask.device)
            newest = torch.where(valid, column, 0).amax(-1)  # decoding: the query is the newest key
            return MaskReading(True, q_offset=newest, key_valid=valid)
        return MaskReading(False, key_valid=valid)
    return MaskReading(False, mask=mask)


def _read_coded(mask: Tensor, q_length: int) -> MaskReading:
    if mask.shape[1] != 1 or mask.shape[2] != 1:
        raise TypeError(
            f"attention mask: expected bool or floating point, got {mask.dtype} {list(mask.shape)}"
        )
    codes = mask[:, 0, 0, :]
    pattern = _PATTERNS[mask.dtype]
    windowed = pattern in ("windowed", "packed_windowed")
    if pattern in ("packed", "packed_windowed"):
        return MaskReading(True, windowed=windowed, sequences=codes.long())
    return MaskReading(
        True,
        q_offset=(codes != UNWRITTEN).sum(-1) - q_length,
        key_valid=codes == VALID,
        windowed=windowed,
    )


def _same_for_all_queries(mask: Tensor) -> bool:
    same_for_heads = mask.shape[1] == 1 or mask.stride(1) == 0
    return same_for_heads and (mask.shape[2] == 1 or mask.stride(2) == 0)
