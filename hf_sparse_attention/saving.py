"""What `set_sparse_attention` gave a model stays with it when transformers or PEFT save it.

They write a config and weights, and know of no file beside them. So the model gets a
`save_pretrained` of its own, on the instance, that adds ours. `model.push_to_hub` and `Trainer` go
through it, too.
"""

from __future__ import annotations

import functools
import inspect
import logging
from pathlib import Path
from types import MethodType
from typing import Any

from transformers import PreTrainedModel

from hf_sparse_attention import storage
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.sharding import is_first

logger = logging.getLogger(__name__)

#: Where a model keeps the settings that are saved with it.
ATTRIBUTE = "_sparse_attention_saved"


def keep_on_save(model: Any, config: SparseAttentionConfig) -> None:
    """From now on `model.save_pretrained` also writes `config`, tables included.

    Args:
        model: a transformers or PEFT model; what cannot save itself is left alone.
        config: takes the place of what was kept before.
    """
    if not hasattr(type(model), "save_pretrained"):
        return
    setattr(model, ATTRIBUTE, config)
    # A bound method, so that a deep copy of the model gets one that saves the copy.
    model.save_pretrained = MethodType(_save_pretrained, model)


#: Options of `save_pretrained(push_to_hub=True)` that `push_to_hub` takes.
_PUSH_OPTIONS = ("repo_id", "commit_message", "create_pr", "private", "token", "max_shard_size")


@functools.wraps(PreTrainedModel.save_pretrained, assigned=("__doc__", "__name__"), updated=())
def _save_pretrained(model: Any, *args: Any, **options: Any) -> None:
    save = type(model).save_pretrained
    call = inspect.signature(save).bind(model, *args, **options)
    folder = Path(call.arguments["save_directory"])
    pushes = call.arguments.pop("push_to_hub", False)
    save(*call.args, **call.kwargs)
    if not (call.arguments.get("is_main_process", True) and is_first()):
        return
    for holder in _holders(folder):
        _write(getattr(model, ATTRIBUTE), holder)
    if pushes:  # only now: what `save` would have pushed lacks our files
        push = {name: options[name] for name in _PUSH_OPTIONS if name in options}
        model.push_to_hub(**{"repo_id": folder.name, **push})


def _holders(folder: Path) -> list[Path]:
    """Where the model was saved: `folder`, or its subfolders where PEFT puts named adapters."""
    if (folder / storage.CONFIG_NAME).is_file() or (folder / storage.ADAPTER_NAME).is_file():
        return [folder]
    return sorted(file.parent for file in folder.glob(f"*/{storage.ADAPTER_NAME}"))


def _write(config: SparseAttentionConfig, folder: Path) -> None:
    try:
        config.save_pretrained(folder)
    except FileNotFoundError as error:  # of the tables: no reason to lose a trained model
        logger.warning(
            "saved without the sparse attention tables, which were not loaded: %s", error
        )
        storage.write_settings(folder, config.to_dict())
