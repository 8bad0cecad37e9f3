"""Reports in a headless browser without network, and what they refer to."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

XHTML = "{http://www.w3.org/1999/xhtml}"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def refers_outside(page: Path) -> list[str]:
    """What in the page, or in a picture inside of it, would be fetched; or is run."""
    root = ElementTree.fromstring(page.read_text())
    found = [tag for tag in ("script", "link") for _ in root.iter(f"{XHTML}{tag}")]
    found += re.findall(r"url\(.*?\)", page.read_text())
    pictures = []
    for element in root.iter():
        for name in ("src", "href"):
            value = element.get(name, "#")
            if value.startswith("data:image/svg+xml;base64,"):
                pictures.append(base64.b64decode(value.partition(",")[2]))
            elif not value.startswith("#"):
                found.append(value)
    for svg in pictures:
        for element in ElementTree.fromstring(svg).iter():
            found += [
                value
                for name, value in element.attrib.items()
                if name.endswith("href") and not value.startswith(("#", "data:"))
            ]
        # Apart from the names of XML namespaces, which nobody fetches.
        found += re.findall(r"(?<!xmlns=\")(?<!xmlns:xlink=\")https?://\S+", svg.decode())
    return found


def colours_of(page: Path, folder: Path) -> set[tuple[int, int, int]]:
    """The colours on a screenshot of the page; its files go into `folder`."""
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    shot = folder / "shot.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += [f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    options += ["--window-size=1200,6000"]
    command = [CHROMIUM, *options, f"--screenshot={shot}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shot.exists(), done.stderr
    return {colour for _, colour in image.open(shot).convert("RGB").getcolors(2**24)}
