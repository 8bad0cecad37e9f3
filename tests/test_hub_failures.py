"""A Hub that fails, and bad files: one clear error each, and dense for who asks for that."""

import copy
import hashlib
import json
from dataclasses import replace

import pytest
import torch
from comparisons import assert_as_exact_as
from huggingface_hub.errors import HfHubHTTPError
from parallel_runs import GEOMETRY, same_tables, tables
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as dump_safetensors
from tiny_models import llama, token_ids
from transformers import AutoModelForCausalLM

import hf_sparse_attention as hsa
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.config_schema import CONFIG_KEY, OWN_KEY
from hf_sparse_attention.thresholds import THRESHOLDS_NAME

REPO = "owner/model"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return llama()


@pytest.fixture
def config(model):
    return SparseAttentionConfig(
        method="bsfa", tables=tables(model.config), geometry=GEOMETRY, min_length=0
    )


@pytest.fixture
def pushed(hub, config, model):
    """A Hub that holds a calibrated model."""
    config.push_to_hub(REPO, model=model)
    return hub


def logits(model):
    with torch.no_grad():
        return model(token_ids(1, 100)).logits


def incomplete(tmp_path):
    return [file.name for file in tmp_path.rglob("*.incomplete")]


def test_a_download_that_breaks_off_is_resumed(pushed, config, tmp_path):
    digest = hashlib.sha256(pushed.files(REPO)[THRESHOLDS_NAME]).hexdigest()
    pushed.fail("GET", f"/lfs/{digest}", cut_after=100)
    found = SparseAttentionConfig.from_pretrained(REPO)
    assert same_tables(found, config)
    assert pushed.requests.count(f"GET /lfs/{digest}") == 2
    assert not incomplete(tmp_path)


def test_a_download_that_always_breaks_off(pushed, config, tmp_path):
    """One clear error, nothing half-written in the cache; and it works once the Hub does."""
    pushed.fail("GET", "/lfs/", cut_after=0, times=1000)
    with pytest.raises(ConnectionError, match=f"{THRESHOLDS_NAME}: the download .* broke off"):
        SparseAttentionConfig.from_pretrained(REPO)
    assert not incomplete(tmp_path)
    assert not list(tmp_path.rglob(THRESHOLDS_NAME))
    pushed.faults.clear()
    assert SparseAttentionConfig.from_pretrained(REPO).tables is not None


@pytest.mark.parametrize("times", [1, 1000], ids=["once", "for-good"])
def test_a_hub_out_of_order(pushed, config, times):
    pushed.fail("HEAD", "/resolve/", status=503, times=times)
    if times == 1:
        assert SparseAttentionConfig.from_pretrained(REPO).tables is not None
        return
    with pytest.raises(FileNotFoundError, match=r"config\.json: .*local cache.*503"):
        SparseAttentionConfig.from_pretrained(REPO)


def test_the_cache_serves_while_the_hub_is_out_of_order(pushed, config):
    SparseAttentionConfig.from_pretrained(REPO)
    pushed.fail("HEAD", "/", status=503, times=1000)
    pushed.fail("GET", "/", status=503, times=1000)
    found = SparseAttentionConfig.from_pretrained(REPO)
    assert same_tables(found, config)


@pytest.mark.parametrize("path", ["/lfs/", "/preupload/", "/commit/"])
def test_a_push_that_fails_half_way_changes_nothing(pushed, config, path):
    before = pushed.files(REPO)
    method = "PUT" if path == "/lfs/" else "POST"
    pushed.fail(method, path, status=500, times=1000)
    changed = replace(config, tables=tables(llama().config, only_layer=0), min_length=5)
    with pytest.raises((HfHubHTTPError, RuntimeError), match=r"500|uploading"):
        changed.push_to_hub(REPO)
    assert pushed.files(REPO) == before
    pushed.faults.clear()
    changed.push_to_hub(REPO)
    assert SparseAttentionConfig.from_pretrained(REPO).min_length == 5


def rewritten(data, change=lambda tensors, metadata: None):
    """A table file with its tensors and metadata changed."""
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    tensors = load_safetensors(data)
    change(tensors, metadata)
    return dump_safetensors(tensors, metadata)


def nan(tensors, metadata):
    next(iter(tensors.values())).view(-1)[0] = torch.nan


