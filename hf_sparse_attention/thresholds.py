"""The threshold file beside config.json, `sparse_attention_thresholds.safetensors`, and its tables.

One file serves every geometry and both methods. It is safetensors, never pickle; `config.json` pins
it by sha256. Its tensors, all float32, are named `<geometry>.<phase>.<kind>`:

- `T` `[levels, layers, heads, query blocks]`: BSFA's thresholds (section 4.2 of the paper);
- `log_a` and `b`, both `[layers, heads]`: BLASST's coefficients of each layer and head.

Its metadata carries the schema version, the levels, the geometries and the fingerprint of the model
that was calibrated. Version 1 knew one geometry and `T` only, named `<geometry>.<phase>`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as dump_safetensors
from torch import Tensor

from hf_sparse_attention import config_values as values
from hf_sparse_attention.fingerprint import ModelFingerprint
from hf_sparse_attention.types import PHASES, BlockGeometry, Phase

THRESHOLDS_NAME = "sparse_attention_thresholds.safetensors"
SCHEMA_VERSION = 2
KINDS = ("T", "log_a", "b")

E = TypeVar("E")


@dataclass(frozen=True, eq=False)
class Thresholds:
    """What is too big for JSON: tables by layer and head.

    Heads are the layer's query heads, by their global numbers; layers and heads that were not
    calibrated hold -inf in `T` and `log_a`, which never skips.

    Args:
        tensors: by name, `<geometry>.<phase>.<kind>`; see the top of this file. Query block i of a
            `T` stands for the positions `i * block_q` to `(i + 1) * block_q - 1` of a request, in
            decode for single positions.
        geometries: the blocks that the tables were calibrated on, by name.
        levels: k of each `T`, the number of blocks that compete and are kept, ascending.
        keep_sink: whether block 0 was always kept, so that it did not compete for one of the k
            places.
        fingerprint: the model that the tables belong to.

    Raises:
        ValueError: for unknown names, wrong shapes, NaN, or levels that are not ascending and
            positive.
    """

    tensors: dict[str, Tensor]
    geometries: dict[str, BlockGeometry]
    levels: list[int] = field(default_factory=list)
    keep_sink: bool = True
    fingerprint: ModelFingerprint = field(default_factory=ModelFingerprint)

    def __post_init__(self) -> None:
        if list(self.levels) != sorted({k for k in self.levels if k > 0}):
            raise ValueError(f"levels: expected ascending positive integers, got {self.levels}")
        for name, geometry in self.geometries.items():
            if geometry.name != name:
                raise ValueError(f"geometries: expected {geometry.name!r}, got it under {name!r}")
        known = [f"{g}.{p}.{kind}" for g in self.geometries for p in PHASES for kind in KINDS]
        if unknown := sorted(set(self.tensors) - set(known)):
            raise ValueError(f"tensors: expected names of {known}, got {unknown}")
        if not self.tensors:
            raise ValueError(f"tensors: expected at least one of {known}, got none")
        shapes = {name: _check_table(name, x, self.levels) for name, x in self.tensors.items()}
        first = next(iter(shapes))
        for name, shape in shapes.items():
            if shape != shapes[first]:
                raise ValueError(
                    f"{name}: expected layers and heads as in {first}, {list(shapes[first])}, "
                    f"got {list(shape)}"
                )
        for name in self.tensors:
            prefix, _, kind = name.rpartition(".")
            other = {"log_a": "b", "b": "log_a"}.get(kind)
            if other is not None and f"{prefix}.{other}" not in self.tensors:
                raise ValueError(f"{name}: expected {prefix}.{other} beside it, got none")

    def table(self, geometry: str, phase: Phase) -> Tensor | None:
        """BSFA's T `[levels, layers, heads, query blocks]`, if it was calibrated."""
        return self.tensors.get(f"{geometry}.{phase}.T")

    def coefficients(self, geometry: str, phase: Phase) -> tuple[Tensor, Tensor] | None:
        """BLASST's `ln a` and `b` by layer and head, each `[layers, heads]`, if there are any."""
        log_a = self.tensors.get(f"{geometry}.{phase}.log_a")
        return None if log_a is None else (log_a, self.tensors[f"{geometry}.{phase}.b"])

    def level_index(self, level: int) -> int:
        """The first index of the tables for k = `level`.

        Raises:
            ValueError: if `level` was not calibrated; names those that were.
        """
        if level not in self.levels:
            raise ValueError(f"level: expected one of {list(self.levels)}, got {level}")
        return list(self.levels).index(level)

    def save(self, folder: str | Path, name: str = THRESHOLDS_NAME) -> dict[str, str]:
        """Writes `folder/name` atomically and returns what pins it: `{"name", "sha256"}`."""
        metadata = {
            "schema_version": str(SCHEMA_VERSION),
            "levels": json.dumps(list(self.levels)),
            "geometries": json.dumps({n: asdict(g) for n, g in self.geometries.items()}),
            "keep_sink": json.dumps(self.keep_sink),
            "fingerprint": json.dumps(asdict(self.fingerprint)),
        }
        tensors = {name: x.cpu().contiguous() for name, x in self.tensors.items()}
        data = dump_safetensors(tensors, metadata)
        write_atomically(Path(folder) / name, data)
        return {"name": name, "sha256": hashlib.sha256(data).hexdigest()}

    @classmethod
    def load(
        cls,
        file: str | Path,
        *,
        sha256: str | None = None,
        fingerprint: ModelFingerprint | None = None,
    ) -> Thresholds:
        """Reads and checks a threshold file.

        Args:
            file: its path.
            sha256: the digest that `config.json` pins, in hex.
            fingerprint: the model that is going to use it.

        Raises:
            FileNotFoundError: if it is missing.
            ValueError: if it is truncated, tampered with, of another model, of a newer schema, or
                holds NaN. The message names the file, what was expected and what was found.
        """
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: expected a threshold file, found none")
        data = file.read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if sha256 is not None and found != sha256.lower():
            raise ValueError(
                f"{file}: expected sha256 {sha256} as config.json pins it, found {found}; the file "
                "was changed, cut short, or belongs to another calibration"
            )
        try:
            thresholds = cls._parse(data)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: {_reason(error)}") from error
        differences = (fingerprint or ModelFingerprint()).differences(thresholds.fingerprint)
        if differences:
            raise ValueError(f"{file}: thresholds of another model: {'; '.join(differences)}")
        return thresholds

    @classmethod
    def _parse(cls, data: bytes) -> Thresholds:
        tensors = load_safetensors(data)  # checks the header's and the tensors' sizes
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header.get("__metadata__", {})
        version = _entry(metadata, "schema_version", int)
        if not 1 <= version <= SCHEMA_VERSION:
            raise ValueError(
                f"schema version: expected 1 to {SCHEMA_VERSION}, found {version}"
                "; a newer hf-sparse-attention can read it"
            )
        if version == 1:
            geometry = values.geometry(_entry(metadata, "geometry", dict))
            geometries = {geometry.name: geometry}
            tensors = {f"{name}.T": x for name, x in tensors.items()}
        else:
            entries = _entry(metadata, "geometries", dict)
            geometries = {name: values.geometry(x) for name, x in entries.items()}
        return cls(
            tensors,
            geometries,
            levels=values.integers("levels", _entry(metadata, "levels", list), least=1),
            keep_sink=_entry(metadata, "keep_sink", bool),
            fingerprint=ModelFingerprint(**_entry(metadata, "fingerprint", dict)),
        )


