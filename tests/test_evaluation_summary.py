"""What a summary makes of a result: checked on numbers that can be worked out by hand."""

import json
import math
import re
import statistics

import pytest

from hf_sparse_attention.evaluation import summary
from hf_sparse_attention.evaluation.markdown import markdown, task_points


def cell(task, length, setting, scores, seconds, rate, **more):
    return {
        "task": task,
        "length": length,
        "setting": setting,
        "scores": scores,
        "first_token_s": seconds,
        "tokens_per_s": rate,
        **more,
    }


def skipped(*sparsity):
    rest = {name: [0.1] * len(sparsity) for name in ("layers", "heads", "least", "most", "p50")}
    return {"sparsity": list(sparsity), **rest, "p99": [0.01, 0.03], "max": [0.1, 0.2]}


@pytest.fixture
def result():
    """Two tasks, two lengths, two samples; `blasst:0.5` is slower at 1024 and faster at 2048."""
    cells = []
    for length, fast in ((1024, 0.5), (2048, 2.0)):
        cells += [
            cell("a", length, "dense", [1.0, 1.0], [2.0, 2.0], [10.0, 10.0], depths=[0.0, 0.96]),
            cell("b", length, "dense", [0.5, 0.0], [2.0, 2.0], [10.0, None]),
            cell(
                *("a", length, "blasst:0.5", [1.0, 0.0], [2.0 / fast] * 2, [10.0 * fast] * 2),
                depths=[0.0, 0.96],
                prefill=skipped(0.4, 0.6),
                decode=skipped(0.4, 0.6),
            ),
            cell(
                *("b", length, "blasst:0.5", [0.5, 0.5], [2.0 / fast] * 2, [10.0 * fast, None]),
                prefill=skipped(0.4, 0.6),
                decode=skipped(0.4, 0.6),
            ),
        ]
    texts = [
        {"setting": name, "length": length, "phase": phase, "kl": kl, "nll": [1.0, 2.0]}
        for name, kl in (("dense", [0.0, 0.0]), ("blasst:0.5", [0.1, 0.3]))
        for length in (1024, 2048)
        for phase in ("prefill", "decode")
    ]
    return {
        "model": {"name": "m", "dtype": "float32", "class": "C", "parameters": 1, "weights": "w"},
        "machine": {"device": "d", "threads": 1, "hf_sparse_attention": "0", "torch": "2"},
        "configuration": {
            "tasks": ["a", "b"],
            "lengths": [1024, 2048],
            "settings": ["dense", "blasst:0.5"],
            "samples": 2,
            "geometry": "64x64",
            "thresholds": "calibrated for this evaluation",
        },
        "calibration": {},
        "seconds": 60.0,
        "cells": cells,
        "texts": texts,
    }


def test_by_setting(result):
    dense, blasst = summary.by_setting(result)
    assert dense["accuracy"] == pytest.approx((1.0 + 0.25) / 2)
    assert dense["change"] == 0.0
    assert dense["prefill"]["sparsity"] is None
    assert blasst["accuracy"] == pytest.approx(0.5)
    # Four cells of two samples: (1, 0) and (0.5, 0.5) at both lengths.
    spread = statistics.stdev([1.0, 0.0]) / math.sqrt(2)
    assert blasst["standard_error"] == pytest.approx(math.sqrt(2 * spread**2) / 4)
    assert blasst["change"] == pytest.approx((-0.5 + 0.25) / 2)
    differences = [statistics.stdev(x) / math.sqrt(2) for x in ([0.0, -1.0], [0.0, 0.5])]
    expected = math.sqrt(2 * sum(x**2 for x in differences)) / 4
    assert blasst["change_error"] == pytest.approx(expected)
    assert blasst["prefill"]["sparsity"] == pytest.approx(0.5)
    assert blasst["prefill"]["samples"] == pytest.approx(0.1)
    assert blasst["prefill"]["max"] == 0.2
    assert blasst["prefill_kl"][0] == pytest.approx(0.2)
    assert blasst["decode_perplexity"] == pytest.approx(math.exp(1.5))


def test_by_task(result):
    row = summary.by_task(result)[0]
    assert (row["task"], row["length"], row["samples"]) == ("a", 1024, 2)
    assert row["accuracy"] == {"dense": (1.0, 0.0), "blasst:0.5": (0.5, pytest.approx(0.5))}
    assert row["change"] == {"dense": (0.0, 0.0), "blasst:0.5": (-0.5, pytest.approx(0.5))}


def test_by_length_and_break_even(result):
    rows = {(row["length"], row["setting"]): row for row in summary.by_length(result)}
    assert rows[1024, "blasst:0.5"]["first_token_speedup"] == pytest.approx(0.5)
    assert rows[2048, "blasst:0.5"]["decode_speedup"] == pytest.approx(2.0)
    even = {"first_token_speedup": 2048, "decode_speedup": 2048}
    assert summary.break_even(result) == {"blasst:0.5": even}


