"""Where a run keeps what it has measured, so that one that was killed continues.

Every measurement is a small JSON file of its own, written atomically. What they belong to stands
beside them: a run that is configured otherwise is refused. It may ask for more, though, or for
less: more samples, another task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_sparse_attention.storage import read_json
from hf_sparse_attention.thresholds import write_atomically

CONFIGURATION = "configuration.json"
MEASUREMENTS = "measurements"
RESULT = "evaluation.json"
#: What says how much is measured, and nothing about how.
AMOUNTS = ("samples", "tasks", "texts")


class Store:
    """The folder of one run.

    Args:
        folder: made if it is not there.
        configuration: what the measurements belong to; JSON-ready.
        resume: go on with what is there; else the folder must hold no run.

    Raises:
        ValueError: it holds a run and `resume` is not set, or one that was configured otherwise.
    """

    def __init__(self, folder: Path, configuration: Mapping[str, Any], resume: bool) -> None:
        self.folder = folder
        file = folder / CONFIGURATION
        wanted = json.loads(json.dumps(configuration))
        if file.is_file():
            if not resume:
                raise ValueError(
                    f"{folder}: expected no evaluation there, got one; resume it, or choose "
                    "another folder"
                )
            differences = differing(wanted, read_json(file), AMOUNTS)
            if differences:
                raise ValueError(
                    f"{file}: the run was configured otherwise ({'; '.join(differences)}); choose "
                    "another folder, or what it was configured with"
                )
        write_json(file, wanted)

    def get(self, name: str) -> dict[str, Any] | None:
        """The measurement called `name`, if it was made."""
        file = self._file(name)
        return read_json(file) if file.is_file() else None

    def put(self, name: str, measurement: Mapping[str, Any]) -> None:
        """Keeps a measurement."""
        write_json(self._file(name), measurement)

    def _file(self, name: str) -> Path:
        return self.folder / MEASUREMENTS / f"{name}.json"


def differing(
    wanted: Mapping[str, Any], found: Mapping[str, Any], free: Sequence[str] = ()
) -> list[str]:
    """`"lengths: expected [2048], got [4096]"` for each entry that differs, but for `free`."""
    return [
        f"{name}: expected {wanted.get(name)}, got {found.get(name)}"
        for name in dict.fromkeys([*wanted, *found])
        if name not in free and wanted.get(name) != found.get(name)
    ]


def write_json(file: Path, data: Any) -> None:
    """Writes `data` atomically; the innermost lists and dicts stand on one line each."""
    write_atomically(file, (_dump(data) + "\n").encode())


def _dump(value: Any, indent: str = "") -> str:
    deeper = indent + " "
    if isinstance(value, Mapping) and any(isinstance(x, (Mapping, list)) for x in value.values()):
        rows = [f"{deeper}{json.dumps(str(k))}: {_dump(x, deeper)}" for k, x in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(x, (Mapping, list)) for x in value):
        rows = [f"{deeper}{_dump(x, deeper)}" for x in value]
        return "[\n" + ",\n".join(rows) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)
