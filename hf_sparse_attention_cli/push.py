"""`push`: settings, and the model if asked, to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_sparse_attention_cli.values import print_json

if TYPE_CHECKING:
    from hf_sparse_attention.config import SparseAttentionConfig

#: The calibration report's file beside the settings.
REPORT_NAME = "calibration_report.html"
#: What `evaluate` writes for a model card.
EVALUATION_NAME = "evaluation.md"


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What `calibrate` wrote to --out.")
    ],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="Such as org/model; made if it is not there.")
    ],
    with_model: Annotated[
        bool,
        typer.Option(
            "--with-model", help="The folder's model and tokenizer, too, not just settings."
        ),
    ] = False,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="What `evaluate` wrote to --out: its tables go into the model card.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch; made if it is not there.", show_default="main"),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="For a repository that is made now.",
            show_default="as its owner has set",
        ),
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead.")
    ] = False,
    message: Annotated[
        str | None, typer.Option(help="Of the commit.", show_default="says what is pushed")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Push calibrated settings to the Hub, in one commit.

    Into config.json, the table file beside it, and a section of the model card, with the
    calibration report if the folder has one. The token is that of `hf auth login` or HF_TOKEN.
    """
    from hf_sparse_attention.config import SparseAttentionConfig

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder, found none")
    if evaluation is not None and not (evaluation / EVALUATION_NAME).is_file():
        raise FileNotFoundError(
            f"--evaluation: expected a folder with {EVALUATION_NAME}, got {evaluation}"
        )
    config = SparseAttentionConfig.from_pretrained(folder)
    options: dict[str, Any] = {"revision": revision, "private": private}
    options |= {"create_pr": create_pr, "commit_message": message}
    if with_model:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        options["model"] = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        options["tokenizer"] = AutoTokenizer.from_pretrained(folder)
    pushed = push_settings(config, repo, folder, evaluation, **options)
    if json:
        print_json(pushed)
    else:
        typer.echo(pushed["pull_request"] or pushed["url"])


def check_login() -> None:
    """Raises before hours of work, rather than after, if the Hub cannot be pushed to."""
    from huggingface_hub import HfApi

    HfApi().whoami()


def push_settings(
    config: SparseAttentionConfig,
    repo: str,
    folder: Path,
    evaluation: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Pushes `config`, with the report in `folder` if there is one; where it can be found then.

    And with the tables of an evaluation, if one is given.
    """
    report = folder / REPORT_NAME
    attachments = {"Calibration report": report} if report.is_file() else {}
    if evaluation is not None:
        attachments["Evaluation"] = evaluation / EVALUATION_NAME
    commit = config.push_to_hub(repo, attachments=attachments, **options)
    return {
        "repo": repo,
        "commit": commit.oid,
        "url": commit.commit_url,
        "pull_request": commit.pr_url,
    }
