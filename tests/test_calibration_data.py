"""The shipped texts are the ones that the manifest describes, and its parts share nothing."""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_sparse_attention.calibration.bundled import KINDS, PARTS, Kind, bundled

FOLDER = Path(__file__).parent.parent / "calibration_data"
ENTRIES = json.loads((FOLDER / "manifest.json").read_text())["files"]
each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["file"])


@each_entry
def test_sha256_is_the_manifests(entry: dict[str, str]) -> None:
    data = (FOLDER / entry["file"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == entry["sha256"]
    assert b"\r" not in data


@each_entry
def test_manifest_says_where_it_comes_from(entry: dict[str, str]) -> None:
    for key in ("title", "author", "licence", "changes", "rebuild"):
        assert entry[key].strip(), key
    assert entry["part"] in (*PARTS, "evaluation")
    assert (entry["kind"] in KINDS) == (entry["part"] in PARTS)
    if "generator" not in entry:
        assert "==" in entry["package"], "a package is pinned"
        assert len(entry["archive_sha256"]) == 64
        assert entry["members"]


@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if "generator" in e], ids=lambda entry: entry["file"]
)
def test_generated_texts_are_what_their_seed_gives(entry: dict[str, list[str]]) -> None:
    command = [sys.executable, *entry["generator"]]
    made = subprocess.run(command, check=True, cwd=FOLDER, stdout=subprocess.PIPE).stdout
    assert made == (FOLDER / str(entry["file"])).read_bytes()


def test_needles_are_asked_for_after_they_were_said() -> None:
    text = bundled("needle")
    said = re.compile(r"The special number of the (.+?) is (\d+)\.")
    asked = re.compile(r"Question: What is the special number of the (.+?)\?\nAnswer: (\d+)\.")
    facts = {key: (value, where) for where, key, value in found(said, text)}
    questions = list(found(asked, text))
    assert len(questions) > 100
    distances = []
    for where, key, answer in questions:
        value, before = facts[key]
        assert answer == value, key
        distances.append(where - before)
    assert 0 < min(distances) < 2_000, "some are near"
    assert max(distances) > 100_000, "some are far"


def found(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, str, str]]:
    for match in pattern.finditer(text):
        yield match.start(), match.group(1), match.group(2)


def test_every_text_is_in_the_manifest_and_they_are_small() -> None:
    shipped = {path.name: path.stat().st_size for path in FOLDER.glob("*.txt")}
    assert set(shipped) == {entry["file"] for entry in ENTRIES}
    assert sum(shipped.values()) < 3_000_000


@pytest.mark.parametrize("kind", KINDS)
def test_validation_shares_no_line_with_calibration(kind: Kind) -> None:
    """Apart from short ones, and the needles' haystack of one sentence over and over."""
    calibration, validation = (
        {line for line in bundled(kind, part).splitlines() if len(line) > 60 and not repeats(line)}
        for part in PARTS
    )
    assert calibration
    assert validation
    assert not calibration & validation


def repeats(line: str) -> bool:
    sentences = line.removesuffix(".").split(". ")
    return len(set(sentences)) < len(sentences)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a kind of \['prose'.*got 'poetry' and 'calibration'"):
        bundled("poetry")
