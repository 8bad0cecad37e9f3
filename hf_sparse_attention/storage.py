"""Where settings are kept: config.json of a local folder or a Hub repository, tables beside it.

A folder that holds a PEFT adapter has no config.json, and must not get one: transformers would take
it for a whole model. There the settings stand in a file of their own, under the same key.

What belongs together is read from one commit: the one that config.json came from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_sparse_attention.config_schema import CONFIG_KEY, OWN_KEY, is_ours
from hf_sparse_attention.thresholds import write_atomically

CONFIG_NAME = "config.json"
ADAPTER_NAME = "adapter_config.json"
#: The settings of an adapter; in every other folder they stand in config.json.
SETTINGS_NAME = "sparse_attention_thresholds.json"

#: How huggingface_hub's cache lays files out: `snapshots/<commit>/<path in the repository>`.
_IN_CACHE = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]")


def fetch(source: str | Path, name: str, *, subfolder: str = "", **download: Any) -> Path:
    """The local path of `source`'s file `name`, downloaded if `source` is a Hub repository.

    Args:
        source: a local folder, else a repository such as `"org/model"`.
        name: the file's name.
        subfolder: the folder in `source` that holds it.
        download: arguments of `huggingface_hub.hf_hub_download`: `revision`, `token`, ...

    Raises:
        FileNotFoundError: the file is not there, or neither the cache nor the Hub can be read.
        ConnectionError: the download broke off.
        huggingface_hub.errors.RepositoryNotFoundError, ...: the Hub refuses.
    """
    if Path(source).is_dir():
        file = Path(source, subfolder, name)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: expected this file, found none")
        return file
    from huggingface_hub import errors, hf_hub_download

    where = f"the Hub repository {str(source)!r}"
    try:
        return Path(hf_hub_download(str(source), name, subfolder=subfolder or None, **download))
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: expected it in the local cache, or {where} within reach; got neither "
            f"({error.__cause__ or error})"
        ) from error
    except (errors.EntryNotFoundError, errors.HFValidationError) as error:
        raise FileNotFoundError(
            f"{name}: expected it in a local folder, or in {where}, found none ({error})"
        ) from error
    except errors.HfHubHTTPError:
        raise  # says what the Hub refused
    except errors.HTTPError as error:  # type: ignore[attr-defined]  # httpx's, or httpx2's
        raise ConnectionError(f"{name}: the download from {where} broke off ({error})") from error


def commit_of(file: Path) -> str | None:
    """The commit that a file in the Hub's cache is of; None for a file elsewhere."""
    found = _IN_CACHE.search(str(file))
    return found[1] if found else None


def read_settings(source: str | Path, **download: Any) -> tuple[Path, dict[str, Any]]:
    """The file that holds the settings of `source`, and its content.

    Args:
        source: a local folder or a Hub repository.
        download: as for `fetch`.

    Raises:
        FileNotFoundError: there is neither config.json nor an adapter's settings file.
        ValueError: neither has settings, or is no JSON.
    """
    missing: FileNotFoundError | None = None
    seen: tuple[Path, dict[str, Any]] | None = None
    for name in (CONFIG_NAME, SETTINGS_NAME):
        try:
            file = fetch(source, name, **download)
        except FileNotFoundError as error:
            missing = missing or error
            continue
        content = read_json(file)
        if CONFIG_KEY in content:
            return file, content
        seen = seen or (file, content)
    if seen is not None:
        file, content = seen
        raise ValueError(f"{file}: expected the key {CONFIG_KEY!r}, got {sorted(content)}")
    assert missing is not None
    raise missing


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        ValueError: there is something else; names the file.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got something else ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def write_settings(folder: str | Path, settings: Mapping[str, Any]) -> Path:
    """Puts `settings` into `folder`'s file for them; all else that the file says stays.

    Returns:
        The file: config.json, or the settings file beside an adapter that has no config.json.

    Raises:
        ValueError: config.json uses the key for something else, as a few models do.
    """
    file = Path(folder, CONFIG_NAME)
    if not file.is_file() and Path(folder, ADAPTER_NAME).is_file():
        file = Path(folder, SETTINGS_NAME)
    content = read_json(file) if file.is_file() else {}
    present = content.get(CONFIG_KEY)
    if present is not None and not is_ours(present):
        raise ValueError(
            f"{file}: expected {CONFIG_KEY!r} to be absent or ours to replace, got a "
            f"{type(present).__name__} that the model itself consumes"
        )
    json.dumps(settings, allow_nan=False)  # not of ours; a model's own config may hold Infinity
    content[CONFIG_KEY] = settings
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(file, text.encode())
    return file


def place_of(source: str, pin: Mapping[str, str]) -> dict[str, str]:
    """Where a model that was loaded from `source` has its table file: `revision`, `subfolder`.

    transformers does not say which revision or subfolder it loaded. But its config.json is in the
    folder or in the Hub's cache, and names the file that `pin` pins. Without such a config.json
    (in another cache folder, say) nothing is known.
    """
    from huggingface_hub import constants, errors
    from huggingface_hub.file_download import repo_folder_name

    if Path(source).is_dir():
        folders = [Path(source)]
    else:
        try:
            repository = repo_folder_name(repo_id=source, repo_type="model")
        except errors.HFValidationError:  # a folder that is no more
            return {}
        folders = list(Path(constants.HF_HUB_CACHE, repository, "snapshots").glob("*"))
    for folder in folders:
        for file in (folder / CONFIG_NAME, *folder.glob(f"*/{CONFIG_NAME}")):
            if file.is_file() and _names(file, pin):
                subfolder = "" if file.parent == folder else file.parent.name
                commit = commit_of(file)
                return {"subfolder": subfolder, **({"revision": commit} if commit else {})}
    return {}


def _names(file: Path, pin: Mapping[str, str]) -> bool:
    """Whether the settings in `file` name the table file that `pin` pins."""
    try:
        return bool(read_json(file)[CONFIG_KEY][OWN_KEY].get("thresholds_file") == pin)
    except (AttributeError, KeyError, OSError, TypeError, ValueError):
        return False
