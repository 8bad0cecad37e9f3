"""Where the callback stands among the trainer's others."""

from __future__ import annotations

import gc
import logging

from transformers import TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback

logger = logging.getLogger(__name__)


def before_reporters(callback: TrainerCallback) -> None:
    """Moves `callback` up in its trainer's list, in front of those that report logs elsewhere.

    A trainer hands each log entry to its callbacks in turn, with TensorBoard, wandb and the
    progress bar before the user's own: they would never see what we add to it. `Trainer` has no
    public way to come before them, and does not tell a callback whose it is, so its list is looked
    for. Without it, the entries are in `state.log_history` alone.
    """
    for owner in gc.get_referrers(callback):
        if isinstance(owner, list) and any(isinstance(x, DefaultFlowCallback) for x in owner):
            owner.remove(callback)
            flow = next(i for i, x in enumerate(owner) if isinstance(x, DefaultFlowCallback))
            owner.insert(flow + 1, callback)
            return
    logger.warning(
        "%s: expected to find its trainer's callbacks, found none: what it logs is only in "
        "trainer.state.log_history",
        type(callback).__name__,
    )
