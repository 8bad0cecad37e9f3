"""`inspect`: what a folder or a repository holds."""

from __future__ import annotations

import hashlib
from typing import Any

from hf_sparse_attention_cli.transfer import Json, Revision, Source
from hf_sparse_attention_cli.values import print_json


def inspect(path_or_repo: Source, revision: Revision = None, json: Json = False) -> None:
    """Show what a model's settings hold, and whether they are sound.

    Method, fits by block geometry with the lengths and sparsities that they are valid for, tables,
    the model they belong to, how they were calibrated, files with their sha256, and warnings. The
    table file is checked against the sha256 that config.json pins, and against the model.
    """
    from hf_sparse_attention.config import SparseAttentionConfig
    from hf_sparse_attention_cli.summary import show, summarise

    config = SparseAttentionConfig.from_pretrained(path_or_repo, revision=revision)
    files = _files(path_or_repo, config, revision)
    summary = {"source": path_or_repo, **summarise(config), "files": files}
    if json:
        print_json(summary)
        return
    from rich.console import Console

    show(summary, path_or_repo, Console())


def _files(source: str, config: Any, revision: str | None) -> dict[str, str]:
    """The sha256 of each file that the settings came from."""
    from hf_sparse_attention import storage

    settings, _ = storage.read_settings(source, revision=revision)
    files = [settings]
    if config.thresholds_file is not None:
        pin = storage.commit_of(settings) or revision
        files.append(storage.fetch(source, config.thresholds_file["name"], revision=pin))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
