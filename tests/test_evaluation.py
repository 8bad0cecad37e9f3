"""The evaluation's runner: what it measures, what it keeps, and how it goes on."""

import json
import math
from dataclasses import replace

import pytest
import torch
from evaluation_tasks import Recall
from test_docs import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse_attention import SparseAttentionConfig, calibrate, collect_stats
from hf_sparse_attention.calibration.cost import HeldOut
from hf_sparse_attention.evaluation import benchmark, evaluate, runner, summary
from hf_sparse_attention.evaluation.measure import answer, counted
from hf_sparse_attention.evaluation.settings import parse_settings
from hf_sparse_attention.evaluation.ways import ThresholdSource, ways

SETTINGS = (
    "dense",
    "never",
    "blasst:0.5",
    "blasst:0.5:head",
    "bsfa:k=2",
    "budget:0.1",
    "window:0.5",
)
LENGTHS = (320, 512)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation") / "tiny"
    torch.manual_seed(0)
    save_tiny_model(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def run(tiny, folder=None, **changes):
    options = {"tasks": [Recall()], "lengths": LENGTHS, "settings": SETTINGS, "samples": 3}
    return evaluate(*tiny, output_dir=folder, progress=False, **{**options, **changes})


@pytest.fixture(scope="module")
def evaluated(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    return run(tiny, folder), folder


def test_the_result_is_complete(evaluated):
    result, folder = evaluated
    assert json.loads((folder / "evaluation.json").read_text()) == json.loads(json.dumps(result))
    cells = {(cell["task"], cell["length"], cell["setting"]): cell for cell in result["cells"]}
    assert set(cells) == {("recall", n, name) for n in LENGTHS for name in SETTINGS}
    for (_, _, name), cell in cells.items():
        for values in ("scores", "depths", "first_token_s", "tokens_per_s"):
            assert len(cell[values]) == 3
        assert cell["depths"] == [0.0, 0.5, 1.0]
        assert ("prefill" in cell) == (name != "dense")
        if name not in ("dense", "window:0.5"):
            assert len(cell["decode"]["p99"]) == 3
    assert {(row["setting"], row["length"], row["phase"]) for row in result["texts"]} == {
        (name, 512, phase) for name in SETTINGS for phase in ("prefill", "decode")
    }
    for key in ("hf_sparse_attention", "torch", "transformers", "device", "threads"):
        assert result["machine"][key]
    assert result["model"]["name"] == "tiny"
    assert len(result["model"]["weights"]) == 16
    assert result["calibration"]["head"]["data"] == "bundled texts: prose, code"


def test_rules_skip_what_they_should(evaluated):
    rows = {row["setting"]: row for row in summary.by_setting(evaluated[0], [512])}
    assert rows["never"]["prefill"]["sparsity"] == 0.0
    assert rows["never"]["prefill"]["max"] == 0.0
    assert rows["never"]["prefill_kl"][0] < 1e-5
    assert rows["never"]["change"] == 0.0
    for name in ("blasst:0.5", "blasst:0.5:head", "window:0.5"):
        assert rows[name]["prefill"]["sparsity"] == pytest.approx(0.5, abs=0.15), name
    assert rows["budget:0.1"]["prefill"]["max"] <= 0.1 / 1.1 + 1e-6
    assert rows["bsfa:k=2"]["prefill_kl"][0] > 1e-4
    # Skipping by the scores costs less than skipping by the place.
    assert rows["blasst:0.5"]["prefill_kl"][0] < rows["window:0.5"]["prefill_kl"][0]
    for row in rows.values():
        assert row["prefill_perplexity"] > 1.0


def test_a_way_runs_what_its_setting_says(evaluated):
    _, folder = evaluated
    calibrated = {
        each: SparseAttentionConfig.from_pretrained(folder / "calibration" / each)
        for each in ("global", "head")
    }
    geometry = next(iter(calibrated["head"].fits.values())).geometry
    found = {x.setting.name: x.config for x in ways(parse_settings(SETTINGS), calibrated, geometry)}
    assert found["dense"] is None
    assert found["window:0.5"] is None
    running = {name: config for name, config in found.items() if config is not None}
    assert {config.geometry for config in running.values()} == {geometry}
    assert [name for name, x in running.items() if x.granularity == "head"] == ["blasst:0.5:head"]
    assert [name for name, x in running.items() if x.method == "bsfa"] == ["bsfa:k=2"]
    assert found["bsfa:k=2"].level == 2
    for name in ("blasst:0.5", "blasst:0.5:head"):
        assert found[name].target_sparsity == {"prefill": 0.5, "decode": 0.5}
        assert found[name].max_dropped_mass is None
    assert found["budget:0.1"].max_dropped_mass == {"prefill": 0.1, "decode": 0.1}
    assert found["never"].scale_factor("prefill", geometry) == 0.0


def test_the_model_is_left_as_it_was(tiny, evaluated):
    model, _ = tiny
    assert model.config._attn_implementation == "sdpa"
    assert not any(name.startswith("_sparse_attention") for name in vars(model.model.layers[0]))


def test_a_run_that_was_killed_continues(tiny, evaluated, tmp_path, monkeypatch):
    measured, calls = runner._measured, []

    def dies(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(runner, "_measured", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path)
    assert not (tmp_path / "evaluation.json").exists()
    with pytest.raises(ValueError, match="expected no evaluation there"):
        run(tiny, tmp_path)
    with pytest.raises(ValueError, match=r"seed: expected 1, got 0"):
        run(tiny, tmp_path, seed=1, resume=True)
    resumed = run(tiny, tmp_path, resume=True)
    assert len(calls) == 4 + 3  # of six samples three were there
    for mine, theirs in zip(resumed["cells"], evaluated[0]["cells"], strict=True):
        for name in ("task", "length", "setting", "scores", "depths"):
            assert mine[name] == theirs[name]
        for phase in ("prefill", "decode"):
            assert mine.get(phase) == theirs.get(phase)
    assert resumed["texts"] == evaluated[0]["texts"]


def test_a_resumed_run_may_ask_for_more_samples(tiny, tmp_path, monkeypatch):
    quick = {"settings": ["dense"], "lengths": [128], "texts": False}
    once = run(tiny, samples=3, **quick)
    run(tiny, tmp_path, samples=1, **quick)
    measured, calls = runner._measured, []
    monkeypatch.setattr(runner, "_measured", lambda *args: calls.append(1) or measured(*args))
    more = run(tiny, tmp_path, samples=3, resume=True, **quick)
    assert len(calls) == 2  # the first was there
    assert [cell["scores"] for cell in more["cells"]] == [cell["scores"] for cell in once["cells"]]
    fewer = run(tiny, tmp_path, samples=2, resume=True, **quick)
    assert len(calls) == 2
    assert [len(cell["scores"]) for cell in fewer["cells"]] == [2]


def test_a_measurement_of_another_sample_is_refused(tiny, tmp_path):
    quick = {"settings": ["dense"], "lengths": [128], "samples": 1, "texts": False}
    run(tiny, tmp_path, **quick)
    (file,) = (tmp_path / "measurements").glob("*.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "answers": ["of another"]}))
    with pytest.raises(ValueError, match="got a measurement that asked for of another"):
        run(tiny, tmp_path, resume=True, **quick)


def test_the_seed_decides(tiny):
    quick = {"settings": ["dense"], "lengths": [128], "samples": 2, "texts": False}
    first, again, other = (run(tiny, seed=seed, **quick)["configuration"] for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": ["niah"]}, "tasks: expected names among"),
        ({"tasks": []}, "tasks: expected"),
        ({"lengths": []}, "lengths: expected positive"),
        ({"lengths": [32]}, "recall: expected at least 64"),
        ({"samples": 0}, "samples: expected a positive integer, or one for each"),
        ({"settings": ["blast:0.5"]}, "expected one of the forms dense, never, blasst:0.5"),
        ({"geometry": "64"}, "geometry: expected"),
        ({"chat_template": True}, "expected a tokenizer that has one"),
        (
            {"config": SparseAttentionConfig(threshold_scale_factor=0.5)},
            r"expected settings fitted on 64x\d+ over several targets",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_input_is_refused_before_any_work(tiny, tmp_path, monkeypatch, changes, said):
    monkeypatch.setattr(runner, "_measured", None)
    monkeypatch.setattr(runner, "_warm_up", None)
    with pytest.raises(ValueError, match=said):
        run(tiny, tmp_path, **changes)
    assert not (tmp_path / "measurements").exists()


def test_given_thresholds_are_used(tiny):
    """A user's calibration serves what it holds, and says what it lacks."""
    model, tokenizer = tiny
    config = calibrate(
        model,
        ["The rain in Spain. " * 40],
        tokenizer=tokenizer,
        lengths=[512],
        geometries="64x1",
        levels=[2],
        granularity="head",
        progress=False,
    )
    quick = {"lengths": [320], "samples": 1, "texts": False, "geometry": "64x1"}
    wanted = ["blasst:0.4", "blasst:0.4:head", "bsfa:k=2"]
    result = run(tiny, settings=wanted, config=config, **quick)
    assert result["configuration"]["settings"] == ["dense", *wanted]
    assert result["configuration"]["thresholds"]["config_groups"]
    for setting, said in (
        ("blasst:0.4:layer", "thresholds calibrated by layer, got those by global, head"),
        ("bsfa:k=3", r"level: expected one of \[2\], got 3"),
    ):
        with pytest.raises(ValueError, match=said):
            run(tiny, settings=[setting], config=config, **quick)


def test_counts_say_what_the_stats_say(tiny):
    model, tokenizer = tiny
    source = ThresholdSource(model, parse_settings(["budget:0.5"]), geometry="64x1")
    (_, way) = ways(source.settings, {}, source.geometry)
    ids = torch.tensor([tokenizer("The rain in Spain. " * 30)["input_ids"]])
    with way.running(model), collect_stats(model) as stats:
        found = answer(model, ids, 5)
    said, told = counted(stats), stats.to_dict()
    assert len(found.tokens) == 5
    assert len(found.step_s) == 4
    for phase in ("prefill", "decode"):
        heads = [
            skipped / visited
            for layer in told[phase]["layers"].values()
            for skipped, visited in zip(layer["skipped"], layer["visited"], strict=True)
        ]
        mean = sum(heads) / len(heads)
        spread = math.sqrt(sum((x - mean) ** 2 for x in heads) / len(heads))
        assert said[phase]["sparsity"] == told[phase]["sparsity"] > 0
        assert said[phase]["heads"] == pytest.approx(spread, abs=1e-6)
        assert said[phase]["least"] == pytest.approx(min(heads))
        assert said[phase]["p99"] == told[phase]["dropped_mass"]["p99"]


def test_answers_are_generates(tiny):
    """Token for token what `generate` gives, and the end of the text ends it."""
    model, tokenizer = tiny
    ids = torch.tensor([tokenizer("The rain in Spain")["input_ids"]])
    expected = model.generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=-1)
    expected = expected[0, ids.shape[1] :].tolist()
    assert answer(model, ids, 8).tokens == expected
    stop = expected[3]
    assert answer(model, ids, 8, ends=[stop]).tokens == expected[: expected.index(stop)]
    assert answer(model, ids, 8, enough=lambda tokens: len(tokens) == 2).tokens == expected[:2]


def test_costs_of_a_way_are_those_of_its_settings(tiny):
    model, tokenizer = tiny
    ids = torch.tensor(tokenizer("The rain in Spain stays. " * 20)["input_ids"])
    (_, way) = ways(parse_settings(["budget:0.5"]), {}, ThresholdSource(model, []).geometry)
    held_out = HeldOut(model, [ids])
    (by_way,) = held_out.costs([way.running], "prefill")
    (by_config,) = held_out.costs([replace(way.config, min_length=0)], "prefill")
    assert by_way == by_config
    assert by_way.kl > 0


def test_benchmark(tiny):
    result = benchmark(
        *tiny,
        lengths=[256, 512],
        settings=["never", "budget:0.5"],
        rounds=2,
        new_tokens=3,
        progress=False,
    )
    json.dumps(result, allow_nan=False)
    assert [(row["length"], row["setting"]) for row in result["rows"]] == [
        (n, name) for n in (256, 512) for name in ("dense", "never", "budget:0.5")
    ]
    for row in result["rows"]:
        assert len(row["first_token_s"]) == len(row["tokens_per_s"]) == 2
        if row["setting"] == "dense":
            assert row["first_token_speedup"] == row["decode_speedup"] == 1.0
        else:
            assert (row["sparsity"]["prefill"] > 0) == (row["setting"] == "budget:0.5")
    assert set(result["break_even"]) == {"never", "budget:0.5"}
    with pytest.raises(ValueError, match="at least 2 new tokens"):
        benchmark(*tiny, new_tokens=1)
    with pytest.raises(ValueError, match="expected at most"):
        benchmark(*tiny, lengths=[256, 10**6])
