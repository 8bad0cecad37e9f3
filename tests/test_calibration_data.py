"""The shipped texts are the ones that the manifest describes."""

import hashlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "calibration_data"
ENTRIES = json.loads((FOLDER / "manifest.json").read_text())["files"]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["file"])
def test_sha256_is_the_manifests(entry: dict[str, str]) -> None:
    data = (FOLDER / entry["file"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == entry["sha256"]
    assert b"\r" not in data


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["file"])
def test_manifest_says_where_it_comes_from(entry: dict[str, str]) -> None:
    for key in ("title", "author", "licence", "package", "archive_sha256", "member", "rebuild"):
        assert entry[key].strip(), key
    assert "==" in entry["package"], "a package is pinned"


def test_every_text_is_in_the_manifest() -> None:
    shipped = {path.name for path in FOLDER.glob("*.txt")}
    assert shipped == {entry["file"] for entry in ENTRIES}
