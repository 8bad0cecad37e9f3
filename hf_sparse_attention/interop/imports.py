"""Settings that other tools have made, read for us: ModelOpt's key, and BSFA's authors' tables."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attention import config_values as values
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.config_schema import CONFIG_KEY, OWN_KEY, is_ours
from hf_sparse_attention.fingerprint import ModelFingerprint
from hf_sparse_attention.fits import Fit, PhaseFit
from hf_sparse_attention.interop.files import read_json
from hf_sparse_attention.thresholds import Thresholds
from hf_sparse_attention.types import BlockGeometry

#: The blocks that ModelOpt calibrates on.
MODELOPT_GEOMETRY = BlockGeometry(128, 128, "ascending")
#: What ModelOpt runs where the checkpoint names no target.
MODELOPT_TARGET = 0.5
_DIFFUSION = ("initial_disabled_steps", "disabled_until_timestep")


@dataclass(frozen=True)
class Imported:
    """Settings read from another tool, and a sentence on each thing that is not as it was there."""

    config: SparseAttentionConfig
    notes: list[str]


def import_modelopt(
    source: str | Path | Mapping[str, Any], *, geometry: BlockGeometry | str | None = None
) -> Imported:
    """Reads the key `sparse_attention_config` as ModelOpt writes it, in all spellings in use.

    Args:
        source: a checkpoint's folder, a JSON file (config.json, or the key's content alone), or
            what such a file holds.
        geometry: None runs the factors on the blocks that they were calibrated on, 128x128 visited
            ascending, which only the reference backend does, slowly. Naming one of ours, such as
            `"64x64"`, runs them there: fast, and other blocks are skipped than were calibrated for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no calibrated skip-softmax settings, or our own ones.
    """
    where, data = _key_of(source)
    if OWN_KEY in data:
        raise ValueError(
            f"{where}: expected settings of another tool, got our own; "
            "SparseAttentionConfig.from_pretrained reads them"
        )
    try:
        read = SparseAttentionConfig.from_dict(data)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if read.threshold_scale_factor is None:
        raise ValueError(
            f"{where}: expected a calibrated threshold_scale_factor, got none: ModelOpt wrote it "
            "without calibration"
        )
    notes = _modelopt_notes(data)
    targets = dict(read.target_sparsity or {})
    for phase in read.threshold_scale_factor:
        if phase not in targets:
            targets[phase] = MODELOPT_TARGET
            notes.append(f"No target for {phase}: took ModelOpt's default, {MODELOPT_TARGET}.")
    settings: dict[str, Any] = {
        "target_sparsity": targets,
        "provenance": {"imported_from": "modelopt", **read.provenance},
    }
    if geometry is None:
        phases = {p: PhaseFit(f["a"], f["b"]) for p, f in read.threshold_scale_factor.items()}
        settings["fits"] = {MODELOPT_GEOMETRY.name: Fit(MODELOPT_GEOMETRY, phases)}
        settings["threshold_scale_factor"] = None
        notes.append(
            "Runs on ModelOpt's own blocks, 128x128 visited ascending, which only the reference "
            "backend does, slowly. With geometry='64x64' every backend serves, and other blocks "
            "are skipped; calibrating anew gives the sparsity that you ask for."
        )
    else:
        runs = settings["geometry"] = values.geometry(geometry)
        notes.append(
            f"Runs on {runs.name} blocks, {runs.order}; the factors were calibrated on 128x128, "
            "ascending. Expect another sparsity than the target."
        )
    return Imported(replace(read, **settings), notes)


def _key_of(source: str | Path | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """What holds the key, and what the key holds."""
    if isinstance(source, Mapping):
        where, content = CONFIG_KEY, source
    else:
        file = Path(source)
        file = file / "config.json" if file.is_dir() else file
        where, content = str(file), read_json(file)
    for holder in (content, content.get("text_config")):
        if isinstance(holder, Mapping) and CONFIG_KEY in holder:
            content = holder[CONFIG_KEY]
            break
    if not isinstance(content, Mapping) or not is_ours(content):
        raise ValueError(
            f"{where}: expected skip-softmax settings under {CONFIG_KEY!r}, got "
            f"{sorted(map(str, content)) if isinstance(content, Mapping) else content!r}"
        )
    return where, content


def _modelopt_notes(data: Mapping[str, Any]) -> list[str]:
    notes = []
    groups = data.get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        if not is_ours(group):
            notes.append(f"Left out: {name}, {group.get('algorithm', 'no algorithm')!r}.")
        notes += [
            f"Left out: {key}, which is for diffusion models." for key in _DIFFUSION if key in group
        ]
    return notes


def import_bsfa(file: str | Path, *, keep_sink: bool = False) -> Imported:
    """Reads the threshold file of BSFA's authors (`*.inference.pt`).

    It is loaded with `weights_only=True`: a pickle that holds more than tensors and plain values is
    refused. The thresholds are taken as they are: they stand for scaled scores there as here, and
    positions past the last one reuse it in both. BSFA decides by block, whatever the order of
    visits, but under no other block sizes than its own: the largest score of 128 rows says nothing
    exact about 64 of them. So what is read runs on the file's blocks and no others; the kernels
    that we compile do not have them (128 rows), so the reference backend serves, slowly.

    Args:
        file: with `thresholds` `[k, layers, heads, query blocks]`, `k_values`, `q_block_size` and
            `k_block_size`.
        keep_sink: never skip block 0. False is what the authors run; True, ours, keeps more.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not of that form.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected this file, found none")
    try:
        data = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{file}: expected tensors and plain values alone, as loading anything else would run "
            f"code; got a file that torch refuses ({reason})"
        ) from error
    table, levels = _bsfa_table(file, data)
    geometry = BlockGeometry(int(data["q_block_size"]), int(data["k_block_size"]))
    try:
        tables = Thresholds(
            tensors={f"{geometry.name}.prefill.T": table},
            geometries={geometry.name: geometry},
            levels=levels,
            keep_sink=keep_sink,
            fingerprint=ModelFingerprint(layers=table.shape[1], heads=table.shape[2]),
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    config = SparseAttentionConfig(
        method="bsfa",
        tables=tables,
        geometry=geometry,
        keep_sink=keep_sink,
        provenance={"imported_from": "block-sparse-flash-attention", "file": file.name},
    )
    blocks = (
        f"Runs on its own blocks, {geometry.name}, and no others: the reference backend does, "
        "slowly; our kernels have at most 64 rows."
    )
    notes = [
        blocks,
        "Prefill only, as its authors run it: decoding skips nothing.",
        "The file does not name its model: only layers and heads are checked.",
    ]
    if keep_sink:
        notes.append("Block 0 is kept (ours): one block a row more than its authors keep.")
    return Imported(config, notes)


def _bsfa_table(file: Path, data: Any) -> tuple[Tensor, list[int]]:
    """T `[levels, layers, heads, query blocks]` float32 with its levels, ascending."""
    wanted = ("thresholds", "k_values", "q_block_size", "k_block_size")
    if not isinstance(data, Mapping) or any(name not in data for name in wanted):
        found = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
        raise ValueError(f"{file}: expected {list(wanted)}, got {found}")
    table, levels = data["thresholds"], [int(k) for k in data["k_values"]]
    if not isinstance(table, Tensor) or table.dim() != 4 or table.shape[0] != len(levels):
        got = list(table.shape) if isinstance(table, Tensor) else type(table).__name__
        raise ValueError(
            f"{file}: expected thresholds [k={len(levels)}, layers, heads, query blocks], got {got}"
        )
    order = sorted(range(len(levels)), key=levels.__getitem__)
    return table.float()[order].contiguous(), [levels[i] for i in order]
