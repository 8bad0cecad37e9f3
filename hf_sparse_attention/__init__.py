"""Block-sparse attention for transformers: `attn_implementation="blasst"` or `"bsfa"`.

Importing this package registers both names. It patches nothing, loads no kernel and needs no
network.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from transformers import AttentionInterface, AttentionMaskInterface

from hf_sparse_attention._version import __version__
from hf_sparse_attention.attention import blasst_attention, bsfa_attention
from hf_sparse_attention.masks import sparse_attention_mask

if TYPE_CHECKING:
    from hf_sparse_attention.backends import available_backends
    from hf_sparse_attention.calibration import calibrate
    from hf_sparse_attention.config import SparseAttentionConfig
    from hf_sparse_attention.control import load_thresholds, set_sparse_attention
    from hf_sparse_attention.functional import block_skip_attention
    from hf_sparse_attention.fusion import fuse_attention, unfuse_attention
    from hf_sparse_attention.growing_cache import GrowingCache
    from hf_sparse_attention.int8_keys import Int8Keys
    from hf_sparse_attention.key_cache import Int8KeyCache
    from hf_sparse_attention.optimization import optimize_for_cpu
    from hf_sparse_attention.stats import collect_stats
    from hf_sparse_attention.training import SparseAttentionCallback
    from hf_sparse_attention.types import BlockGeometry, SkipRule

#: Where each public name comes from; imported when it is first used.
_HOMES = {
    "BlockGeometry": "types",
    "GrowingCache": "growing_cache",
    "Int8KeyCache": "key_cache",
    "Int8Keys": "int8_keys",
    "SkipRule": "types",
    "SparseAttentionCallback": "training",
    "SparseAttentionConfig": "config",
    "available_backends": "backends",
    "block_skip_attention": "functional",
    "calibrate": "calibration",
    "collect_stats": "stats",
    "fuse_attention": "fusion",
    "load_thresholds": "control",
    "optimize_for_cpu": "optimization",
    "set_sparse_attention": "control",
    "unfuse_attention": "fusion",
}

__all__ = [
    "BlockGeometry",
    "GrowingCache",
    "Int8KeyCache",
    "Int8Keys",
    "SkipRule",
    "SparseAttentionCallback",
    "SparseAttentionConfig",
    "__version__",
    "available_backends",
    "block_skip_attention",
    "calibrate",
    "collect_stats",
    "fuse_attention",
    "load_thresholds",
    "optimize_for_cpu",
    "set_sparse_attention",
    "unfuse_attention",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


for _name, _function in (("blasst", blasst_attention), ("bsfa", bsfa_attention)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sparse_attention_mask)
