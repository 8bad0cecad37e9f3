"""What the pages made from benchmarks/results have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def load(name: str) -> dict[str, Any]:
    """A file of benchmarks/results."""
    path = HERE / "results" / name
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return data


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, line by line."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def machine_line(data: dict[str, Any]) -> str:
    """What the numbers were measured on."""
    m = data["machine"]
    return (
        f"{', '.join(m['cpu'])}; {m['cores']} cores; kernel level {m['level']}; "
        f"torch {m['torch']}; Python {m['python']}; {m['time']}."
    )
