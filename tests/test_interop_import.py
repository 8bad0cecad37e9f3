"""What ModelOpt and BSFA's authors write, read for us: values, blocks, notes, refusals."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from test_config import (
    FACTORS,
    MODELOPT,
    TARGETS,
    _flat,
    _log_formula,
    _renamed,
    _top_level,
    _with_another_group,
)

from hf_sparse_attention import collect_stats, set_sparse_attention
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.interop import export, import_bsfa, import_modelopt
from hf_sparse_attention.types import BlockGeometry

THEIRS = BlockGeometry(128, 128, "ascending")


def factor(phase):
    return FACTORS[phase]["a"] * math.exp(FACTORS[phase]["b"] * TARGETS[phase])


@pytest.mark.parametrize(
    "spelling",
    [lambda: MODELOPT, _flat, _renamed, _top_level, _log_formula, _with_another_group],
    ids=["modelopt", "flat", "sparse_algo", "top-level", "log_a", "two-groups"],
)
@pytest.mark.parametrize("place", ["folder", "config.json", "key-alone", "text_config", "dict"])
def test_modelopt_in_all_spellings_and_places(tmp_path, spelling, place):
    key = spelling()
    content = {
        "key-alone": key,
        "text_config": {"text_config": {"sparse_attention_config": key}},
    }.get(place, {"model_type": "llama", "sparse_attention_config": key})
    (tmp_path / "config.json").write_text(json.dumps(content))
    source = {"folder": tmp_path, "dict": content}.get(place, tmp_path / "config.json")
    config = import_modelopt(source).config
    assert config.method == "blasst"
    assert config.target_sparsity == TARGETS
    assert config.targets == ["LlamaAttention"]
    assert config.ignore == ["model.layers.0.self_attn"]
    for phase in TARGETS:
        assert config.scale_factor(phase, THEIRS) == pytest.approx(factor(phase))
        assert config.scale_factor(phase, BlockGeometry()) is None  # not calibrated there
    assert config.provenance["imported_from"] == "modelopt"


def test_a_geometry_that_is_asked_for_runs_and_is_named():
    imported = import_modelopt(MODELOPT, geometry="64x64")
    assert imported.config.scale_factor("prefill", BlockGeometry()) == pytest.approx(
        factor("prefill")
    )
    assert imported.config.geometry == BlockGeometry()
    assert any("64x64" in note and "128x128" in note for note in imported.notes)


def test_what_modelopt_means_by_attention_is_every_class():
    group = {**MODELOPT["config_groups"]["group_0"], "targets": ["Attention"]}
    key = {"config_groups": {"group_0": group}}
    assert import_modelopt(key).config.targets == SparseAttentionConfig.from_dict(key).targets == []


def test_what_is_left_out_is_named():
    groups = {
        **MODELOPT["config_groups"],
        "group_1": {"algorithm": "sparse_softmax", "sparsity_n": 2},
    }
    del (groups := json.loads(json.dumps(groups)))["group_0"]["target_sparsity"]
    imported = import_modelopt({"config_groups": groups})
    notes = " ".join(imported.notes)
    assert "group_1, 'sparse_softmax'" in notes
    assert "No target for decode" in notes
    assert imported.config.target_sparsity == {"prefill": 0.5, "decode": 0.5}


@pytest.mark.parametrize("geometry", [None, "64x64"])
def test_there_and_back(geometry):
    config = import_modelopt(MODELOPT, geometry=geometry).config
    content = export(config, "modelopt").content["sparse_attention_config"]
    assert content["config_groups"] == MODELOPT["config_groups"]
    assert SparseAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "llama"}, "expected skip-softmax settings"),
        ({"sparse_attention_config": {"sparse_block_size": 128}}, "expected skip-softmax settings"),
        ({"sparse_attention_config": [1]}, "expected skip-softmax settings"),
        (
            {"config_groups": {"group_0": {"algorithm": "skip_softmax"}}},
            "expected a calibrated threshold_scale_factor",
        ),
        (SparseAttentionConfig(threshold_scale_factor=1).to_dict(), "got our own"),
    ],
    ids=["absent", "the-models-own", "no-dict", "uncalibrated", "ours"],
)
def test_refusals_of_modelopt_files(tmp_path, content, message):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        import_modelopt(file)
    assert str(file) in str(caught.value)


def test_no_json(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="expected JSON"):
        import_modelopt(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        import_modelopt(tmp_path / "none.json")


def bsfa_file(tmp_path, **changes):
    """A file as BSFA's authors' calibrate.py writes it."""
    torch.manual_seed(0)
    content = {
        "thresholds": torch.randn(3, 2, 4, 6),
        "k_values": [2, 4, 8],
        "max_num_blocks": 6,
        "num_layers": 2,
        "num_heads": 4,
        "q_block_size": 128,
        "k_block_size": 64,
        "aggregation_method": "mean",
        "shape_description": "[num_k_values, num_layers, num_heads, max_num_q_blocks]",
        **changes,
    }
    file = tmp_path / "llama.inference.pt"
    torch.save({k: x for k, x in content.items() if x is not None}, file)
    return file, content["thresholds"]


def test_bsfa_tables_are_taken_as_they_are(tmp_path):
    file, table = bsfa_file(tmp_path)
    imported = import_bsfa(file)
    config = imported.config
    assert config.method == "bsfa"
    assert config.levels == [2, 4, 8]
    assert not config.keep_sink  # as published
    assert torch.equal(config.tables.table("128x64", "prefill"), table)
    assert config.tables.table("128x64", "decode") is None
    assert (config.tables.fingerprint.layers, config.tables.fingerprint.heads) == (2, 4)
    assert any("128x64" in note and "reference" in note for note in imported.notes)
    config.save_pretrained(tmp_path)
    again = SparseAttentionConfig.from_pretrained(tmp_path)
    assert torch.equal(again.tables.table("128x64", "prefill"), table)


def test_bsfa_levels_come_in_any_order(tmp_path):
    file, table = bsfa_file(tmp_path, k_values=[8, 2, 4])
    tables = import_bsfa(file).config.tables
    assert tables.levels == [2, 4, 8]
    assert torch.equal(tables.table("128x64", "prefill"), table[[1, 2, 0]])


def test_bsfa_import_runs_on_its_own_blocks(tmp_path):
    """The thresholds of a level decide: all blocks that may go below +inf, none below -inf."""
    table = torch.stack([torch.full((2, 4, 6), math.inf), torch.full((2, 4, 6), -math.inf)])
    file, _ = bsfa_file(tmp_path, thresholds=table, k_values=[1, 9])
    model = tiny_models.llama()
    ids = torch.randint(0, model.config.vocab_size, (1, 640))
    found = {}
    for level in (1, 9):
        config = replace(import_bsfa(file).config, level=level, min_length=0)
        set_sparse_attention(model, config)
        with collect_stats(model) as stats, torch.no_grad():
            model(ids)
        found[level] = stats.sparsity("prefill")
    # 5 rows of 128, 10 blocks of 64 keys: row i sees 2i + 2, of which the diagonal's 2 stay.
    assert found == {1: pytest.approx(20 / 30), 9: 0}


def test_bsfa_import_refuses_other_blocks(tmp_path):
    file, _ = bsfa_file(tmp_path)
    config = replace(import_bsfa(file).config, geometry=BlockGeometry())
    with pytest.raises(ValueError, match="128x64"):
        set_sparse_attention(tiny_models.llama(), config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_values": None}, "expected ['thresholds', 'k_values'"),
        ({"k_values": [2, 4]}, "expected thresholds [k=2, layers, heads, query blocks], got"),
        ({"thresholds": torch.zeros(3, 2, 4)}, "got [3, 2, 4]"),
        ({"thresholds": torch.full((3, 2, 4, 6), math.nan)}, "NaN"),
        ({"extra": SimpleNamespace()}, "expected tensors and plain values alone"),
    ],
    ids=["missing", "levels", "shape", "nan", "pickled-object"],
)
def test_refusals_of_bsfa_files(tmp_path, changes, message):
    file, _ = bsfa_file(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        import_bsfa(file)
    assert str(file) in str(caught.value)


def test_a_pickle_is_never_run(tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    file = tmp_path / "x.pt"
    file.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="would run code"):
        import_bsfa(file)
    torch.save({"thresholds": Bomb()}, file)
    with pytest.raises(ValueError, match="would run code"):
        import_bsfa(file)
    assert not (tmp_path / "written").exists()


def test_no_bsfa_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        import_bsfa(tmp_path / "none.pt")
