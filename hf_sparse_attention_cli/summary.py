"""What settings hold, as data for scripts and as tables for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table

if TYPE_CHECKING:
    from hf_sparse_attention.config import SparseAttentionConfig

PHASES = ("prefill", "decode")

#: A fit that explains less of the factor than this is said to be poor.
POOR_R2 = 0.9
#: Predicted and measured sparsity further apart than this are said to differ.
FAR_OFF = 0.05


def summarise(config: SparseAttentionConfig) -> dict[str, Any]:
    """JSON-ready: method, fits with their valid ranges, tables, provenance, warnings."""
    fits = {name: fit.to_dict() for name, fit in config.fits.items()}
    tables = config.tables
    found: dict[str, Any] = {
        "method": config.method,
        "granularity": config.granularity,
        "geometry": config.geometry and asdict(config.geometry),
        "target_sparsity": config.target_sparsity,
        "threshold_scale_factor": config.threshold_scale_factor,
        "max_dropped_mass": config.max_dropped_mass,
        "level": config.level,
        "levels": config.levels,
        "keep_sink": config.keep_sink,
        "targets": config.targets,
        "ignore": config.ignore,
        "min_length": config.min_length,
        "schema_version": config.schema_version,
        "fits": fits,
        "tables": {name: list(x.shape) for name, x in tables.tensors.items()} if tables else {},
        "thresholds_file": config.thresholds_file,
        "fingerprint": asdict(tables.fingerprint) if tables else None,
        "provenance": config.provenance,
    }
    return {**found, "warnings": _warnings(config, fits)}


def _warnings(config: SparseAttentionConfig, fits: dict[str, Any]) -> list[str]:
    from hf_sparse_attention.methods import METHODS

    try:
        warnings = list(METHODS[config.method].notes(config))
        METHODS[config.method].check(config)
    except ValueError as error:
        warnings = [str(error)]
    for name, fit in fits.items():
        for phase in PHASES:
            found = fit.get(phase)
            if found is None:
                warnings.append(f"{name}: {phase} is not calibrated")
                continue
            where = f"{name} {phase}"
            if found.get("r2", 1.0) < POOR_R2:
                warnings.append(f"{where}: a poor fit, R^2 = {found['r2']:.2f}")
            if len(set(found.get("lengths", (0, 1)))) == 1:
                warnings.append(f"{where}: calibrated at one length only, {found['lengths'][0]}")
            off = [row for row in found.get("held_out", []) if _distance(row) > FAR_OFF]
            if off:
                worst = max(off, key=_distance)
                warnings.append(
                    f"{where}: on held-out text {len(off)} of {len(found['held_out'])} rows are "
                    f"further than {FAR_OFF} from their target, at worst {_distance(worst):.3f}"
                )
    return warnings


def _distance(row: dict[str, Any]) -> float:
    """How far a held-out row's measured sparsity is from its target."""
    target, measured = row.get("target", row.get("target_sparsity")), row.get("measured")
    return 0.0 if target is None or measured is None else abs(measured - target)


def show(summary: dict[str, Any], title: str, console: Console) -> None:
    """The summary for people."""
    console.print(Group(f"[bold]{title}[/bold]", _facts(summary)))
    if summary["fits"]:
        console.print(_fits(summary["fits"]))
    if summary["tables"]:
        console.print(_tables(summary["tables"]))
    for warning in summary["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)


def _facts(summary: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    names = (
        *("method", "granularity", "target_sparsity", "threshold_scale_factor"),
        *("max_dropped_mass", "level", "levels", "targets", "ignore", "min_length"),
        *("fingerprint", "thresholds_file", "files"),
    )
    for name in names:
        value = summary.get(name)
        if value not in (None, [], {}):
            table.add_row(name, _plain(value))
    for name, value in summary["provenance"].items():
        text = _plain(value)
        table.add_row(f"provenance: {name}", text if len(text) < 300 else f"{text[:300]} ...")
    return table


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(x)}" for name, x in value.items() if x is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _fits(fits: dict[str, Any]) -> Table:
    table = Table("geometry", "phase", "a", "b", "keys", "sparsity", "R²", "residual", "target")
    for name, fit in fits.items():
        for phase in PHASES:
            if phase in fit:
                found = fit[phase]
                ranges = [_range(found.get(key)) for key in ("lengths", "sparsity")]
                numbers = [found.get(key) for key in ("r2", "residual", "target_sparsity")]
                shown = ["" if x is None else f"{x:.3f}" for x in numbers]
                table.add_row(
                    name, phase, f"{found['a']:.4g}", f"{found['b']:.4g}", *ranges, *shown
                )
    return table


def _range(ends: list[float] | None) -> str:
    return "" if ends is None else f"{ends[0]:g} to {ends[1]:g}"


def _tables(tables: dict[str, list[int]]) -> Table:
    table = Table("table", "shape")
    for name, shape in tables.items():
        table.add_row(name, " x ".join(map(str, shape)))
    return table
