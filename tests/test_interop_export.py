"""What other engines are given: the numbers, the form, and what is said about the differences."""

import json
import math
import re

import pytest

from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.config_schema import CONFIG_KEY, FORMULA, OWN_KEY
from hf_sparse_attention.interop import ENGINES, export, write_key
from hf_sparse_attention.types import BlockGeometry

FACTORS = {"prefill": {"a": 7.93, "b": 8.61}, "decode": {"a": 0.12, "b": 9.85}}
CONFIG = SparseAttentionConfig(
    threshold_scale_factor=FACTORS,
    target_sparsity={"prefill": 0.5, "decode": 0.4},
    geometry=BlockGeometry(64, 128),
    ignore=["model.layers.0.self_attn"],
)
PREFILL, DECODE = 7.93 * math.exp(8.61 * 0.5), 0.12 * math.exp(9.85 * 0.4)


def only(phase, **settings):
    return SparseAttentionConfig(
        threshold_scale_factor={phase: FACTORS[phase]}, target_sparsity={phase: 0.5}, **settings
    )


def test_modelopt_gets_the_key_of_config_json():
    found = export(CONFIG, "modelopt")
    assert json.loads(found.text) == found.content
    (group,) = found.content[CONFIG_KEY]["config_groups"].values()
    assert group == {
        "algorithm": "skip_softmax",
        "targets": ["Attention"],
        "ignore": ["model.layers.0.self_attn"],
        "threshold_scale_factor": {"formula": FORMULA, **FACTORS},
        "target_sparsity": {"prefill": 0.5, "decode": 0.4},
    }
    assert OWN_KEY not in found.content[CONFIG_KEY]
    assert SparseAttentionConfig.from_dict(found.content[CONFIG_KEY]).scale_factor(
        "prefill"
    ) == pytest.approx(PREFILL)


def test_tensorrt_llm_gets_yaml_and_python():
    import yaml

    found = export(CONFIG, "tensorrt-llm")
    assert yaml.safe_load(found.text) == found.content
    assert found.content == {
        CONFIG_KEY: {
            "algorithm": "skip_softmax",
            "threshold_scale_factor": {
                "prefill": pytest.approx(PREFILL, rel=1e-5),
                "decode": pytest.approx(DECODE, rel=1e-5),
            },
        }
    }
    (argument,) = re.findall(
        r"SkipSoftmaxAttentionConfig\(threshold_scale_factor=(.*)\)", found.text
    )
    assert json.loads(argument) == found.content[CONFIG_KEY]["threshold_scale_factor"]


def test_sglang_gets_two_variables():
    found = export(CONFIG, "sglang")
    assigned = dict(re.findall(r"^export (\w+)=(\S+)$", found.text, re.MULTILINE))
    assert {name: float(value) for name, value in assigned.items()} == found.content
    assert found.content == {
        "SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR": pytest.approx(PREFILL, rel=1e-5),
        "SGLANG_SKIP_SOFTMAX_DECODE_THRESHOLD_SCALE_FACTOR": pytest.approx(DECODE, rel=1e-5),
    }


def test_vllm_gets_flags():
    found = export(CONFIG, "vllm")
    words = found.text.split()
    assert words[::2] == [
        "--attention-config.trtllm_skip_softmax_prefill_threshold_scale_factor",
        "--attention-config.trtllm_skip_softmax_decode_threshold_scale_factor",
    ]
    assert [float(x) for x in words[1::2]] == pytest.approx([PREFILL, DECODE], rel=1e-5)
    assert any("pull request" in note for note in found.notes)


