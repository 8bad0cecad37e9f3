"""Reading and writing the key `sparse_attention_config` of other tools' files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_sparse_attention.config_schema import CONFIG_KEY, OWN_KEY, is_ours
from hf_sparse_attention.thresholds import write_atomically

#: Models (by the start of model_type) that read settings of their own from this key. They take the
#: key away when they load, so the loaded config does not show it.
CONSUMERS = ("minimax_m3", "step3p5", "step3p7")

#: vLLM takes a file of this name for the settings of its dual-chunk models.
TAKEN_NAME = "sparse_attention_config.json"


def foreign_use(config: Mapping[str, Any]) -> str | None:
    """Why the key does not belong to us in the model whose config.json holds `config`, or None."""
    for part in (config, config.get("text_config", {})):
        if not isinstance(part, Mapping):
            continue
        kind = str(part.get("model_type", ""))
        if kind.startswith(CONSUMERS):
            return f"{kind} models read settings of their own from {CONFIG_KEY!r}"
        if part.get(CONFIG_KEY) is not None and not is_ours(part[CONFIG_KEY]):
            return f"its {CONFIG_KEY!r} holds settings of the model itself"
    return None


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is not a JSON object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected this file, found none")
    try:
        content = json.loads(file.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: expected JSON, got something else ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got a {type(content).__name__}")
    return content


def write_key(content: Mapping[str, Any], target: str | Path) -> Path:
    """Writes what `export(config, "modelopt")` gave into a checkpoint, or into a file of its own.

    Args:
        content: `{"sparse_attention_config": {...}}`.
        target: a folder with a config.json, which gets the key and keeps all else, our own part of
            the key included; or a JSON file to write.

    Returns:
        The file that was written.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: the model uses the key for itself, or the file's name is taken.
    """
    target = Path(target)
    written = dict(content)
    if target.is_dir():
        target = target / "config.json"
        model = read_json(target)
        if reason := foreign_use(model):
            raise ValueError(f"{target}: expected a model without use for the key, but {reason}")
        ours = model.get(CONFIG_KEY, {}).get(OWN_KEY)
        kept = {} if ours is None else {OWN_KEY: ours}
        written = {**model, CONFIG_KEY: {**content[CONFIG_KEY], **kept}}
    return write_text(json.dumps(written, indent=2, sort_keys=True, allow_nan=False), target)


def write_text(text: str, file: str | Path) -> Path:
    """Writes `text`, what an export gave, to `file`, atomically.

    Raises:
        ValueError: the file's name is taken.
    """
    file = Path(file)
    if file.name == TAKEN_NAME:
        raise ValueError(
            f"{file}: expected another name: vLLM reads {TAKEN_NAME} for its dual-chunk models"
        )
    write_atomically(file, f"{text}\n".encode())
    return file
