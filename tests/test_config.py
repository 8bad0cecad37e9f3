"""Settings to JSON and back, the spellings of other tools, and an error for every bad value."""

import json
import math
from dataclasses import replace

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.config_schema import FORMULA
from hf_sparse_attention.thresholds import THRESHOLDS_NAME, ModelFingerprint, Thresholds
from hf_sparse_attention.types import BlockGeometry

# What ModelOpt exports; the numbers are a public fit of Qwen3-30B-A3B-2507.
MODELOPT = {
    "config_groups": {
        "group_0": {
            "algorithm": "skip_softmax",
            "targets": ["LlamaAttention"],
            "ignore": ["model.layers.0.self_attn"],
            "threshold_scale_factor": {
                "formula": "a * exp(b * target_sparsity)",
                "prefill": {"a": 7.93, "b": 8.61},
                "decode": {"a": 0.12, "b": 9.85},
            },
            "target_sparsity": {"prefill": 0.5, "decode": 0.4},
        }
    },
    "producer": {"name": "modelopt", "version": "0.45"},
}
FACTORS = {"prefill": {"a": 7.93, "b": 8.61}, "decode": {"a": 0.12, "b": 9.85}}
TARGETS = {"prefill": 0.5, "decode": 0.4}

FULL = SparseAttentionConfig(
    threshold_scale_factor=FACTORS,
    target_sparsity=TARGETS,
    max_dropped_mass={"decode": 0.1},
    geometry=BlockGeometry(64, 128, "ascending", 512),
    targets=["LlamaAttention"],
    ignore=["model.layers.0.self_attn"],
    min_length=1000,
    backend="reference",
    provenance={"samples": 3, "fit": {"prefill": {"r2": 0.99}}},
)


def thresholds(**settings):
    tensors = {f"64x64.{phase}.T": torch.randn(2, 2, 4, 5) for phase in ("prefill", "decode")}
    return Thresholds(tensors, {"64x64": BlockGeometry()}, levels=[2, 4], **settings)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(SparseAttentionConfig(), id="default"),
        pytest.param(FULL, id="blasst"),
        pytest.param(replace(FULL, method="bsfa", levels=[8, 16], level=16), id="bsfa"),
        pytest.param(replace(FULL, threshold_scale_factor=None), id="no-factor"),
        pytest.param(
            replace(FULL, threshold_scale_factor={"decode": FACTORS["decode"]}), id="one-phase"
        ),
        pytest.param(
            SparseAttentionConfig(
                method="bsfa",
                keep_sink=False,
                thresholds_file={"name": "x.safetensors", "sha256": "0" * 64},
            ),
            id="bsfa-file",
        ),
    ],
)
def test_json_round_trip(config):
    assert SparseAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_what_other_engines_read():
    """One skip-softmax group, numbers only in the phase dicts, the formula verbatim, calibrated
    phases only in target_sparsity."""
    data = replace(FULL, threshold_scale_factor={"prefill": FACTORS["prefill"]}).to_dict()
    (group,) = data["config_groups"].values()
    assert group["algorithm"] == "skip_softmax"
    assert group["threshold_scale_factor"] == {"formula": FORMULA, "prefill": FACTORS["prefill"]}
    assert group["target_sparsity"] == {"prefill": 0.5}
    assert group["targets"] == ["LlamaAttention"]
    assert group["ignore"] == ["model.layers.0.self_attn"]
    assert data["producer"]["name"] == "hf-sparse-attention"
    assert "config_groups" not in replace(FULL, method="bsfa").to_dict()


def _group():
    return json.loads(json.dumps(MODELOPT["config_groups"]["group_0"]))


def _flat():
    return _group()


def _renamed():
    group = _group()
    del group["algorithm"]
    return {"config_groups": {"group_0": {**group, "sparse_algo": "softmax_skip"}}}


def _top_level():
    group = _group()
    factors = group.pop("threshold_scale_factor")
    targets = group.pop("target_sparsity")
    return {
        "config_groups": {"group_0": group},
        "threshold_scale_factor": factors,
        "target_sparsity": targets,
    }


def _log_formula():
    group = _group()
    group["threshold_scale_factor"] = {
        "formula": "exp(log_a + b * target_sparsity)",
        "prefill": {"log_a": math.log(7.93), "b": 8.61},
        "decode": {"log_a": math.log(0.12), "b": 9.85},
    }
    return {"config_groups": {"group_0": group}}


def _with_another_group():
    other = {"algorithm": "something_else", "targets": ["x"]}
    return {"config_groups": {"group_0": other, "group_1": _group()}}