@pytest.mark.parametrize("engine", ENGINES)
def test_only_calibrated_phases(engine):
    found = export(only("prefill"), engine)
    assert "decode" not in json.dumps(found.content).lower()
    assert "decode" not in found.text.lower()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_target_given_here_replaces_the_configs(engine):
    found = export(CONFIG, engine, target_sparsity={"decode": 0.7})
    same = export(CONFIG, engine, target_sparsity={"prefill": 0.5, "decode": 0.7})
    assert found == same != export(CONFIG, engine)
    both = export(CONFIG, engine, target_sparsity=0.7)
    assert both != found
    if engine == "sglang":
        assert list(both.content.values()) == pytest.approx(
            [7.93 * math.exp(8.61 * 0.7), 0.12 * math.exp(9.85 * 0.7)], rel=1e-5
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_the_notes_name_what_differs(engine):
    config = SparseAttentionConfig.from_dict(
        {**CONFIG.to_dict(), OWN_KEY: {**CONFIG.to_dict()[OWN_KEY], "max_dropped_mass": 0.1}}
    )
    notes = " ".join(export(config, engine).notes)
    assert "64x128" in notes
    assert "block 0 first" in notes
    assert "128x128, ascending" in notes or "64x128 on Hopper, ascending" in notes
    assert f"{math.ceil(PREFILL)} keys (prefill)" in notes  # below, lambda would pass 1
    assert "max_dropped_mass" in notes


def test_the_notes_name_layers_that_one_number_cannot_leave_out():
    for engine in ("tensorrt-llm", "sglang", "vllm"):
        assert "model.layers.0.self_attn" in " ".join(export(CONFIG, engine).notes)


def test_modelopt_is_told_of_fits_it_would_not_use():
    notes = " ".join(export(SparseAttentionConfig(threshold_scale_factor=5), "modelopt").notes)
    assert "b <= 0" in notes
    assert "Not calibrated: decode" in " ".join(export(only("prefill"), "modelopt").notes)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (
            CONFIG,
            {"engine": "onnx"},
            "engine: expected one of modelopt, tensorrt-llm, sglang, vllm",
        ),
        (SparseAttentionConfig(), {}, "expected a BLASST threshold_scale_factor"),
        (SparseAttentionConfig(method="bsfa"), {}, "got the method 'bsfa'"),
        (CONFIG, {"target_sparsity": 1.0}, "expected [0, 1) for prefill, got 1.0"),
        (only("prefill"), {"target_sparsity": {"decode": 0.5}}, "expected calibrated phases"),
        (
            SparseAttentionConfig(threshold_scale_factor={"prefill": FACTORS["prefill"]}),
            {},
            "expected one for prefill",
        ),
    ],
    ids=["engine", "uncalibrated", "bsfa", "range", "phase", "no-target"],
)
def test_refusals(config, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        export(config, settings.pop("engine", "modelopt"), **settings)


def write_model(folder, **config):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def test_the_key_joins_a_checkpoint(tmp_path):
    content = export(CONFIG, "modelopt").content
    file = write_key(content, write_model(tmp_path, hidden_size=64))
    written = json.loads(file.read_text())
    assert written == {"model_type": "llama", "hidden_size": 64, **content}


def test_our_own_part_of_the_key_stays(tmp_path):
    write_model(tmp_path)
    CONFIG.save_pretrained(tmp_path)
    content = export(CONFIG, "modelopt", target_sparsity=0.3).content
    write_key(content, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())[CONFIG_KEY]
    assert written[OWN_KEY] == CONFIG.to_dict()[OWN_KEY]
    assert written["config_groups"] == content[CONFIG_KEY]["config_groups"]


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "minimax_m3_vl"},
        {"model_type": "step3p7"},
        {"model_type": "llama", "text_config": {"model_type": "minimax_m3_vl_text"}},
        {"model_type": "new", "sparse_attention_config": {"sparse_block_size": 128}},
        {"model_type": "new", "text_config": {"sparse_attention_config": {"sparse_topk": 4}}},
    ],
    ids=["minimax-m3", "step-3.7", "nested", "foreign-key", "nested-foreign-key"],
)
def test_models_that_consume_the_key_are_left_alone(tmp_path, config):
    before = json.dumps(config)
    (tmp_path / "config.json").write_text(before)
    with pytest.raises(ValueError, match="expected a model without use for the key"):
        write_key(export(CONFIG, "modelopt").content, tmp_path)
    assert (tmp_path / "config.json").read_text() == before


def test_a_name_that_vllm_reads_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected another name"):
        write_key({}, tmp_path / "sparse_attention_config.json")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: expected this file"):
        write_key(export(CONFIG, "modelopt").content, tmp_path)
