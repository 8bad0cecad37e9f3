"""Settings, tables and models on the Hub: the real client against a loopback Hub."""

import json
from dataclasses import replace

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from loopback_hub import Repo
from parallel_runs import GEOMETRY, same_tables, tables
from tiny_models import llama, token_ids
from transformers import AutoModelForCausalLM

import hf_sparse_attention as hsa
from hf_sparse_attention import storage
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.config_schema import CONFIG_KEY
from hf_sparse_attention.storage import SETTINGS_NAME
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


def logits(model):
    with torch.no_grad():
        return model(token_ids(1, 100)).logits


def sparse_logits(model, config):
    hsa.set_sparse_attention(model, config)
    found = logits(model)
    model.set_attn_implementation("sdpa")
    return found


def as_given(content):
    return {name: value for name, value in json.loads(content).items() if name != CONFIG_KEY}


def test_thresholds_alone_come_back(hub, config):
    commit = config.push_to_hub("owner/thresholds", private=True)
    repo = hub.repos["owner/thresholds"]
    assert repo.private
    assert repo.messages == ["initial commit", "Upload thresholds"]  # one commit for all
    assert repo.branches["main"] == commit.oid
    assert set(hub.files("owner/thresholds")) == {
        ".gitattributes",
        "README.md",
        "config.json",
        THRESHOLDS_NAME,
    }
    found = SparseAttentionConfig.from_pretrained("owner/thresholds")
    assert replace(found, thresholds_file=None) == config
    assert same_tables(found, config)


def test_what_the_repository_holds_stays(hub, config, model, tmp_path):
    model.save_pretrained(tmp_path)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    given = {**json.loads(files["config.json"]), "rope_theta": 1e-05, "theirs": [None, "ü"]}
    files["config.json"] = json.dumps(given).encode()
    files["README.md"] = b"---\nlicense: mit  # ours\ntags:\n- sparse-attention\n---\r\n# Mine\r\n"
    hub.put(REPO, files)
    config.push_to_hub(REPO)
    after = hub.files(REPO)
    assert as_given(after["config.json"]) == given
    assert list(json.loads(after["config.json"])) == [*given, CONFIG_KEY]
    assert after["model.safetensors"] == files["model.safetensors"]
    assert after["README.md"].startswith(files["README.md"])
    assert len(hub.repos[REPO].messages) == 2


def test_a_model_from_the_hub_runs_in_one_call(hub, config, model, monkeypatch):
    expected = sparse_logits(model, config)
    commit = config.push_to_hub(REPO, model=model)
    assert hub.repos[REPO].messages == [
        "initial commit",
        "Upload model with sparse attention thresholds",
    ]
    loaded = AutoModelForCausalLM.from_pretrained(REPO, attn_implementation="bsfa")
    with hsa.collect_stats(loaded) as stats:
        assert torch.equal(logits(loaded), expected)
    assert stats.sparsity("prefill") > 0.1
    fetched = [x for x in hub.requests if THRESHOLDS_NAME in x and "resolve" in x]
    assert all(f"/resolve/{commit.oid}/" in x for x in fetched)

    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = AutoModelForCausalLM.from_pretrained(REPO, attn_implementation="bsfa")
    assert torch.equal(logits(offline), expected)
    assert not hub.requests


def test_each_revision_has_its_own(hub, config, model):
    """A model of a branch, or of a commit, runs with the tables of that commit."""
    old = config.push_to_hub(REPO, model=model)
    half = replace(config, tables=tables(model.config, only_layer=0))
    config_main = replace(config, tables=tables(model.config, only_layer=1))
    half.push_to_hub(REPO, revision="half")
    config_main.push_to_hub(REPO)
    assert set(hub.repos[REPO].branches) == {"main", "half"}
    for revision, each in {None: config_main, "half": half, old.oid: config}.items():
        expected = sparse_logits(model, each)
        loaded = AutoModelForCausalLM.from_pretrained(
            REPO, revision=revision, attn_implementation="bsfa"
        )
        assert torch.equal(logits(loaded), expected)
        again = hsa.load_thresholds(loaded, REPO, revision=revision)
        assert same_tables(again, each)


def test_a_private_repository_wants_a_token(hub, config, model, monkeypatch):
    config.push_to_hub(REPO, private=True, token="hf_owner")
    for token in ("hf_stranger", False):
        with pytest.raises(RepositoryNotFoundError):
            SparseAttentionConfig.from_pretrained(REPO, token=token)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError):
        hsa.load_thresholds(model, REPO)
    assert hsa.load_thresholds(model, REPO, token="hf_owner").tables is not None


def test_a_push_without_the_right_changes_nothing(hub, config):
    config.push_to_hub(REPO)
    before = dict(hub.repos[REPO].branches)
    with pytest.raises(HfHubHTTPError, match="403"):
        config.push_to_hub(REPO, token="hf_stranger")
    with pytest.raises(HfHubHTTPError, match="401"):
        config.push_to_hub(REPO, token=False)
    assert hub.repos[REPO].branches == before


