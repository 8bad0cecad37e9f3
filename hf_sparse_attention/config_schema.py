"""What `sparse_attention_config` in config.json looks like, and the spellings of it that are read.

Other engines read `config_groups.group_0` (algorithm `skip_softmax`): targets, ignore, the scale
factor and its target sparsity, with numbers only in the phase dicts. Everything that only we
understand sits under one key of our own, `hf_sparse_attention`: with fits for several geometries
the group repeats the one that is closest to what those engines run, and what we run is ours alone.
Here are plain dicts only; `config.py` checks values.

Schema version 1 knew one geometry, and kept its fit in the group; it is read as that fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hf_sparse_attention._version import __version__
from hf_sparse_attention.types import PHASES, BlockGeometry

CONFIG_KEY = "sparse_attention_config"
OWN_KEY = "hf_sparse_attention"
SCHEMA_VERSION = 2
FORMULA = "a * exp(b * target_sparsity)"
LOG_FORMULA = "exp(log_a + b * target_sparsity)"

#: What ModelOpt names as the target where it means all classes; none is called so.
EVERY_ATTENTION = "Attention"

#: Whose fit the group holds: other engines decide by blocks of about this size.
GROUP_GEOMETRY = "64x128"

_ALGORITHMS = ("skip_softmax", "softmax_skip")
#: Fields that belong to the group where there is one, because other engines read them there.
_SHARED = ("targets", "ignore", "target_sparsity", "threshold_scale_factor")
_OWN = (
    "schema_version",
    "method",
    "fits",
    "granularity",
    "max_dropped_mass",
    "level",
    "levels",
    "geometry",
    "min_length",
    "backend",
    "keep_sink",
    "thresholds_file",
    "provenance",
)


def is_ours(data: object) -> bool:
    """Whether `data` is a `sparse_attention_config` of ours or ModelOpt's.

    A few models use that key for settings of their own, which are none of our business.
    """
    if not isinstance(data, Mapping):
        return False
    return OWN_KEY in data or any(_is_skip_softmax(group) for group in _groups(data))


def write(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The dict for config.json; `fields` are the JSON-ready fields of a config, by name."""
    fields = {name: value for name, value in fields.items() if value not in (None, [], {})}
    data: dict[str, Any] = {}
    own = {name: fields[name] for name in (*_OWN, *_SHARED) if name in fields}
    factors, targets = _for_engines(fields)
    if factors:
        if "fits" not in own:  # with fits, a factor that the user set is ours alone
            own.pop("threshold_scale_factor", None)
            # Engines expect a target for the calibrated phases and no other.
            if targets == own.get("target_sparsity", {}):
                own.pop("target_sparsity", None)
        group: dict[str, Any] = {
            "algorithm": "skip_softmax",
            "targets": own.pop("targets", []),
            "ignore": own.pop("ignore", []),
            "threshold_scale_factor": {"formula": FORMULA, **factors},
            "target_sparsity": targets,
        }
        data["config_groups"] = {"group_0": group}
    data[OWN_KEY] = own
    data["producer"] = {"name": "hf-sparse-attention", "version": __version__}
    return data


