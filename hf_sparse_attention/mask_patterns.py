"""Which attention pattern a mask function of transformers stands for.

transformers describes patterns by functions of positions, made by composing closures. A pattern is
recognised by the code objects of those closures, compared with ones made here for the purpose: any
other composition, or another version's, is not recognised and gets a written-out mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from hf_sparse_attention.interface import config_value

Pattern = Literal["causal", "windowed", "packed", "packed_windowed"]


def _packed_probe() -> Callable[..., Any] | None:
    """A mask function of packed sequences; None where transformers makes it otherwise (5.20)."""
    make = getattr(masking_utils, "packed_sequence_compatibility_function", None)
    if make is None:
        return None
    probe: Callable[..., Any] = make(causal_mask_function, torch.zeros(1, 1), torch.zeros(1, 1))
    return probe


_WINDOW_PROBE = sliding_window_causal_mask_function(1)
_PACKED_PROBE = _packed_probe()


def recognise(
    mask_function: Callable[..., Any],
    local_size: int | None,
    allow_is_causal_skip: bool,
    config: Any,
) -> Pattern | None:
    """The pattern of `mask_function`, or None where it is none that we know.

    Compares the code objects of transformers' closures. Their contents cannot be read while a graph
    is traced; there `local_size` stands in, which means the same unless the config has chunks too.
    """
    if allow_is_causal_skip and mask_function is causal_mask_function:
        return "causal"
    if torch.compiler.is_compiling():
        windowed = (
            allow_is_causal_skip
            and getattr(mask_function, "__code__", None) is _WINDOW_PROBE.__code__
            and local_size is not None
            and local_size == config_value(config, "sliding_window")
            and config_value(config, "attention_chunk_size") is None
        )
        return "windowed" if windowed else None
    if allow_is_causal_skip and _window_of(mask_function) is not None:
        return "windowed"
    if _PACKED_PROBE is None or not _same_code(mask_function, _PACKED_PROBE):
        return None
    parts = _cell(mask_function)
    if len(parts) != 2 or not all(map(_same_code, parts, _cell(_PACKED_PROBE))):
        return None
    inner = next(c for c in (x.cell_contents for x in parts[1].__closure__) if callable(c))
    if inner is causal_mask_function:
        return "packed"
    return "packed_windowed" if _window_of(inner) is not None else None


def sequence_numbers(mask_function: Callable[..., Any]) -> Tensor:
    """Int64 `[B, L]`: which packed sequence each position is in; for a function found packed."""
    numbers: Tensor = _cell(_cell(mask_function)[0])
    return numbers


def _window_of(mask_function: Callable[..., Any]) -> int | None:
    """The window of a sliding-window causal mask function; None for any other function."""
    if not _same_code(mask_function, _WINDOW_PROBE):
        return None
    parts = _cell(mask_function)
    overlay = _cell(_WINDOW_PROBE)[0]
    if len(parts) != 2 or parts[1] is not causal_mask_function or not _same_code(parts[0], overlay):
        return None
    return int(_cell(parts[0]))


def _same_code(a: Any, b: Any) -> bool:
    return getattr(a, "__code__", None) is b.__code__


def _cell(function: Any) -> Any:
    """What the first cell of a closure holds."""
    return function.__closure__[0].cell_contents
