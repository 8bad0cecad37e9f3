"""The threshold file: round trip, and one clear error for each kind of bad file."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, LlamaConfig

from hf_sparse_attention.thresholds import THRESHOLDS_NAME, ModelFingerprint, Thresholds
from hf_sparse_attention.types import BlockGeometry

FINGERPRINT = ModelFingerprint("llama", layers=2, heads=4, kv_heads=2, head_dim=16)


FINE, COARSE = BlockGeometry(64, 1), BlockGeometry(64, 128, "ascending", 512)


@pytest.fixture
def thresholds():
    """BSFA's tables for two geometries, and BLASST's by head for one."""
    tensors = {
        f"{geometry.name}.{phase}.T": torch.randn(3, 2, 4, blocks)
        for geometry, blocks in ((FINE, 5), (COARSE, 6))
        for phase in ("prefill", "decode")
    }
    tensors["64x128.prefill.T"][:, :, :, :2] = -torch.inf
    tensors |= {f"64x1.decode.{kind}": torch.randn(2, 4) for kind in ("log_a", "b")}
    return Thresholds(
        tensors,
        {geometry.name: geometry for geometry in (FINE, COARSE)},
        [2, 4, 8],
        keep_sink=False,
        fingerprint=FINGERPRINT,
    )


def metadata_of(file):
    data = file.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def rewrite(file, **metadata):
    save_file(load_file(file), file, {**metadata_of(file), **metadata})


def test_round_trip(tmp_path, thresholds):
    pin = thresholds.save(tmp_path)
    loaded = Thresholds.load(
        tmp_path / THRESHOLDS_NAME, sha256=pin["sha256"], fingerprint=FINGERPRINT
    )
    assert pin["name"] == THRESHOLDS_NAME
    torch.testing.assert_close(loaded.tensors, thresholds.tensors)
    for name in ("levels", "geometries", "keep_sink", "fingerprint"):
        assert getattr(loaded, name) == getattr(thresholds, name)


def test_tables_by_geometry_phase_and_kind(thresholds):
    assert thresholds.table("64x128", "decode") is thresholds.tensors["64x128.decode.T"]
    assert thresholds.table("64x64", "decode") is None
    log_a, b = thresholds.coefficients("64x1", "decode")
    assert log_a is thresholds.tensors["64x1.decode.log_a"]
    assert b is thresholds.tensors["64x1.decode.b"]
    assert thresholds.coefficients("64x128", "decode") is None


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{THRESHOLDS_NAME}: expected .* found none"):
        Thresholds.load(tmp_path / THRESHOLDS_NAME)


@pytest.mark.parametrize("keep", [0, 5, 100, -1], ids=["empty", "header-cut", "cut", "one-byte"])
def test_truncated(tmp_path, thresholds, keep):
    thresholds.save(tmp_path)
    file = tmp_path / THRESHOLDS_NAME
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{THRESHOLDS_NAME}: expected a complete .* truncated"):
        Thresholds.load(file)


def test_tampered(tmp_path, thresholds):
    pin = thresholds.save(tmp_path)
    file = tmp_path / THRESHOLDS_NAME
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"expected sha256 {pin['sha256']} .* found \w{{64}}"):
        Thresholds.load(file, sha256=pin["sha256"])


def test_a_pickle_is_not_opened(tmp_path):
    file = tmp_path / THRESHOLDS_NAME
    torch.save({"x": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match="expected a complete safetensors file"):
        Thresholds.load(file)


def test_another_model(tmp_path, thresholds):
    thresholds.save(tmp_path)
    mine = replace(FINGERPRINT, layers=30, architecture="qwen3")
    with pytest.raises(
        ValueError,
        match=r"architecture: expected 'qwen3', got 'llama'; layers: expected 30, got 2",
    ):
        Thresholds.load(tmp_path / THRESHOLDS_NAME, fingerprint=mine)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"schema_version": "3"}, "schema version: expected 1 to 2, found 3; a newer"),
        ({"schema_version": "x"}, "'schema_version': expected JSON of type int, found x"),
        ({"geometries": "{}"}, r"tensors: expected names of \[\], got \['64x1.decode.T'"),
        (
            {"levels": "[2, 4]"},
            r"expected \[levels=2, layers, heads, blocks\], got \[3, 2, 4, [56]\]",
        ),
        ({"levels": "[4, 2, 8]"}, r"ascending positive integers, got \[4, 2, 8\]"),
        ({"levels": "{"}, r"'levels': expected JSON of type list, found \{"),
        ({"levels": "[true]"}, "levels: expected an integer >= 1, got True"),
        ({"geometries": '{"64x1": 3}'}, "geometry: expected a BlockGeometry.*, got 3"),
        ({"keep_sink": "3"}, "'keep_sink': expected JSON of type bool, found 3"),
        ({"fingerprint": "[]"}, r"'fingerprint': expected JSON of type dict, found \[\]"),
    ],
)
def test_bad_metadata(tmp_path, thresholds, metadata, message):
    thresholds.save(tmp_path)
    file = tmp_path / THRESHOLDS_NAME
    rewrite(file, **metadata)
    with pytest.raises(ValueError, match=rf"{THRESHOLDS_NAME}: .*{message}"):
        Thresholds.load(file)


def test_no_metadata(tmp_path, thresholds):
    thresholds.save(tmp_path)
    file = tmp_path / THRESHOLDS_NAME
    save_file(load_file(file), file)
    with pytest.raises(ValueError, match=rf"{THRESHOLDS_NAME}: .*schema_version.* found none"):
        Thresholds.load(file)


def test_nan_in_the_file(tmp_path, thresholds):
    thresholds.save(tmp_path)
    file = tmp_path / THRESHOLDS_NAME
    tensors = load_file(file)
    tensors["64x128.decode.T"][0, 1, 2, 3] = torch.nan
    save_file(tensors, file, metadata_of(file))
    with pytest.raises(ValueError, match=rf"{THRESHOLDS_NAME}.*64x128.decode.T: .*got NaN"):
        Thresholds.load(file)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"64x1.decode.T": torch.zeros(3, 2, 4)}, r"got \[3, 2, 4\]"),
        ({"64x1.decode.T": torch.zeros(3, 2, 4, 0)}, r"got \[3, 2, 4, 0\]"),
        ({"64x1.decode.T": torch.zeros(3, 2, 5, 5)}, r"as in 64x1.*\[2, 4\], got \[2, 5\]"),
        (
            {"64x1.decode.b": torch.zeros(2, 4).double()},
            "float32, got torch.float64",
        ),
        ({"64x1.decode.b": torch.full((2, 4), torch.inf)}, "64x1.decode.b: expected finite"),
        ({"64x1.decode.log_a": torch.full((2, 4), torch.inf)}, "decode.log_a: expected finite"),
        ({"64x1.decode.log_a": torch.zeros(2, 4, 1)}, r"\[layers, heads\], got \[2, 4, 1\]"),
        ({"64x1.prefill.b": torch.zeros(2, 4)}, "expected 64x1.prefill.log_a beside it"),
        ({"64x1.decode": torch.zeros(2, 4)}, r"tensors: .*got \['64x1.decode'\]"),
        ({"32x32.decode.T": torch.zeros(3, 2, 4, 5)}, r"got \['32x32.decode.T'\]"),
    ],
    ids=[
        "dims",
        "empty",
        "heads",
        "dtype",
        "infinite",
        "infinite-a",
        "by-head",
        "alone",
        "kind",
        "geometry",
    ],
)
def test_bad_tables(thresholds, tensors, message):
    with pytest.raises(ValueError, match=message):
        replace(thresholds, tensors={**thresholds.tensors, **tensors})


@pytest.mark.parametrize("levels", [[0, 2, 4], [4, 2, 8], []])
def test_bad_levels(thresholds, levels):
    with pytest.raises(ValueError, match="levels"):
        replace(thresholds, levels=levels)


def test_unknown_level(thresholds):
    assert thresholds.level_index(4) == 1
    with pytest.raises(ValueError, match=r"level: expected one of \[2, 4, 8\], got 3"):
        thresholds.level_index(3)


@pytest.mark.parametrize("as_dict", [False, True], ids=["config", "json"])
def test_fingerprints(as_dict):
    llama = LlamaConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    composite = Gemma3Config()
    text = composite.text_config
    for config, expected in (
        (llama, ("llama", 3, 4, 2, 16)),
        (
            composite,
            (
                text.model_type,
                text.num_hidden_layers,
                text.num_attention_heads,
                text.num_key_value_heads,
                text.head_dim,
            ),
        ),
    ):
        source = config.to_dict() if as_dict else config
        assert ModelFingerprint.of(source) == ModelFingerprint(*expected)


def test_what_is_unknown_differs_from_nothing():
    assert ModelFingerprint().differences(FINGERPRINT) == []
    assert replace(FINGERPRINT, heads=None).differences(replace(FINGERPRINT, heads=9)) == []