def _for_engines(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """The factors `{phase: {"a", "b"}}` and target sparsities that other engines shall read."""
    fits = fields.get("fits", {})
    fit: dict[str, Any] = fits.get(GROUP_GEOMETRY) or next(iter(fits.values()), {})
    factors: dict[str, Any] = {p: {"a": fit[p]["a"], "b": fit[p]["b"]} for p in PHASES if p in fit}
    recommended = {
        phase: fit[phase]["target_sparsity"] for phase in factors if "target_sparsity" in fit[phase]
    }
    if fields["method"] == "blasst":
        factors |= fields.get("threshold_scale_factor", {})
    targets = {**recommended, **fields.get("target_sparsity", {})}
    return factors, {phase: s for phase, s in targets.items() if phase in factors}


def read(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config from any of the spellings in use; the inverse of `write`.

    Raises:
        ValueError: for a newer schema, unknown keys among our own, an unknown formula, or a dict
            that holds neither our key nor exactly one skip-softmax group.
    """
    if not is_ours(data):
        raise ValueError(
            f"{CONFIG_KEY}: expected the key {OWN_KEY!r} or one group with an algorithm of "
            f"{list(_ALGORITHMS)}, got the keys {sorted(map(str, data))}"
        )
    groups = [group for group in _groups(data) if _is_skip_softmax(group)]
    if len(groups) > 1:
        raise ValueError(f"{CONFIG_KEY}: expected one skip-softmax group, got {len(groups)}")
    group = groups[0] if groups else {}
    own = data.get(OWN_KEY, {})
    if not isinstance(own, Mapping):
        raise ValueError(f"{OWN_KEY}: expected a dict, got {own!r}")
    version = own.get("schema_version", SCHEMA_VERSION)
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise ValueError(
            f"{OWN_KEY}.schema_version: expected 1 to {SCHEMA_VERSION}, got {version!r}"
            "; a newer hf-sparse-attention may read it"
        )
    if unknown := sorted(set(own) - {*_OWN, *_SHARED}):
        raise ValueError(f"{OWN_KEY}: expected keys of {sorted((*_OWN, *_SHARED))}, got {unknown}")

    fields = dict(own)
    for name in ("targets", "ignore"):
        if group.get(name):
            fields[name] = group[name]
    if fields.get("targets") == [EVERY_ATTENTION]:
        del fields["targets"]
    if "fits" not in own:  # else they only repeat one of the fits
        factors = group.get("threshold_scale_factor", data.get("threshold_scale_factor"))
        if factors is not None:
            fields["threshold_scale_factor"] = _read_factors(factors)
        targets = group.get("target_sparsity", data.get("target_sparsity"))
        if isinstance(targets, Mapping):
            fields["target_sparsity"] = {**own.get("target_sparsity", {}), **targets}
        elif targets is not None:
            fields["target_sparsity"] = targets
    if version == 1:
        _migrate_1(fields)
    fields.setdefault("method", "blasst")
    if "producer" in data and OWN_KEY not in data:
        fields["provenance"] = {"producer": data["producer"]}
    return fields


def _migrate_1(fields: dict[str, Any]) -> None:
    """Turns the fields of schema version 1 into version 2's: a calibrated factor becomes a fit."""
    fields["schema_version"] = SCHEMA_VERSION
    geometry = fields.get("geometry")
    quality = fields.get("provenance", {}).get("fit", {})
    factors = dict(fields.get("threshold_scale_factor") or {})
    fit: dict[str, Any] = {"geometry": geometry}
    for phase in [p for p in PHASES if p in quality and p in factors]:
        predicted = quality[phase].get("predicted", {})
        targets = sorted({float(s) for row in predicted.values() for s in row})
        if factors[phase]["b"] == 0 and len(targets) > 1:
            continue  # the user has set another one since
        fit[phase] = {**factors.pop(phase), "r2": quality[phase].get("r2"), "predicted": predicted}
        if targets:
            fit[phase]["sparsity"] = [targets[0], targets[-1]]
        if lengths := quality[phase].get("lengths"):
            fit[phase]["lengths"] = [min(lengths), max(lengths)]
    if geometry is None or len(fit) == 1:
        return
    fields["fits"] = {BlockGeometry(**geometry).name: fit}
    fields["threshold_scale_factor"] = factors or None
    fields["provenance"] = {n: x for n, x in fields["provenance"].items() if n != "fit"}


def _groups(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = data.get("config_groups")
    if isinstance(groups, Mapping):
        return [group for group in groups.values() if isinstance(group, Mapping)]
    return [data]  # flat: the group's keys stand at top level


def _is_skip_softmax(group: Mapping[str, Any]) -> bool:
    return any(group.get(key) in _ALGORITHMS for key in ("algorithm", "sparse_algo")) or (
        "threshold_scale_factor" in group
    )


def _read_factors(factors: Any) -> dict[str, Any]:
    """`{phase: {"a", "b"}}` from either formula, or from plain numbers, where a is the number."""
    if not isinstance(factors, Mapping):
        return {phase: {"a": factors, "b": 0.0} for phase in PHASES}
    formula = factors.get("formula", FORMULA)
    if formula not in (FORMULA, LOG_FORMULA):
        raise ValueError(
            f"threshold_scale_factor.formula: expected {FORMULA!r} or {LOG_FORMULA!r}, "
            f"got {formula!r}"
        )
    read: dict[str, Any] = {}
    for phase, value in factors.items():
        if phase == "formula":
            continue
        if isinstance(value, Mapping) and "log_a" in value:
            rest = {name: x for name, x in value.items() if name != "log_a"}
            value = {"a": math.exp(value["log_a"]), **rest}
        read[phase] = value
    return read
