"""BSFA's threshold tables and the file they live in, `sparse_attention_thresholds.safetensors`.

The file is safetensors, never pickle. Its tensors are named `<geometry>.<phase>`, its metadata
carries the schema version, the levels, the geometry and the fingerprint of the model it was
calibrated on. `config.json` pins the file by sha256.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as dump_safetensors
from torch import Tensor

from hf_sparse_attention.types import PHASES, BlockGeometry, Phase

THRESHOLDS_NAME = "sparse_attention_thresholds.safetensors"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ModelFingerprint:
    """What tells one model's thresholds from another's; None means unknown and matches anything.

    Args:
        architecture: transformers' `model_type`, for example `"llama"`.
        layers: decoder layers; heads: query heads; kv_heads: key/value heads; head_dim: D.
    """

    architecture: str | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None

    @classmethod
    def of(cls, config: Any) -> ModelFingerprint:
        """Reads a transformers config, or the dict that its config.json holds."""
        if isinstance(config, Mapping):
            read = config.get("text_config", config).get
        else:
            text = config.get_text_config() if hasattr(config, "get_text_config") else config
            read = functools.partial(_attribute, text)

        def get(name: str, otherwise: Any = None) -> Any:
            try:
                value = read(name)
            except RuntimeError:  # layers differ in it (Gemma 4), and the config refuses to choose
                return None
            return otherwise if value is None else value

        heads, width = get("num_attention_heads"), get("hidden_size")
        head_dim = get("head_dim", otherwise=width // heads if heads and width else None)
        return cls(
            architecture=get("model_type"),
            layers=get("num_hidden_layers"),
            heads=heads,
            kv_heads=get("num_key_value_heads") or heads,
            head_dim=head_dim,
        )

    def differences(self, other: ModelFingerprint) -> list[str]:
        """`"layers: expected 2, got 4"` for each field that both know and that differs."""
        found = []
        for name in (f.name for f in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None and theirs is not None and mine != theirs:
                found.append(f"{name}: expected {mine!r}, got {theirs!r}")
        return found


@dataclass(frozen=True, eq=False)
class Thresholds:
    """BSFA's T (section 4.2 of the paper): scores below T are skipped.

    Args:
        prefill: `[levels, layers, heads, query blocks]` float32. Query block i stands for the
            positions `i * block_q` to `(i + 1) * block_q - 1` of a request; `-inf` never skips.
        decode: `[levels, layers, heads, position blocks]` float32, the same for single positions;
            None if decoding was not calibrated.
        levels: k of each table, the number of blocks that compete and are kept, ascending.
        geometry: the blocks that the tables were calibrated on.
        keep_sink: whether block 0 was always kept, so that it did not compete for one of the k
            places.
        fingerprint: the model that the tables belong to.

    Raises:
        ValueError: for wrong shapes, NaN, or levels that are not ascending and positive.
    """

    prefill: Tensor
    decode: Tensor | None
    levels: list[int]
    geometry: BlockGeometry
    keep_sink: bool = True
    fingerprint: ModelFingerprint = ModelFingerprint()

    def __post_init__(self) -> None:
        if not self.levels or list(self.levels) != sorted({k for k in self.levels if k > 0}):
            raise ValueError(f"levels: expected ascending positive integers, got {self.levels}")
        for phase, table in self.tables.items():
            if table.dim() != 4 or table.shape[0] != len(self.levels) or table.numel() == 0:
                raise ValueError(
                    f"{phase} thresholds: expected [levels={len(self.levels)}, layers, heads, "
                    f"blocks], got {list(table.shape)}"
                )
            if table.dtype != torch.float32:
                raise ValueError(f"{phase} thresholds: expected torch.float32, got {table.dtype}")
            if bool(table.isnan().any()):
                raise ValueError(f"{phase} thresholds: expected numbers or -inf, got NaN")
            if table.shape[1:3] != self.prefill.shape[1:3]:
                raise ValueError(
                    f"{phase} thresholds: expected layers and heads as in prefill, "
                    f"{list(self.prefill.shape[1:3])}, got {list(table.shape[1:3])}"
                )

    @property
    def tables(self) -> dict[Phase, Tensor]:
        """The tables that are there, by phase."""
        found: dict[Phase, Tensor] = {"prefill": self.prefill}
        if self.decode is not None:
            found["decode"] = self.decode
        return found

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
            "geometry": json.dumps(asdict(self.geometry)),
            "keep_sink": json.dumps(self.keep_sink),
            "fingerprint": json.dumps(asdict(self.fingerprint)),
        }
        tensors = {
            f"{self.geometry.name}.{phase}": table.cpu().contiguous()
            for phase, table in self.tables.items()
        }
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
            raise FileNotFoundError(f"{file}: expected a BSFA threshold file, found none")
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
        version = int(metadata.get("schema_version", 0))
        if not 1 <= version <= SCHEMA_VERSION:
            raise ValueError(
                f"schema version: expected 1 to {SCHEMA_VERSION}, found {version or 'none'}"
                + ("; a newer hf-sparse-attention can read it" if version else "")
            )
        geometry = BlockGeometry(**json.loads(metadata["geometry"]))
        names = {f"{geometry.name}.{phase}": phase for phase in PHASES}
        if unknown := sorted(tensors.keys() - names):
            raise ValueError(f"tensors: expected {sorted(names)}, found {unknown}")
        return cls(
            prefill=tensors[f"{geometry.name}.prefill"],
            decode=tensors.get(f"{geometry.name}.decode"),
            levels=json.loads(metadata["levels"]),
            geometry=geometry,
            keep_sink=json.loads(metadata["keep_sink"]),
            fingerprint=ModelFingerprint(**json.loads(metadata["fingerprint"])),
        )


def _attribute(config: Any, name: str) -> Any:
    return getattr(config, name, None)


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
