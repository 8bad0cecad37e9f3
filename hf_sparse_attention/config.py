"""`SparseAttentionConfig`: all the settings of a model's sparse attention, and where they are kept.

Scalars live in the model's config.json under `sparse_attention_config` (`config_schema.py`): what
calibration found for each block geometry (`fits.py`), and what the user set. Tables live in a
safetensors file beside it (`thresholds.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from hf_sparse_attention import config_schema, storage
from hf_sparse_attention import config_values as values
from hf_sparse_attention.config_schema import CONFIG_KEY
from hf_sparse_attention.fingerprint import ModelFingerprint
from hf_sparse_attention.fits import Fit, PhaseFit
from hf_sparse_attention.fits import fits as read_fits
from hf_sparse_attention.thresholds import Thresholds
from hf_sparse_attention.types import BlockGeometry, Phase

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.getLogger(__name__)

MethodName = Literal["blasst", "bsfa"]
METHOD_NAMES: tuple[MethodName, ...] = get_args(MethodName)
Granularity = Literal["global", "layer", "head"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)


@dataclass(frozen=True)
class SparseAttentionConfig:
    """How a model's attention skips blocks. A value: to change one, `dataclasses.replace` it.

    A setting by phase may be given as one number for both phases; it is kept as
    `{"prefill": x, "decode": y}`, and a phase that is absent is not set.

    Args:
        method: `"blasst"` (relative rule) or `"bsfa"` (calibrated absolute thresholds).
        fits: what was calibrated, by geometry (`"64x128"`).
        granularity: BLASST: whether calibrated coefficients are the same everywhere ("global", from
            `fits`), or each layer or head has its own (from `tables`).
        threshold_scale_factor: BLASST, by phase, instead of what was calibrated: `{"a", "b"}` of
            `a * exp(b * target_sparsity)`, and lambda is that over the number of keys. A plain
            number x means a = x, b = 0; 0 never skips.
        target_sparsity: BLASST, by phase, in [0, 1): the share of blocks to skip. None: what the
            fit of the geometry that runs recommends.
        max_dropped_mass: by phase, the budget eps >= 0: at most `eps / (1 + eps)` of any row's
            softmax mass is dropped. On top of thresholds, both conditions must agree.
        level: BSFA's k, how many blocks that compete are kept; one of `levels`. None: the largest.
        levels: the k that were calibrated.
        geometry: the blocks that run. None: of the calibrated ones, that which suits the backend
            best; 64x64 if nothing was calibrated.
        targets: names of the attention classes to run sparse; empty is all.
        ignore: names of modules that stay dense.
        min_length: requests with fewer keys run dense; None: no limit.
        backend: one of `available_backends()`, or "auto".
        keep_sink: BSFA, ours: never skip block 0.
        thresholds_file: `{"name", "sha256"}` of the table file beside config.json.
        provenance: how it was calibrated; JSON-ready, for people.
        schema_version: of our part of the JSON.
        tables: thresholds by layer and head, in memory; in the table file, not in JSON.

    Raises:
        ValueError: for a value out of its range; the message says what was expected and what was
            got.
    """

    method: MethodName = "blasst"
    fits: dict[str, Fit] = field(default_factory=dict)
    granularity: Granularity = "global"
    threshold_scale_factor: dict[Phase, dict[str, float]] | None = None
    target_sparsity: dict[Phase, float] | None = None
    max_dropped_mass: dict[Phase, float] | None = None
    level: int | None = None
    levels: list[int] = field(default_factory=list)
    geometry: BlockGeometry | None = None
    targets: list[str] = field(default_factory=list)
    ignore: list[str] = field(default_factory=list)
    min_length: int | None = None
    backend: str = "auto"
    keep_sink: bool = True
    thresholds_file: dict[str, str] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    schema_version: int = config_schema.SCHEMA_VERSION
    tables: Thresholds | None = field(default=None, repr=False, compare=False)
    #: What a method made of these settings for a device, by device; see `Method.prepare`.
    prepared: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if self.method not in METHOD_NAMES:
            raise ValueError(f"method: expected one of {list(METHOD_NAMES)}, got {self.method!r}")
        if self.schema_version != config_schema.SCHEMA_VERSION:
            raise ValueError(
                f"schema_version: expected {config_schema.SCHEMA_VERSION}, "
                f"got {self.schema_version!r}"
            )
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"granularity: expected one of {list(GRANULARITIES)}, got {self.granularity!r}"
            )
        put("fits", read_fits(self.fits))
        put("threshold_scale_factor", values.factors(self.threshold_scale_factor))
        put("target_sparsity", values.by_phase("target_sparsity", self.target_sparsity, below=1.0))
        put("max_dropped_mass", values.by_phase("max_dropped_mass", self.max_dropped_mass))
        if self.geometry is not None:
            put("geometry", values.geometry(self.geometry))
        if self.min_length is not None:
            values.integer("min_length", self.min_length, least=0)
        if not isinstance(self.backend, str) or not self.backend:
            raise ValueError(f"backend: expected a backend's name or 'auto', got {self.backend!r}")
        if not isinstance(self.keep_sink, bool):
            raise ValueError(f"keep_sink: expected True or False, got {self.keep_sink!r}")
        for name in ("targets", "ignore"):
            put(name, values.names(name, getattr(self, name)))
        if self.thresholds_file is not None:
            put("thresholds_file", values.pin("thresholds_file", self.thresholds_file))
        self._check_levels(put)

    def _check_levels(self, put: Any) -> None:
        levels = values.integers(
            "levels", self.levels if self.tables is None else self.tables.levels, least=1
        )
        put("levels", levels)
        if self.level is not None:
            values.integer("level", self.level, least=1)
            if levels and self.level not in levels:
                raise ValueError(f"level: expected one of {levels}, got {self.level}")

    def fit(self, phase: Phase, geometry: BlockGeometry) -> PhaseFit | None:
        """What was calibrated for `phase` on `geometry`, or None."""
        fit = self.fits.get(geometry.name)
        return fit.phases.get(phase) if fit is not None and fit.geometry == geometry else None

    def target(self, phase: Phase, geometry: BlockGeometry | None = None) -> float | None:
        """The target sparsity of `phase`: the one that was set, else the fit's own."""
        target = (self.target_sparsity or {}).get(phase)
        fit = None if geometry is None else self.fit(phase, geometry)
        return fit.target_sparsity if target is None and fit is not None else target

    def scale_factor(self, phase: Phase, geometry: BlockGeometry | None = None) -> float | None:
        """`a * exp(b * target_sparsity)` for `phase` on `geometry`; None if it is not calibrated.

        A factor that was set goes before that which was calibrated.

        Raises:
            ValueError: if the factor depends on a target sparsity that is not set.
        """
        factor = (self.threshold_scale_factor or {}).get(phase)
        fit = None if geometry is None else self.fit(phase, geometry)
        if factor is None and fit is not None:
            factor = {"a": fit.a, "b": fit.b}
        if factor is None:
            return None
        target = self.target(phase, geometry)
        if target is None and factor["b"] != 0 and factor["a"] != 0:
            raise ValueError(
                f"target_sparsity: expected a value in [0, 1) for {phase}, whose "
                f"threshold_scale_factor {factor} depends on it, got none"
            )
        return values.exponential(factor["a"], factor["b"], target or 0.0)

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready dict that stands under `sparse_attention_config` in config.json."""
        skip = {"tables", "prepared"}
        fields = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in skip
        }
        geometry = self.geometry and asdict(self.geometry)
        fits = {name: fit.to_dict() for name, fit in self.fits.items()}
        return config_schema.write({**fields, "geometry": geometry, "fits": fits})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparseAttentionConfig:
        """Reads `to_dict`'s form, ModelOpt's, and the variants of it in use.

        Raises:
            ValueError: for unknown keys of ours, a newer schema or values out of range.
        """
        return cls(**config_schema.read(data))

    def save_pretrained(self, folder: str | Path, *, model: Any = None) -> None:
        """Puts the settings into `folder`'s config.json and the tables beside it, each atomically.

        What else config.json says stays. Beside an adapter the settings stand in a file of their
        own, `sparse_attention_thresholds.json`.

        Args:
            folder: made if it is not there.
            model: saved there first, by its own `save_pretrained` (which alone does not know the
                tables): a transformers or PEFT model.

        Raises:
            ValueError: if config.json uses the key for something else, as a few models do.
            FileNotFoundError: the tables were never loaded, and are not in `folder` either.
        """
        if model is not None:
            model.save_pretrained(folder)
        saved = self
        if self.tables is not None:  # before config.json, which shall never name a missing file
            saved = replace(self, thresholds_file=self.tables.save(folder))
        elif self.thresholds_file is not None:
            self.load_tables(folder)
        storage.write_settings(folder, saved.to_dict())

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Puts the settings, tables and a section of the model card into a Hub repository.

        All in one commit, so that no reader ever sees a half. Options as in `hub.push`: `model`,
        `tokenizer`, `attachments`, `base_model`, `revision`, `private`, `token`, `create_pr`, ...
        """
        from hf_sparse_attention import hub

        return hub.push(self, repo_id, **options)

    @classmethod
    def from_pretrained(cls, source: str | Path, **download: Any) -> SparseAttentionConfig:
        """Reads the settings, tables included, of a local folder or a Hub repository.

        Args:
            source: a folder, or a repository such as `"org/model"`.
            download: what `huggingface_hub.hf_hub_download` takes: `revision` (a branch, tag or
                commit), `token`, `subfolder`, `cache_dir`, `local_files_only`, ...

        Raises:
            FileNotFoundError: there are no settings, or not the table file that they name.
            ValueError: config.json holds no settings, or settings or tables are bad.
        """
        file, content = storage.read_settings(source, **download)
        try:
            config = cls.from_dict(content[CONFIG_KEY])
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        fingerprint = ModelFingerprint.of(content)
        if commit := storage.commit_of(file):
            download = {**download, "revision": commit}
        return config.load_tables(source, fingerprint=fingerprint, **download)

    @classmethod
    def from_model_config(cls, config: Any) -> SparseAttentionConfig | None:
        """The settings that a transformers model config carries, or None.

        Tables are taken from where the model came from: the local folder, the Hub's cache, or, the
        first time, the Hub. Where they are out of reach the settings come without, and a warning
        says why; a method that cannot do without them then refuses to run.

        Raises:
            ValueError: settings are there, but they, or their tables, are bad.
        """
        data = getattr(config, CONFIG_KEY, None)
        if not config_schema.is_ours(data):
            return None
        assert isinstance(data, Mapping)
        source = getattr(config, "_name_or_path", "")
        try:
            settings = cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{source or type(config).__name__}: {error}") from error
        if settings.thresholds_file is None or not source:
            return settings
        try:
            return settings.load_tables(
                source,
                fingerprint=ModelFingerprint.of(config),
                **storage.place_of(source, settings.thresholds_file),
            )
        except OSError as error:
            logger.warning(
                "sparse attention runs without its tables: %s. "
                "hf_sparse_attention.load_thresholds(model, repo_or_folder) loads them",
                str(error).rstrip("."),
            )
            return settings

    def load_tables(
        self, source: str | Path, *, fingerprint: ModelFingerprint | None = None, **download: Any
    ) -> SparseAttentionConfig:
        """These settings with the tables that `thresholds_file` names, if it names any.

        They are taken from `source`, and checked against the pinned sha256 and `fingerprint`.
        """
        if self.thresholds_file is None:
            return self
        tables = Thresholds.load(
            storage.fetch(source, self.thresholds_file["name"], **download),
            sha256=self.thresholds_file["sha256"],
            fingerprint=fingerprint,
        )
        return replace(self, tables=tables)