@pytest.mark.parametrize(
    "spelling",
    [lambda: MODELOPT, _flat, _renamed, _top_level, _log_formula, _with_another_group],
    ids=["modelopt", "flat", "sparse_algo", "top-level", "log_a", "two-groups"],
)
def test_spellings_of_other_tools_are_read(spelling):
    config = SparseAttentionConfig.from_dict(spelling())
    assert config.method == "blasst"
    assert config.target_sparsity == TARGETS
    assert config.targets == ["LlamaAttention"]
    assert config.ignore == ["model.layers.0.self_attn"]
    assert config.scale_factor("prefill") == pytest.approx(7.93 * math.exp(8.61 * 0.5))
    assert config.scale_factor("decode") == pytest.approx(0.12 * math.exp(9.85 * 0.4))


def test_plain_numbers_hold_for_both_phases():
    config = SparseAttentionConfig(threshold_scale_factor=5, max_dropped_mass=0.1)
    assert config.threshold_scale_factor == {
        "prefill": {"a": 5.0, "b": 0.0},
        "decode": {"a": 5.0, "b": 0.0},
    }
    assert config.max_dropped_mass == {"prefill": 0.1, "decode": 0.1}
    assert config.scale_factor("decode") == 5.0
    assert SparseAttentionConfig(threshold_scale_factor=0).scale_factor("prefill") == 0.0
    engine = {"threshold_scale_factor": {"prefill": 1000.0, "decode": 10.0}}
    assert SparseAttentionConfig.from_dict(engine).scale_factor("decode") == 10.0


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "flash"}, r"method: expected one of \['blasst', 'bsfa'\], got 'flash'"),
        ({"target_sparsity": 1.0}, r"target_sparsity\['prefill'\]: expected .*\[0, 1\), got 1.0"),
        ({"target_sparsity": -0.1}, r"\[0, 1\), got -0.1"),
        ({"target_sparsity": {"decode": NAN}}, r"target_sparsity\['decode'\].*got nan"),
        (
            {"target_sparsity": {"train": 0.5}},
            r"phases of \['prefill', 'decode'\], got \['train'\]",
        ),
        ({"target_sparsity": "0.5"}, "expected a number, got '0.5'"),
        ({"target_sparsity": True}, "expected a number, got True"),
        ({"max_dropped_mass": -1e-9}, r"max_dropped_mass.*\[0, inf\), got -1e-09"),
        ({"max_dropped_mass": INF}, "max_dropped_mass.*got inf"),
        ({"threshold_scale_factor": -1.0}, r"\['a'\]: expected .*got -1.0"),
        ({"threshold_scale_factor": NAN}, "threshold_scale_factor.*got nan"),
        ({"threshold_scale_factor": {"a": 1.0, "b": 0.0}}, "expected phases"),
        ({"threshold_scale_factor": {"prefill": {"a": 1.0}}}, r"keys 'a' and 'b', got \['a'\]"),
        ({"threshold_scale_factor": {"prefill": {"a": 1.0, "b": NAN}}}, r"\['b'\].*got nan"),
        ({"level": 0}, "level: expected an integer >= 1, got 0"),
        ({"level": 3, "levels": [2, 4]}, r"level: expected one of \[2, 4\], got 3"),
        ({"levels": [2.5]}, "levels: expected an integer"),
        ({"geometry": "64"}, "geometry: expected '<rows>x<keys>'.*got '64'"),
        ({"geometry": {"block_q": 64, "rows": 3}}, r"geometry: expected keys .*got \['rows'\]"),
        ({"geometry": {"block_q": 0}}, "geometry.block_q: expected an integer >= 1, got 0"),
        ({"geometry": {"order": "random"}}, "geometry.order: expected one of .*got 'random'"),
        ({"geometry": 64}, "geometry: expected a BlockGeometry.*got 64"),
        ({"min_length": -1}, "min_length: expected an integer >= 0, got -1"),
        ({"backend": ""}, "backend: expected .*got ''"),
        ({"keep_sink": 1}, "keep_sink: expected True or False, got 1"),
        ({"targets": "LlamaAttention"}, "targets: expected a list of names, got 'LlamaAttention'"),
        ({"thresholds_file": {"name": "x"}}, "thresholds_file: expected 'name' and 'sha256'"),
        ({"schema_version": 3}, "schema_version: expected 2, got 3"),
    ],
)
def test_bad_values_name_expected_and_got(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseAttentionConfig(**settings)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"hf_sparse_attention": {"methd": "blasst"}}, r"expected keys of .*got \['methd'\]"),
        ({"hf_sparse_attention": {"schema_version": 3}}, "expected 1 to 2, got 3; a newer"),
        ({"hf_sparse_attention": 3}, "hf_sparse_attention: expected a dict, got 3"),
        ({"window": 3}, r"expected the key 'hf_sparse_attention' or one group.*\['window'\]"),
        ({"config_groups": {"a": _group(), "b": _group()}}, "one skip-softmax group, got 2"),
        (
            {"threshold_scale_factor": {"formula": "a / L", "prefill": {"a": 1, "b": 0}}},
            "formula: expected 'a .*got 'a / L'",
        ),
    ],
)
def test_bad_json_names_expected_and_got(data, message):
    with pytest.raises(ValueError, match=message):
        SparseAttentionConfig.from_dict(data)


