"""The evaluation report: parses, refers to nothing outside, shows its figures in a browser."""

import base64
import re
import sys
from xml.etree import ElementTree

import pytest
from browser import CHROMIUM, XHTML, colours_of, refers_outside
from test_evaluation_summary import cell, skipped

from hf_sparse_attention.evaluation import report_plots, summary
from hf_sparse_attention.evaluation.report import write_report

SETTINGS = ["dense", "blasst:0.3", "blasst:0.5", "blasst:0.5:head", "window:0.5"]


@pytest.fixture(scope="module")
def result():
    """Each setting a little worse and faster than the one before."""
    cells, texts = [], []
    for length in (1024, 2048):
        for n, name in enumerate(SETTINGS):
            counts = {} if n == 0 else {"prefill": skipped(0.1 * n, 0.2 * n)}
            score = 1.0 - 0.2 * n
            cells.append(
                cell(
                    *("niah_single_1", length, name, [1.0, score], [1.0 / (n + 1)] * 2),
                    [10.0 + n] * 2,
                    depths=[0.0, 1.0],
                    **counts,
                )
            )
            texts += [
                {"setting": name, "length": length, "phase": p, "kl": [0.1 * n], "nll": [2.0]}
                for p in ("prefill", "decode")
            ]
    return {
        "model": {
            "name": "tiny <llama>",
            "dtype": "float32",
            "class": "Llama",
            "parameters": 1234567,
            "weights": "0123",
        },
        "machine": {"device": "d & e", "threads": 1, "hf_sparse_attention": "0", "torch": "2"},
        "configuration": {
            "tasks": ["niah_single_1"],
            "lengths": [1024, 2048],
            "settings": SETTINGS,
            "samples": 2,
            "geometry": "64x64",
            "thresholds": "calibrated for this evaluation",
        },
        "calibration": {"global": {"data": "prose", "lengths": [1024]}},
        "seconds": 60.0,
        "cells": cells,
        "texts": texts,
    }


@pytest.fixture(scope="module")
def page(result, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(result, path)
    return path


def test_it_is_well_formed_and_says_what_was_found(result, page):
    root = ElementTree.fromstring(page.read_text())
    assert root.findtext(f".//{XHTML}h1") == "Evaluation of tiny <llama>"
    cells = [cell.text for cell in root.iter(f"{XHTML}td")]
    assert "d & e" in cells
    row = summary.by_length(result)[1]
    speed, seconds = row["first_token_speedup"], row["first_token_s"]
    assert f"{speed:.2f}x ({seconds:.3g} s)" in cells
    row = summary.by_setting(result)[2]
    assert f"{row['prefill']['p99']:.2g}" in cells
    assert f"{100 * row['change']:+.1f} ± {100 * row['change_error']:.1f}" in cells
    assert "None" not in "".join(root.itertext())


def test_it_refers_to_nothing_outside(page):
    assert not refers_outside(page)


def test_every_figure_is_a_picture_with_a_description(page):
    root = ElementTree.fromstring(page.read_text())
    images = list(root.iter(f"{XHTML}img"))
    assert len(images) == 4
    for image in images:
        assert len(image.get("alt")) > 20
        svg = base64.b64decode(image.get("src").removeprefix("data:image/svg+xml;base64,"))
        texts = "".join(ElementTree.fromstring(svg).itertext())
        assert re.search(r"tokens", texts)


def test_the_legend_names_what_only_a_later_panel_shows(result):
    """Short inputs run dense on purpose: there is no sparsity to show in the first panel."""
    cells = [
        {k: x for k, x in each.items() if k != "prefill" or each["length"] > 1024}
        for each in result["cells"]
    ]
    svg = report_plots.accuracy_against_sparsity({**result, "cells": cells})
    texts = {element.text for element in ElementTree.fromstring(svg).iter()}
    assert {"blasst", "blasst, by head", "window"} <= texts


def test_the_same_result_gives_the_same_file(result, page, tmp_path):
    write_report(result, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_one_setting_alone_has_a_report_too(result, tmp_path):
    alone = {
        **result,
        "configuration": {**result["configuration"], "settings": ["dense"], "lengths": [1024]},
        "cells": [
            {name: x for name, x in each.items() if name != "depths"}
            for each in result["cells"]
            if (each["setting"], each["length"]) == ("dense", 1024)
        ],
        "texts": [],
        "calibration": {},
    }
    write_report(alone, tmp_path / "report.html")
    root = ElementTree.fromstring((tmp_path / "report.html").read_text())
    assert not list(root.iter(f"{XHTML}img"))


def test_without_matplotlib_the_error_says_what_to_install(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-sparse-attention\[plots\]'"):
        write_report(result, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_every_figure(page, tmp_path):
    colours = colours_of(page, tmp_path)
    shown = {
        "the first family's line": "2b6cb0",
        "the second family's line": "c05621",
        "dense": "718096",
        "heat map, all right": "fde725",
        "heat map, one in five": "414487",
    }
    for what, colour in shown.items():
        assert tuple(bytes.fromhex(colour)) in colours, what