def test_a_pull_request(hub, config, model):
    config.push_to_hub(REPO, model=model)
    before = hub.repos[REPO].branches["main"]
    changed = replace(config, min_length=7)
    commit = changed.push_to_hub(REPO, token="hf_stranger", create_pr=True)
    assert commit.pr_url.endswith("/discussions/1")
    assert hub.repos[REPO].branches["main"] == before
    assert SparseAttentionConfig.from_pretrained(REPO, revision="refs/pr/1").min_length == 7
    assert SparseAttentionConfig.from_pretrained(REPO).min_length == 0


def test_two_pushes_at_once_lose_nothing(hub, config, model):
    """Somebody's commit that comes between our reading config.json and our commit is kept."""
    config.push_to_hub(REPO, model=model)
    settings = hub.files(REPO)["config.json"]

    def push_theirs():
        hub.before_commit = lambda: None
        hub.put(REPO, {"config.json": json.dumps({**json.loads(settings), "theirs": 1}).encode()})

    hub.before_commit = push_theirs
    replace(config, min_length=9).push_to_hub(REPO)
    content = json.loads(hub.files(REPO)["config.json"])
    assert content["theirs"] == 1
    assert SparseAttentionConfig.from_pretrained(REPO).min_length == 9


def test_a_push_between_two_reads(hub, config, model, monkeypatch):
    """Settings and tables are of one commit, whatever is pushed while they are read."""
    config.push_to_hub(REPO)
    read = storage.read_settings

    def read_and_push(*args, **download):
        found = read(*args, **download)
        replace(config, tables=tables(model.config, only_layer=0)).push_to_hub(REPO)
        return found

    monkeypatch.setattr(storage, "read_settings", read_and_push)
    assert same_tables(SparseAttentionConfig.from_pretrained(REPO), config)


def test_thresholds_of_another_model_are_not_pushed(hub, config):
    hub.put(REPO, {"config.json": b'{"model_type": "llama", "num_hidden_layers": 3}'})
    with pytest.raises(ValueError, match=r"owner/model: .*layers: expected 3, got 2"):
        config.push_to_hub(REPO)
    assert len(hub.repos[REPO].messages) == 1


def test_a_model_that_consumes_the_key_itself_is_not_touched(hub, config):
    hub.put(REPO, {"config.json": json.dumps({CONFIG_KEY: {"block": 1}}).encode()})
    with pytest.raises(ValueError, match="the model itself consumes"):
        config.push_to_hub(REPO)
    assert len(hub.repos[REPO].messages) == 1


def test_settings_without_their_tables_are_not_pushed(hub, config):
    alone = replace(config, tables=None, thresholds_file={"name": "x", "sha256": "0" * 64})
    with pytest.raises(FileNotFoundError, match="expected the tables of x to be loaded"):
        alone.push_to_hub(REPO)
    assert not hub.repos


def test_a_model_without_its_tables_says_so(hub, config, model, caplog):
    """What transformers' own push leaves behind when only that is used."""
    config.push_to_hub(REPO, model=model)
    hub.repos["owner/copy"] = Repo()
    files = {name: x for name, x in hub.files(REPO).items() if name != THRESHOLDS_NAME}
    hub.put("owner/copy", files)
    loaded = AutoModelForCausalLM.from_pretrained("owner/copy", attn_implementation="bsfa")
    with pytest.raises(ValueError, match=f"expected the thresholds of {THRESHOLDS_NAME}"):
        logits(loaded)
    assert "expected it in a local folder, or in the Hub repository 'owner/copy'" in caplog.text
    hsa.load_thresholds(loaded, REPO)
    assert torch.equal(logits(loaded), sparse_logits(model, config))


def test_an_adapter_repository(hub, config, tmp_path):
    """The pair beside adapter_config.json; without a config.json, which would hide the adapter."""
    import peft

    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(
        target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora)
    config.push_to_hub("owner/adapter", model=adapted)
    names = set(hub.files("owner/adapter"))
    assert names >= {"adapter_config.json", "adapter_model.safetensors", SETTINGS_NAME}
    assert THRESHOLDS_NAME in names
    assert "config.json" not in names
    hsa.set_sparse_attention(adapted, config)
    expected = logits(adapted)

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    wrapped = peft.PeftModel.from_pretrained(base, "owner/adapter")
    hsa.load_thresholds(wrapped, "owner/adapter")
    assert torch.equal(logits(wrapped), expected)

    config.save_pretrained(tmp_path / "adapter", model=adapted)
    for source in ("owner/adapter", tmp_path / "adapter"):
        loaded = AutoModelForCausalLM.from_pretrained(source)
        hsa.load_thresholds(loaded, source)
        assert torch.equal(logits(loaded), expected)


def test_a_subfolder(hub, config, model, tmp_path):
    config.save_pretrained(tmp_path / "inner", model=model)
    files = {f"inner/{x.name}": x.read_bytes() for x in (tmp_path / "inner").iterdir()}
    hub.put(REPO, files)
    loaded = AutoModelForCausalLM.from_pretrained(
        REPO, subfolder="inner", attn_implementation="bsfa"
    )
    assert torch.equal(logits(loaded), sparse_logits(model, config))
    local = AutoModelForCausalLM.from_pretrained(
        tmp_path, subfolder="inner", attn_implementation="bsfa"
    )
    assert torch.equal(logits(local), logits(loaded))
    for source in (REPO, tmp_path):
        found = SparseAttentionConfig.from_pretrained(source, subfolder="inner")
        assert same_tables(found, config)
