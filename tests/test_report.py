"""The report: parses, refers to nothing outside, says what the calibration found."""

import json
import sys
from dataclasses import replace
from itertools import product
from xml.etree import ElementTree

import pytest
import torch
from browser import CHROMIUM, XHTML, colours_of, refers_outside
from tiny_models import llama

from hf_sparse_attention import SparseAttentionConfig, calibrate
from hf_sparse_attention.calibration.allocation import coefficients
from hf_sparse_attention.calibration.attach import attached
from hf_sparse_attention.calibration.observation import Observations
from hf_sparse_attention.calibration.prediction import with_predictions
from hf_sparse_attention.calibration.progress import run
from hf_sparse_attention.calibration.report import write_report
from hf_sparse_attention.calibration.report_data import report_data
from hf_sparse_attention.fingerprint import ModelFingerprint
from hf_sparse_attention.fits import Fit, PhaseFit
from hf_sparse_attention.thresholds import Thresholds
from hf_sparse_attention.types import PHASES, BlockGeometry

GEOMETRIES = [BlockGeometry(16, 16), BlockGeometry(16, 1)]


def observed(seed, lengths):
    torch.manual_seed(0)
    model = llama().eval()
    observations = Observations(GEOMETRIES, levels=[1, 4])
    torch.manual_seed(seed)
    samples = [torch.randint(3, 97, (n,)) for n in lengths]
    with attached(model, observations):
        run(model, samples, observations, progress=False)
    return observations


@pytest.fixture(scope="module")
def calibration():
    phase = PhaseFit(a=0.5, b=6.0, lengths=(128, 256), sparsity=(0.3, 0.7), r2=0.97, residual=0.1)
    phase = replace(phase, budget={"a": 0.001, "b": 5.0}, costs=[{"target": 0.5, "kl": 0.01}])
    fits = {g.name: Fit(g, dict.fromkeys(PHASES, phase)) for g in GEOMETRIES}
    config = SparseAttentionConfig(
        fits=fits,
        target_sparsity=0.5,
        provenance={
            "samples": 2,
            "data": "<b>bundled</b> & so on",
            "predicted_sparsity": {"16x1": {"prefill": {"1": 0.7, "4": 0.25}}},
        },
    )
    observations = observed(1, [128, 256])
    return with_predictions(config, observations, observed(2, [192]), [0.3, 0.5]), observations


@pytest.fixture(scope="module")
def page(calibration, tmp_path_factory):
    config, observations = calibration
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(config, observations, path, title="tiny <llama>")
    return path


def test_it_is_well_formed_and_escapes_what_it_shows(page):
    root = ElementTree.fromstring(page.read_text())
    assert root.findtext(f".//{XHTML}h1") == "Calibration of tiny <llama>"
    assert "<b>bundled</b> & so on" in [cell.text for cell in root.iter(f"{XHTML}td")]
    assert "None" not in "".join(root.itertext())


def test_it_refers_to_nothing_outside_and_runs_no_script(page):
    assert not refers_outside(page)


def test_every_figure_is_a_picture_with_a_description(page):
    root = ElementTree.fromstring(page.read_text())
    images = list(root.iter(f"{XHTML}img"))
    assert len(images) == 4
    for image in images:
        assert len(image.get("alt")) > 20


def test_the_data_is_json_and_says_what_was_seen(calibration):
    config, observations = calibration
    data = json.loads(json.dumps(report_data(config, observations)))
    assert {(row["geometry"], row["phase"]) for row in data["fits"]} == {
        (g.name, phase) for g in GEOMETRIES for phase in PHASES
    }
    assert len(data["budgets"]) == 4 * 3
    assert [(row["level"], row["sparsity"]) for row in data["levels"]] == [(1, 0.7), (4, 0.25)]
    assert [row["kl"] for row in data["costs"]] == [0.01] * 4
    held_out = data["held_out"]
    # 192 keys for prefill; decode's positions go down to half of that.
    assert {row["length"] for row in held_out if row["phase"] == "prefill"} == {192}
    assert {row["target"] for row in held_out} == {0.3, 0.5}
    assert data["worst"] == max(abs(row["measured"] - row["target"]) for row in held_out)
    for row in data["curves"]:
        assert row["sparsity"] == sorted(row["sparsity"])
        assert len(row["lambda"]) == len(row["sparsity"]) > 10
        assert row["lambda"][-1] <= 1.0


@pytest.mark.parametrize("granularity", ["global", "layer", "head"])
def test_heat_maps_show_what_runs(calibration, granularity):
    """Together, the layers and heads skip what was predicted for all."""
    config, observations = calibration
    config = replace(config, target_sparsity=0.1)
    if granularity != "global":
        tensors = {}
        for name, phase in product(observations.geometries, PHASES):
            log_a, b = coefficients(observations, name, phase, [0.05, 0.1], granularity)
            tensors |= {f"{name}.{phase}.log_a": log_a, f"{name}.{phase}.b": b}
        fingerprint = ModelFingerprint(layers=2, heads=4)
        tables = Thresholds(tensors, observations.geometries, fingerprint=fingerprint)
        config = replace(config, granularity=granularity, tables=tables)
    config = with_predictions(config, observations, None, [0.1])
    for row in report_data(config, observations)["heads"]:
        phase = config.fits[row["geometry"]].phases[row["phase"]]
        found = torch.tensor(row["sparsity"])
        assert found.shape == (2, 4 if row["phase"] == "prefill" else 2)
        # Every voter sees as many blocks as any other.
        predicted = phase.predicted[str(row["length"])]["0.1"]
        assert float(found.mean()) == pytest.approx(predicted, abs=2e-4)


def test_a_config_alone_has_a_report_too(calibration, tmp_path):
    write_report(calibration[0], None, tmp_path / "report.html")
    text = "".join(ElementTree.fromstring((tmp_path / "report.html").read_text()).itertext())
    assert "Target against measured" in text
    assert "Layers and heads" not in text
    write_report(SparseAttentionConfig(max_dropped_mass=0.1), None, tmp_path / "report.html")
    assert "No scale factors were fitted" in (tmp_path / "report.html").read_text()


def test_calibrate_writes_it(tmp_path):
    """Of a real calibration: what the page says was fitted is what the config holds."""
    torch.manual_seed(0)
    samples = [torch.randint(3, 97, (200,)) for _ in range(2)]
    settings = {"geometries": "16x1", "progress": False}
    config = calibrate(llama().eval(), samples, report=tmp_path / "report.html", **settings)
    root = ElementTree.fromstring((tmp_path / "report.html").read_text())
    cells = [cell.text for cell in root.iter(f"{XHTML}td")]
    for fit in config.fits["16x1"].phases.values():
        assert f"{fit.a:.4g}" in cells
        assert f"{fit.b:.4g}" in cells
    assert "Nothing was held out" in "".join(root.itertext())


def test_without_matplotlib_the_error_says_what_to_install(calibration, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-sparse-attention\[plots\]'"):
        write_report(*calibration, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ImportError, match="expected matplotlib"):
        calibrate(torch.nn.Linear(1, 1), report=tmp_path / "report.html")


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_every_figure(page, tmp_path):
    """Headless and without network: the figures, by their colours, are on the screenshot."""
    colours = colours_of(page, tmp_path)
    shown = {"band of the goal": "edf2f7", "a target's dots": "2b6cb0", "heat map": "440154"}
    for what, colour in shown.items():
        assert tuple(bytes.fromhex(colour)) in colours, what