# Folders


def test_save_and_load_with_tables(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 9}))
    config = SparseAttentionConfig(method="bsfa", tables=thresholds(), level=4)
    config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["vocab_size"] == 9
    loaded = SparseAttentionConfig.from_pretrained(tmp_path)
    assert loaded.level == 4
    assert loaded.levels == [2, 4]
    assert loaded.thresholds_file["name"] == THRESHOLDS_NAME
    torch.testing.assert_close(loaded.tables.tensors, config.tables.tensors)
    assert not list(tmp_path.glob(".*")), "temporary files are left"


def test_an_interrupted_save_leaves_the_old_content(tmp_path, monkeypatch):
    FULL.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        replace(FULL, min_length=3).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_model_that_consumes_the_key_itself_is_left_alone(tmp_path):
    theirs = {"sparse_attention_config": {"use_sparse_attention": True, "block": 128}}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    with pytest.raises(ValueError, match="the model itself consumes"):
        FULL.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == theirs
    assert SparseAttentionConfig.from_model_config(LlamaConfig(**theirs)) is None


def test_a_folder_without_settings_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: expected this file"):
        SparseAttentionConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"expected the key 'sparse_attention_config'.*model_type"):
        SparseAttentionConfig.from_pretrained(tmp_path)


def test_a_checkpoint_carries_its_settings(tmp_path, caplog):
    """Through transformers' own save and load, tables beside it; a missing table is named."""
    model = tiny_models.llama()
    fingerprint = ModelFingerprint.of(model.config)
    config = SparseAttentionConfig(method="bsfa", tables=thresholds(fingerprint=fingerprint))
    model.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = SparseAttentionConfig.from_model_config(loaded.config)
    torch.testing.assert_close(found.tables.tensors, config.tables.tensors)
    (tmp_path / THRESHOLDS_NAME).unlink()
    assert SparseAttentionConfig.from_model_config(loaded.config).tables is None
    assert f"{THRESHOLDS_NAME}: expected this file, found none" in caplog.text
    with pytest.raises(FileNotFoundError, match=THRESHOLDS_NAME):
        SparseAttentionConfig.from_pretrained(tmp_path)
    without = replace(found, tables=None)
    with pytest.raises(FileNotFoundError, match=THRESHOLDS_NAME):
        without.save_pretrained(tmp_path)


def test_tables_of_another_model_are_refused(tmp_path):
    other = ModelFingerprint("llama", layers=3, heads=4, kv_heads=2, head_dim=16)
    config = SparseAttentionConfig(method="bsfa", tables=thresholds(fingerprint=other))
    tiny_models.llama().config.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another model: layers: expected 2, got 3"):
        SparseAttentionConfig.from_pretrained(tmp_path)


def test_a_file_name_with_a_path_is_refused():
    with pytest.raises(ValueError, match="expected a plain file name"):
        SparseAttentionConfig(thresholds_file={"name": "../x", "sha256": "0"})


def test_model_config_without_settings_has_none():
    assert SparseAttentionConfig.from_model_config(LlamaConfig()) is None
    assert SparseAttentionConfig.from_model_config(LlamaConfig(sparse_attention_config=3)) is None


def test_a_models_settings_without_network(monkeypatch, caplog):
    """A Hub model whose tables cannot be had: settings without tables, and a warning."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    settings = SparseAttentionConfig(
        method="bsfa", thresholds_file={"name": "x.safetensors", "sha256": "0" * 64}
    )
    config = LlamaConfig(sparse_attention_config=settings.to_dict())
    config._name_or_path = "nobody/no-such-model"
    assert SparseAttentionConfig.from_model_config(config) == settings
    assert "x.safetensors: expected it in the local cache, or the Hub" in caplog.text
