"""Which models reach our attention functions, and which accept the name and ignore it.

transformers takes any registered name for `attn_implementation`, also for a model that computes
its attention by itself. Such a model asks our mask function for a mask and then never calls our
attention function: with a coded mask, or none, it would compute nonsense. So it is refused there.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from typing import Any

#: Attention classes written in a model's own file.
_OWN_ATTENTION = re.compile(r"^class \w*Attention\w*\(nn\.Module\):", re.MULTILINE)
_INTERFACE = "ALL_ATTENTION_FUNCTIONS.get_interface("

#: `config.model_type` of models that use the interface in one part only, and not in this one.
_PARTLY = frozenset({"git"})


def refuse_foreign(config: Any) -> None:
    """Raises if the model of this config does not go through transformers' attention interface.

    Raises:
        ValueError: names the model class.
    """
    kind = type(config)
    if _is_foreign(kind.__module__.rpartition(".")[0], getattr(config, "model_type", "")):
        names = getattr(config, "architectures", None) or [kind.__name__]
        raise ValueError(foreign_message(", ".join(names)))


def config_value(config: Any, name: str) -> Any:
    """`config.name`, or None; also where a config refuses to say: its layers differ (Gemma 4)."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def foreign_message(model: str) -> str:
    """What to tell the user of a model that cannot be served."""
    return (
        f"{model} does not go through transformers' AttentionInterface, so block-sparse attention "
        'cannot reach it; load it with attn_implementation="eager" (or "sdpa" where it has that)'
    )


@functools.lru_cache
def _is_foreign(package: str, model_type: str) -> bool:
    """Whether the models in `package` compute their attention themselves.

    Reads their source, by the same signs as transformers' own `_can_set_attn_implementation`.
    """
    if model_type in _PARTLY:
        return True
    prefix = f"{package}.modeling_"
    modules = [x for name, x in list(sys.modules.items()) if package and name.startswith(prefix)]
    try:
        sources = [inspect.getsource(module) for module in modules]
    except (OSError, TypeError):
        return False
    own = any(_OWN_ATTENTION.search(source) for source in sources)
    return own and not any(_INTERFACE in source for source in sources)