def test_break_even_over_the_kernel_without_skipping(result):
    """`never` is as fast as blasst at 1024, and half as fast at 2048."""
    for length, fast in ((1024, 0.5), (2048, 1.0)):
        for task in ("a", "b"):
            times = [2.0 / fast] * 2, [10.0 * fast] * 2
            nothing = {phase: skipped(0.0, 0.0) for phase in ("prefill", "decode")}
            result["cells"].append(cell(task, length, "never", [0.0, 0.0], *times, **nothing))
    result["configuration"]["settings"].append("never")
    even = {"first_token_speedup": 2048, "decode_speedup": 2048}
    assert summary.break_even(result, "never") == {"blasst:0.5": even}
    assert summary.break_even(result)["never"] == dict.fromkeys(even, None)
    text = markdown(result)
    assert "| blasst:0.5 | 2048 tokens | 2048 tokens | 2048 tokens | 2048 tokens |" in text
    assert "| never | none | none |  |  |" in text


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ({1: 1.1, 2: 1.2}, 1),
        ({1: 1.1, 2: 0.9, 4: 1.1}, 4),
        ({1: 1.1, 2: 0.9}, None),
        ({1: None, 2: 1.5}, 2),
        ({}, None),
    ],
)
def test_shortest_faster(speedups, expected):
    assert summary.shortest_faster(speedups) == expected


def test_depths(result):
    found = summary.depths(result)["blasst:0.5"]
    assert [(row["depth"], row["length"], row["accuracy"]) for row in found] == [
        (0.0, 1024, 1.0),
        (0.0, 2048, 1.0),
        (1.0, 1024, 0.0),
        (1.0, 2048, 0.0),
    ]


def test_a_single_sample_has_no_error(result):
    for each in result["cells"]:
        for name in ("scores", "first_token_s", "tokens_per_s", "depths"):
            each[name] = each.get(name, [])[:1]
    row = summary.by_setting(result)[1]
    assert row["standard_error"] is None
    assert row["change_error"] is None
    json.dumps(summary.by_task(result), allow_nan=False)


def test_where_all_ran_dense_nothing_is_faster(result):
    for each in result["cells"]:
        each.pop("decode", None)
    assert summary.break_even(result)["blasst:0.5"] == {
        "first_token_speedup": 2048,
        "decode_speedup": None,
    }


def test_faster_means_three_quarters_of_the_samples(result):
    """Of the four samples at 2048 tokens one is slower than dense; then two."""
    for slow, expected in ((["a"], 2048), (["a", "b"], None)):
        for each in result["cells"]:
            if (each["setting"], each["length"]) == ("blasst:0.5", 2048) and each["task"] in slow:
                each["first_token_s"] = [4.0, 1.0]
        assert summary.break_even(result)["blasst:0.5"]["first_token_speedup"] == expected


def test_overview(result):
    found = summary.overview(result)
    json.dumps(found, allow_nan=False)
    assert [(row["length"], row["setting"]) for row in found["by_length"]] == [
        (n, name) for n in (1024, 2048) for name in ("dense", "blasst:0.5")
    ]
    assert found["break_even"] == summary.break_even(result)


def test_markdown(result):
    """All that an evaluation measures is on the card; times for each length by itself."""
    text = markdown(result)
    assert "2 tasks, of each 2 samples at 1024 tokens, 2 at 2048; blocks of 64x64" in text
    spread = "50% ± 10/10/10 | 50% ± 10/10/10"
    start = "| blasst:0.5 | 50.0 ± 17.7 | -12.5 ± 19.8 | 0.2 / 0.2 | 4.48 / 4.48"
    assert f"{start} | {spread} |" in text
    assert f"| {spread} | 0.50x (4 s) | 0.50x (5/s) |" in text
    assert f"| {spread} | 2.00x (1 s) | 2.00x (20/s) |" in text
    assert "| a | 1024 | 2/2 | 50 ± 50 |" in text
    assert "| blasst:0.5 | prefill | 50% | 10% | 10% | 0.1 | 0.02 | 0.2 |" in text
    assert "| blasst:0.5 | decode | 50% | 10% | 10% | 0.1 | 0.02 | 0.2 |" in text
    assert "| blasst:0.5 | 2048 tokens | 2048 tokens |" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({row.count("|") for row in table.splitlines()}) == 1


@pytest.mark.parametrize(
    ("mean", "error", "samples", "shown"),
    [
        (1.0, 0.0, 16, "16/16"),
        (0.0, 0.0, 16, "0/16"),
        (0.25, 0.0, 16, "25 ± 0"),
        (0.75, 0.1118, 16, "75 ± 11"),
        (1.0, None, 1, "1/1"),
        (0.5, None, 1, "50"),
    ],
)
def test_an_accuracy_without_spread_says_of_how_many(mean, error, samples, shown):
    assert task_points(mean, error, samples) == shown


def test_a_break_even_at_the_shortest_length_may_lie_below_it(result):
    for each in result["cells"]:
        each["length"] = 2048
    result["cells"] = result["cells"][4:]
    result["configuration"]["lengths"] = [2048]
    text = markdown(result)
    assert "| blasst:0.5 | at most 2048 tokens | at most 2048 tokens |" in text
    assert "### 2048 tokens" not in text
