"""Settings made runnable: thresholds for those that need them, and a model that runs with them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attention.backends import BACKENDS, choose_geometry
from hf_sparse_attention.calibration.api import DEFAULT_TARGETS, settings_from
from hf_sparse_attention.calibration.attach import attached, running
from hf_sparse_attention.calibration.bundled import Kind, bundled
from hf_sparse_attention.calibration.data import token_samples
from hf_sparse_attention.calibration.observation import Observations
from hf_sparse_attention.calibration.progress import forget, run
from hf_sparse_attention.config import Granularity, MethodName, SparseAttentionConfig
from hf_sparse_attention.evaluation.settings import Setting
from hf_sparse_attention.evaluation.window import SlidingWindow
from hf_sparse_attention.methods import METHODS
from hf_sparse_attention.settings import announce
from hf_sparse_attention.types import PHASES, AttentionCall, BlockGeometry

logger = logging.getLogger(__name__)

#: What an evaluation calibrates on: not on needles, which its tasks ask for.
CALIBRATED_ON: tuple[Kind, ...] = ("prose", "code")

#: Calibrated settings by the granularity of their coefficients.
Calibrated = Mapping[Granularity, SparseAttentionConfig]


@dataclass(frozen=True)
class Way:
    """A setting as one model runs it.

    Args:
        setting: what was asked for.
        geometry: the blocks that are counted, and skipped.
        config: the settings that run it; None for dense and a window, which have none.
    """

    setting: Setting
    geometry: BlockGeometry
    config: SparseAttentionConfig | None = None

    @contextmanager
    def running(self, model: Any) -> Iterator[None]:
        """`model` in eval mode, running this way; all as it was afterwards."""
        if self.config is not None:
            with running(model, self.config):
                yield
        elif self.setting.kind == "window":
            with attached(model, SlidingWindow(model, self.setting, self.geometry)):
                yield
        else:
            # Under settings that nobody reads: what is put back afterwards is the same for all.
            with running(model, _EXACT):
                model.set_attn_implementation(dense_name(model))
                yield


_EXACT = SparseAttentionConfig(max_dropped_mass=dict.fromkeys(PHASES, 0.0))


def dense_name(model: Any) -> str:
    """The attention that `dense` runs: PyTorch's SDPA; `eager` for models that have no SDPA."""
    return "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"


def ways(settings: Sequence[Setting], calibrated: Calibrated, geometry: BlockGeometry) -> list[Way]:
    """Each of the settings made runnable on `geometry`.

    Raises:
        ValueError: a setting needs thresholds that `calibrated` lacks.
    """
    made = [Way(each, geometry, _config(each, calibrated, geometry)) for each in settings]
    for way in made:
        if way.config is not None:
            METHODS[way.config.method].check(way.config)
            announce(way.config)
    return made


def _config(
    setting: Setting, calibrated: Calibrated, geometry: BlockGeometry
) -> SparseAttentionConfig | None:
    if setting.kind in ("dense", "window"):
        return None
    if setting.kind == "never":
        return SparseAttentionConfig(
            threshold_scale_factor={phase: {"a": 0.0, "b": 0.0} for phase in PHASES},
            geometry=geometry,
        )
    if setting.kind == "budget":
        assert setting.amount is not None
        budget = dict.fromkeys(PHASES, setting.amount)
        return SparseAttentionConfig(max_dropped_mass=budget, geometry=geometry)
    found = calibrated.get(setting.granularity)
    if found is None:
        raise ValueError(
            f"{setting.name}: expected thresholds calibrated by {setting.granularity}, got those "
            f"by {', '.join(calibrated) or 'none'}; calibrate(model, granularity="
            f"{setting.granularity!r}) makes them, and without settings of its own a model is "
            "calibrated here"
        )
    plain = replace(
        found,
        geometry=geometry,
        threshold_scale_factor=None,
        max_dropped_mass=None,
        granularity=setting.granularity,
    )
    if setting.kind == "bsfa":
        return replace(plain, method="bsfa", level=setting.level)
    assert setting.amount is not None
    fits = plain.fits.get(geometry.name)
    missing = [phase for phase in PHASES if fits is None or phase not in fits.phases]
    if missing or not all(fit.b for fit in plain.fits[geometry.name].phases.values()):
        raise ValueError(
            f"{setting.name}: expected settings fitted on {geometry.name} over several targets in "
            f"{' and '.join(missing or PHASES)}, got fits for {sorted(plain.fits) or 'none'}"
        )
    return replace(plain, method="blasst", target_sparsity=dict.fromkeys(PHASES, setting.amount))


