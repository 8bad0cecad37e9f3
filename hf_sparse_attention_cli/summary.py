"""What settings hold, as data for scripts and as tables for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.table import Table

if TYPE_CHECKING:
    from hf_sparse_attention.config import SparseAttentionConfig

PHASES = ("prefill", "decode")

#: Parts of the provenance that are not shown among its lines.
OWN_TABLES = ("predicted_sparsity", "level_costs")
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
        "tables": {name: list(x.shape) for name, x in sorted(tables.tensors.items())}
        if tables
        else {},
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
    warnings += _level_warnings(config)
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


def _level_warnings(config: SparseAttentionConfig) -> list[str]:
    """BSFA's default, the largest level, may be larger than the requests that were calibrated."""
    predicted = config.provenance.get("predicted_sparsity", {})
    if not config.levels or not isinstance(predicted, dict):
        return []
    level = max(config.levels) if config.level is None else config.level
    none = [name for name, phases in predicted.items() if not _skips(phases, level)]
    if not none:
        return []
    where = f"BSFA at level {level} skips nothing at the calibrated lengths ({', '.join(none)})"
    return [f'{where}: set_sparse_attention(model, "bsfa", level=...) runs a smaller one']


def _skips(phases: Any, level: int) -> bool:
    return any(found.get(str(level), 1.0) > 0 for found in phases.values())


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
    if predicted := summary["provenance"].get("predicted_sparsity"):
        console.print(_levels(predicted, summary["levels"]))
    for warning in summary["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)


def _facts(summary: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    names = (
        *("method", "granularity", "target_sparsity", "threshold_scale_factor"),
        *("max_dropped_mass", "level", "levels", "targets", "ignore", "min_length"),
        *("fingerprint", "report", "pushed"),
    )
    for name in names:
        value = summary.get(name)
        if value not in (None, [], {}):
            table.add_row(name, _plain(value))
    for name, sha256 in summary.get("files", {}).items():
        table.add_row("file", f"{name}, sha256 {sha256[:16]}...")
    for name, value in summary["provenance"].items():
        if name in OWN_TABLES:
            continue
        text = _plain(value)
        table.add_row(f"provenance: {name}", text if len(text) < 300 else f"{text[:300]} ...")
    return table


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(x)}" for name, x in value.items() if x is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def plain_table(*names: str) -> Table:
    """Narrow enough for 80 columns."""
    return Table(*names, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def _fits(fits: dict[str, Any]) -> Table:
    names = ("blocks", "phase", "a", "b", "keys", "targets", "R²", "residual", "runs")
    table = plain_table(*names)
    for name, fit in fits.items():
        for phase in PHASES:
            if phase in fit:
                found = fit[phase]
                ranges = [_range(found.get(key)) for key in ("lengths", "sparsity")]
                numbers = [found.get(key) for key in ("r2", "residual", "target_sparsity")]
                shown = ["" if x is None else f"{x:.3f}" for x in numbers]
                table.add_row(
                    name, phase, f"{found['a']:.3g}", f"{found['b']:.3g}", *ranges, *shown
                )
    return table


def _range(ends: list[float] | None) -> str:
    return "" if ends is None else "-".join(dict.fromkeys(f"{end:g}" for end in ends))


def _levels(predicted: dict[str, Any], levels: list[int]) -> Table:
    """BSFA: the sparsity that each level gave on the calibration data."""
    table = plain_table("BSFA", "phase", *(f"k = {level}" for level in levels))
    for name, phases in predicted.items():
        for phase, found in phases.items():
            table.add_row(name, phase, *(f"{found.get(str(k), 0):.3f}" for k in levels))
    return table


def _tables(tables: dict[str, list[int]]) -> Table:
    table = plain_table("table", "shape")
    for name, shape in tables.items():
        table.add_row(name, " x ".join(map(str, shape)))
    return table
