"""Training under sparsity: a callback for `transformers.Trainer`, and the schedules it follows.

`schedules.py` is arithmetic on step numbers, `checks.py` refuses what would go wrong later,
`meter.py` counts what was skipped, `recalibration.py` finds thresholds for the trained model, and
`callback.py` brings them together.
"""

from __future__ import annotations

from hf_sparse_attention.training.callback import SparseAttentionCallback
from hf_sparse_attention.training.schedules import Schedule

__all__ = ["Schedule", "SparseAttentionCallback"]