def _entry(metadata: dict[str, str], name: str, kind: type[E]) -> E:
    """The entry `name` of a file's metadata, whose values are JSON, of type `kind`.

    Raises:
        ValueError: it is not there, no JSON, or of another type.
    """
    text = metadata.get(name, "none")
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, kind):
        raise ValueError(f"metadata {name!r}: expected JSON of type {kind.__name__}, found {text}")
    return value


def _check_table(name: str, table: Tensor, levels: list[int]) -> tuple[int, int]:
    """The `(layers, heads)` of a table, whose shape, dtype and values are as they should be."""
    wanted = "[layers, heads]"
    fits = table.dim() == 2
    if name.endswith(".T"):
        wanted = f"[levels={len(levels)}, layers, heads, blocks]"
        fits = table.dim() == 4 and table.shape[0] == len(levels)
    if not fits or table.numel() == 0:
        raise ValueError(f"{name}: expected {wanted}, got {list(table.shape)}")
    if table.dtype != torch.float32:
        raise ValueError(f"{name}: expected torch.float32, got {table.dtype}")
    if bool(table.isnan().any()):
        raise ValueError(f"{name}: expected numbers or -inf, got NaN")
    infinite = table.isinf() if name.endswith(".b") else table.isposinf()
    if not name.endswith(".T") and bool(infinite.any()):  # a T of +inf skips all it may
        raise ValueError(f"{name}: expected finite numbers, got infinite ones")
    layers, heads = table.shape[-3:-1] if name.endswith(".T") else table.shape
    return layers, heads


def _reason(error: Exception) -> str:
    if isinstance(error, SafetensorError):
        return f"expected a complete safetensors file, found a damaged or truncated one ({error})"
    if isinstance(error, KeyError):
        return f"expected the entry {error}, found none"
    return str(error)


def write_atomically(file: Path, data: bytes) -> None:
    """Writes `file` so that a reader, or a crash, sees the old content or the new, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)  # mkstemp's 0600 would hide the file from other users
        Path(temporary).replace(file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
