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


@pytest.fixture
def thresholds():
    prefill = torch.randn(3, 2, 4, 5)
    prefill[:, :, :, :2] = -torch.inf
    return Thresholds(
        prefill,
        torch.randn(3, 2, 4, 6),
        [2, 4, 8],
        BlockGeometry(64, 128, "ascending", 512),
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
    torch.testing.assert_close(loaded.prefill, thresholds.prefill)
    torch.testing.assert_close(loaded.decode, thresholds.decode)
    for name in ("levels", "geometry", "keep_sink", "fingerprint"):
        assert getattr(loaded, name) == getattr(thresholds, name)


def test_decode_may_be_missing(tmp_path, thresholds):
    replace(thresholds, decode=None).save(tmp_path)
    assert Thresholds.load(tmp_path / THRESHOLDS_NAME).decode is None


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
        ({"schema_version": "2"}, "schema version: expected 1 to 1, found 2; a newer"),
        ({"schema_version": "x"}, "invalid literal"),
        ({"geometry": "{}"}, r"tensors: expected \['64x64.decode', '64x64.prefill'\], found"),
        ({"levels": "[2, 4]"}, r"expected \[levels=2, layers, heads, blocks\], got \[3, 2, 4, 5\]"),
        ({"levels": "[4, 2, 8]"}, r"ascending positive integers, got \[4, 2, 8\]"),
        ({"levels": "{"}, "."),
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
    with pytest.raises(ValueError, match=rf"{THRESHOLDS_NAME}: schema version: .* found none"):
        Thresholds.load(file)


def test_nan_in_the_file(tmp_path, thresholds):
    thresholds.save(tmp_path)
    file = tmp_path / THRESHOLDS_NAME
    tensors = load_file(file)
    tensors["64x128.decode"][0, 1, 2, 3] = torch.nan
    save_file(tensors, file, metadata_of(file))
    with pytest.raises(ValueError, match=rf"{THRESHOLDS_NAME}: decode thresholds: .*got NaN"):
        Thresholds.load(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefill": torch.zeros(3, 2, 4)}, r"got \[3, 2, 4\]"),
        ({"prefill": torch.zeros(3, 2, 4, 0)}, r"got \[3, 2, 4, 0\]"),
        (
            {"prefill": torch.zeros(3, 2, 4, 5).double()},
            "expected torch.float32, got torch.float64",
        ),
        ({"decode": torch.zeros(3, 2, 5, 5)}, r"as in prefill, \[2, 4\], got \[2, 5\]"),
        ({"levels": [0, 2, 4]}, r"got \[0, 2, 4\]"),
        ({"levels": []}, r"got \[\]"),
    ],
)
def test_bad_tables(thresholds, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(thresholds, **changes)


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
