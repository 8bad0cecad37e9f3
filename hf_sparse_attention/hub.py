"""Pushing to the Hub: settings, tables, model card and, on request, the model, in one commit."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from hf_sparse_attention import model_card, storage
from hf_sparse_attention._version import __version__
from hf_sparse_attention.fingerprint import ModelFingerprint

if TYPE_CHECKING:
    from hf_sparse_attention.config import SparseAttentionConfig

#: Files of the repository that a push adds to, and so must read first.
_MERGED = (storage.CONFIG_NAME, storage.ADAPTER_NAME, storage.SETTINGS_NAME, model_card.NAME)
#: How often a push starts anew because somebody else has pushed in between.
_ATTEMPTS = 5


def push(
    config: SparseAttentionConfig,
    repo_id: str,
    *,
    model: Any = None,
    tokenizer: Any = None,
    attachments: Mapping[str, str | Path] | None = None,
    base_model: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Pushes `config` to `repo_id`, which is made if it is not there.

    In one commit: the settings in config.json, whose other fields stay as they are in the
    repository; the table file; a section of README.md. If somebody else pushes in between, it is
    done again on top of theirs.

    Args:
        config: the settings, with their tables.
        repo_id: such as `"org/model"`: a model, an adapter, or a repository for this alone.
        model: a transformers or PEFT model, to be pushed in the same commit.
        tokenizer: the same for a tokenizer or processor.
        attachments: plots, reports and Markdown for the model card: local files by title.
        base_model: the repository of the model that these thresholds are for, if it is another.
        revision: branch to push to, made if it is not there; None is main.
        private: whether a repository made here is private; None: as its owner has set.
        token: of the Hub; None: the one of `hf auth login` or HF_TOKEN.
        commit_message: None: says what is pushed.
        create_pr: open a pull request instead of pushing to the branch.

    Returns:
        The commit; `oid` pins it, `pr_url` is the pull request.

    Raises:
        ValueError: the repository's model is another, or uses our key for itself.
        FileNotFoundError: the tables were never loaded, or an attachment is not there.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses; nothing was changed.
    """
    if config.tables is None and config.thresholds_file is not None:
        raise FileNotFoundError(
            f"push_to_hub: expected the tables of {config.thresholds_file['name']} to be loaded, "
            "got settings alone; SparseAttentionConfig.from_pretrained loads both"
        )
    for attached in (attachments or {}).values():
        if not Path(attached).is_file():
            raise FileNotFoundError(f"attachments: expected a file, got {str(attached)!r}")
    if commit_message is None:
        what = "model with sparse attention thresholds" if model is not None else "thresholds"
        commit_message = f"Upload {what}"
    api = HfApi(token=token, library_name="hf-sparse-attention", library_version=__version__)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr/"):
        _make_branch(api, repo_id, revision, create_pr)
    for attempt in range(_ATTEMPTS):
        present = api.model_info(repo_id, revision=revision)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for there in present.siblings or ():
                if there.rfilename in _MERGED:
                    copy = api.hf_hub_download(repo_id, there.rfilename, revision=present.sha)
                    shutil.copyfile(copy, folder / there.rfilename)
            if model is None:
                _check_same_model(config, folder, repo_id)
            config.save_pretrained(folder, model=model)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            model_card.write_section(
                folder, config, repo_id, revision, attachments or {}, base_model
            )
            operations = [
                CommitOperationAdd(file.relative_to(folder).as_posix(), file)
                for file in sorted(folder.rglob("*"))
                if file.is_file()
            ]
            try:
                return api.create_commit(
                    repo_id,
                    operations,
                    commit_message=commit_message,
                    revision=revision,
                    create_pr=create_pr,
                    parent_commit=present.sha,
                )
            except HfHubHTTPError as error:
                moved = error.response is not None and error.response.status_code in (409, 412)
                if not moved or attempt == _ATTEMPTS - 1:
                    raise
    raise AssertionError("the last attempt returns or raises")


def _make_branch(api: HfApi, repo_id: str, branch: str, create_pr: bool) -> None:
    try:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    except HfHubHTTPError as error:
        # Who may only open pull requests may not make branches, and need not if it is there.
        if not (create_pr and error.response is not None and error.response.status_code == 403):
            raise


def _check_same_model(config: SparseAttentionConfig, folder: Path, repo_id: str) -> None:
    """Refuses to put tables beside a model that they were not calibrated on."""
    file = folder / storage.CONFIG_NAME
    if config.tables is None or not file.is_file():
        return
    present = ModelFingerprint.of(storage.read_json(file))
    if differences := present.differences(config.tables.fingerprint):
        raise ValueError(
            f"{repo_id}: expected thresholds of the model that is there, got another's "
            f"({'; '.join(differences)})"
        )
