"""The texts that travel with the package, so that calibrating and evaluating need no data set."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

Kind = Literal["prose", "code", "needle"]
Part = Literal["calibration", "validation"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PARTS: tuple[Part, ...] = get_args(Part)


def bundled(kind: Kind, part: Part = "calibration") -> str:
    """One of the bundled texts, tens of thousands of tokens.

    Args:
        kind: `prose`, `code`, or `needle`: facts in a haystack that are asked for again later.
        part: the two parts share no text; in prose and code, not the author either.

    Raises:
        ValueError: for another kind or part.
    """
    entries = [each for each in manifest() if (each["kind"], each["part"]) == (kind, part)]
    if not entries:
        raise ValueError(
            f"bundled: expected a kind of {list(KINDS)} and a part of {list(PARTS)}, got {kind!r} "
            f"and {part!r}"
        )
    return "\n\n".join(bundled_file(each["file"]) for each in entries)


def bundled_file(name: str) -> str:
    """The text of one file of the manifest."""
    return (_folder() / name).read_text("utf-8")


def manifest() -> list[dict[str, Any]]:
    """What is known of each text: file, kind, part, title, author, licence, source, sha256.

    The part of what only the evaluation reads is `evaluation`.
    """
    entries: list[dict[str, Any]] = json.loads((_folder() / "manifest.json").read_text())["files"]
    return entries


def _folder() -> Path:
    """In an installed package inside of it; in a checkout beside it."""
    package = Path(str(files("hf_sparse_attention")))
    inside = package / "calibration_data"
    return inside if inside.is_dir() else package.parent / "calibration_data"