def preferred_geometry(model: Any) -> BlockGeometry:
    """The blocks that suit this machine's backend best."""
    device = next(model.parameters()).device
    x = torch.zeros((1, 1, 64, 64), device=device)
    names = {name for backend in BACKENDS.values() for name in backend.PREFERRED}
    found = [BlockGeometry(), *map(BlockGeometry.from_name, sorted(names))]
    return choose_geometry(AttentionCall(x, x, x, scale=0.125), list(dict.fromkeys(found)))


class ThresholdSource:
    """Where an evaluation's thresholds come from, settled before any work.

    Args:
        model: a transformers causal language model.
        settings: what is to be evaluated.
        config: calibrated settings; None: the model's own, if its config holds thresholds, else
            they are calibrated when they are needed.
        geometry: the blocks that run; None: those that suit the backend best.

    Raises:
        ValueError: the calibrated settings lack what one of `settings` needs.
    """

    def __init__(
        self,
        model: Any,
        settings: Sequence[Setting],
        config: SparseAttentionConfig | None = None,
        geometry: str | BlockGeometry | None = None,
    ) -> None:
        self.model, self.settings = model, settings
        if isinstance(geometry, str):
            geometry = BlockGeometry.from_name(geometry)
        self.geometry = preferred_geometry(model) if geometry is None else geometry
        if config is None:
            own = SparseAttentionConfig.from_model_config(model.config)
            config = own if own is not None and (own.fits or own.tables) else None
        self._given: Calibrated | None = None
        if config is not None:
            self._given = {"global": config, config.granularity: config}
            ways(settings, self._given, self.geometry)

    def described(self) -> str | dict[str, Any]:
        """What they are, JSON-ready."""
        if self._given is None:
            return "calibrated for this evaluation"
        return self._given["global"].to_dict()

    def calibrated(
        self, tokenizer: Any, lengths: Sequence[int], folder: Path, progress: bool
    ) -> Calibrated:
        """The thresholds; calibrated now, if none were given. As in `calibrated_for`."""
        if self._given is not None:
            return self._given
        return calibrated_for(
            self.settings, self.model, tokenizer, lengths, self.geometry, folder, progress
        )


def calibrated_for(
    settings: Sequence[Setting],
    model: Any,
    tokenizer: Any,
    lengths: Sequence[int],
    geometry: BlockGeometry,
    folder: Path,
    progress: bool = True,
) -> Calibrated:
    """Thresholds for those of `settings` that need them, calibrated on the bundled prose and code.

    They are kept in `folder`, where a later call finds them, and from where a run that was killed
    continues.

    Args:
        settings: what is to be evaluated.
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        lengths: that will be evaluated; the same are calibrated.
        geometry: the blocks to calibrate for.
        folder: of the calibration.
        progress: show a bar.
    """
    needed: dict[Granularity, None] = dict.fromkeys(
        each.granularity for each in settings if each.kind in ("blasst", "bsfa")
    )
    if not needed:
        return {}
    if all((folder / each / "config.json").is_file() for each in needed):
        return {each: SparseAttentionConfig.from_pretrained(folder / each) for each in needed}
    levels = sorted({each.level for each in settings if each.kind == "bsfa" and each.level})
    asked = {each.amount for each in settings if each.kind == "blasst" and each.amount}
    observed = Observations([geometry], levels, keep_sink=True)
    samples = _samples(tokenizer, lengths)
    with attached(model, observed):
        run(model, samples, observed, folder, progress)
    method: MethodName = "blasst" if asked else "bsfa"
    found: dict[Granularity, SparseAttentionConfig] = {}
    for each in needed:
        config = settings_from(observed, model, method, sorted(asked | set(DEFAULT_TARGETS)), each)
        about = {
            "data": f"bundled texts: {', '.join(CALIBRATED_ON)}",
            "samples": len(samples),
            "lengths": sorted({len(ids) for ids in samples}),
        }
        found[each] = replace(config, provenance={**about, **config.provenance})
        found[each].save_pretrained(folder / each)
    forget(folder)
    return found


def _samples(tokenizer: Any, lengths: Sequence[int]) -> list[Tensor]:
    """One of each kind of text at each length."""
    return [
        ids
        for kind in CALIBRATED_ON
        for ids in token_samples([bundled(kind)], tokenizer, lengths, 1)
    ]