def newer(tensors, metadata):
    metadata["schema_version"] = "99"


def foreign(**changes):
    def change(tensors, metadata):
        fingerprint = {**json.loads(metadata["fingerprint"]), **changes}
        metadata["fingerprint"] = json.dumps(fingerprint)

    return change


#: name: (what happens to the table file, whether config.json pins the result, the error)
BAD = {
    "tampered": (lambda x: x[:-1] + bytes([x[-1] ^ 1]), False, r"expected sha256 \w+ .* found \w+"),
    "cut-short": (lambda x: x[:-9], False, r"expected sha256 \w+ .* found \w+"),
    "cut-short-and-pinned": (lambda x: x[:-9], True, r"expected a complete .* truncated"),
    "pickle": (lambda x: b"\x80\x04K\x01.", True, "expected a complete safetensors file"),
    "nan": (lambda x: rewritten(x, nan), True, "expected numbers or -inf, got NaN"),
    "newer-schema": (lambda x: rewritten(x, newer), True, "schema version: .* found 99; a newer"),
    "other-architecture": (
        lambda x: rewritten(x, foreign(architecture="qwen3")),
        True,
        "another model: architecture: expected 'llama', got 'qwen3'",
    ),
    "other-layers": (
        lambda x: rewritten(x, foreign(layers=30)),
        True,
        "another model: layers: expected 2, got 30",
    ),
    "other-heads": (
        lambda x: rewritten(x, foreign(heads=9, kv_heads=3)),
        True,
        "another model: heads: expected 4, got 9; kv_heads: expected 2, got 3",
    ),
}


@pytest.fixture
def spoilt(pushed, request):
    """The Hub with a bad table file, and what the error says."""
    change, pinned, message = BAD[request.param]
    data = change(pushed.files(REPO)[THRESHOLDS_NAME])
    content = json.loads(pushed.files(REPO)["config.json"])
    if pinned:
        pin = content[CONFIG_KEY][OWN_KEY]["thresholds_file"]
        pin["sha256"] = hashlib.sha256(data).hexdigest()
    files = {THRESHOLDS_NAME: data, "config.json": json.dumps(content).encode()}
    pushed.put(REPO, files)
    return rf"{THRESHOLDS_NAME}: .*{message}"


@pytest.mark.parametrize("spoilt", BAD, indirect=True)
def test_a_bad_table_file(spoilt, model):
    with pytest.raises(ValueError, match=spoilt):
        SparseAttentionConfig.from_pretrained(REPO)
    with pytest.raises(ValueError, match=spoilt):
        hsa.load_thresholds(model, REPO)
    loaded = AutoModelForCausalLM.from_pretrained(REPO, attn_implementation="bsfa")
    with pytest.raises(ValueError, match=spoilt):
        logits(loaded)
    with pytest.raises(ValueError, match=spoilt):
        hsa.set_sparse_attention(loaded, level=4)
    dense(loaded, model)


def test_settings_of_a_newer_schema(pushed, model):
    content = json.loads(pushed.files(REPO)["config.json"])
    content[CONFIG_KEY][OWN_KEY]["schema_version"] = 99
    pushed.put(REPO, {"config.json": json.dumps(content).encode()})
    message = r"schema_version: expected 1 to \d, got 99; a newer"
    with pytest.raises(ValueError, match=message):
        SparseAttentionConfig.from_pretrained(REPO)
    loaded = AutoModelForCausalLM.from_pretrained(REPO, attn_implementation="blasst")
    with pytest.raises(ValueError, match=message):
        logits(loaded)
    dense(loaded, model)


def dense(loaded, model):
    """Whatever the files are like, the model runs dense for who asks for that, in either way."""
    expected = logits(model)
    exact = logits(copy.deepcopy(model).double())
    hsa.set_sparse_attention(loaded, "blasst", threshold_scale_factor=0)
    assert_as_exact_as(logits(loaded), expected, exact)
    loaded.set_attn_implementation("sdpa")
    assert torch.equal(logits(loaded), expected)


def test_a_config_that_is_no_json(pushed):
    pushed.put(REPO, {"config.json": b"{"})
    with pytest.raises(ValueError, match=r"config\.json: expected JSON"):
        SparseAttentionConfig.from_pretrained(REPO)
