"""Thresholds are saved and pushed with the model: by transformers, by PEFT and by `Trainer`."""

import copy
import json
from dataclasses import replace

import peft
import pytest
import torch
from parallel_runs import GEOMETRY, same_tables, tables
from tiny_models import llama, token_ids
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_sparse_attention as hsa
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.config_schema import CONFIG_KEY
from hf_sparse_attention.storage import SETTINGS_NAME
from hf_sparse_attention.thresholds import THRESHOLDS_NAME

REPO = "owner/model"


@pytest.fixture
def config():
    return SparseAttentionConfig(
        method="bsfa", tables=tables(llama().config), geometry=GEOMETRY, min_length=0
    )


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    model = llama()
    hsa.set_sparse_attention(model, config)
    return model


@torch.no_grad()
def logits(model):
    return model(token_ids(1, 100)).logits


def runs_as(source, model, **where):
    """Whether the model that one call loads from `source` runs as `model` does."""
    loaded = AutoModelForCausalLM.from_pretrained(source, attn_implementation="bsfa", **where)
    with hsa.collect_stats(loaded) as stats:
        same = torch.equal(logits(loaded), logits(model))
    return same and stats.sparsity("prefill") > 0.1


WAYS = {
    "plain": lambda model: model,
    "deep-copy": copy.deepcopy,
    "compiled": torch.compile,
    "back-to-dense": lambda model: model.set_attn_implementation("sdpa") or model,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_save_pretrained_keeps_the_thresholds(model, tmp_path, way):
    way(model).save_pretrained(tmp_path)
    model.set_attn_implementation("bsfa")
    assert runs_as(tmp_path, model)
    assert not list(tmp_path.glob(".*")), "temporary files are left"


def test_a_copy_saves_itself(model, tmp_path):
    """Not the model that it was copied from."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    other.save_pretrained(tmp_path)
    assert runs_as(tmp_path, other)


def test_the_last_settings_are_saved(model, config, tmp_path):
    hsa.set_sparse_attention(model, replace(config, tables=tables(model.config, only_layer=1)))
    hsa.set_sparse_attention(model, min_length=3)
    model.save_pretrained(tmp_path)
    assert runs_as(tmp_path, model)
    assert SparseAttentionConfig.from_pretrained(tmp_path).min_length == 3


def test_what_was_loaded_by_name_is_saved_once_it_is_set(model, tmp_path):
    model.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first", attn_implementation="bsfa")
    hsa.set_sparse_attention(loaded)
    loaded.save_pretrained(tmp_path / "second")
    assert runs_as(tmp_path / "second", model)


@pytest.mark.parametrize("given", [{"is_main_process": False}, (False,)], ids=["named", "placed"])
def test_only_the_main_process_writes(model, tmp_path, given):
    if isinstance(given, dict):
        model.save_pretrained(tmp_path, **given)
    else:
        model.save_pretrained(tmp_path, *given)
    assert not (tmp_path / THRESHOLDS_NAME).exists()


def test_a_model_without_its_tables_is_saved_all_the_same(tmp_path, caplog):
    model = llama()
    pin = {"name": "x.safetensors", "sha256": "0" * 64}
    settings = SparseAttentionConfig(threshold_scale_factor=3, thresholds_file=pin)
    hsa.set_sparse_attention(model, settings)
    model.save_pretrained(tmp_path)
    assert "saved without the sparse attention tables" in caplog.text
    content = json.loads((tmp_path / "config.json").read_text())
    assert content[CONFIG_KEY] == settings.to_dict()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.float32


def push(model, tmp_path):
    model.push_to_hub(REPO, commit_message="mine")


def save_and_push(model, tmp_path):
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id=REPO, commit_message="mine")


@pytest.mark.parametrize("way", [push, save_and_push])
def test_the_models_own_push(hub, model, tmp_path, way):
    way(model, tmp_path)
    assert hub.repos[REPO].messages == ["initial commit", "mine"]  # never without its tables
    assert runs_as(REPO, model)


def test_a_push_to_a_branch(hub, model):
    model.push_to_hub(REPO, revision="sparse")
    assert runs_as(REPO, model, revision="sparse")
    assert THRESHOLDS_NAME not in hub.files(REPO)


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        ids = token_ids(1, 16, seed=i)[0]
        return {"input_ids": ids, "labels": ids}


def trainer(model, tmp_path, **arguments):
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        hub_model_id=REPO,
        max_steps=2,
        save_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    return Trainer(model, arguments, train_dataset=Tokens())


def test_trainer(hub, model, tmp_path):
    """Each checkpoint and the push at the end."""
    trains = trainer(model, tmp_path)
    trains.train()
    trains.push_to_hub()
    model.eval()
    assert runs_as(REPO, model)
    assert runs_as(tmp_path / "out" / "checkpoint-2", model)
    first = SparseAttentionConfig.from_pretrained(tmp_path / "out" / "checkpoint-1")
    assert first.tables is not None


# Adapters


def adapter(model, **options):
    lora = peft.LoraConfig(
        target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    return peft.get_peft_model(model, lora, **options)


@pytest.fixture
def base(tmp_path):
    """A folder with the base model, without settings."""
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapted(base, config):
    found = adapter(AutoModelForCausalLM.from_pretrained(base))
    hsa.set_sparse_attention(found, config)
    return found


def test_an_adapter_saves_its_thresholds(adapted, base, config, tmp_path):
    adapted.save_pretrained(tmp_path / "adapter")
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert files >= {SETTINGS_NAME, THRESHOLDS_NAME, "adapter_config.json"}
    assert "config.json" not in files
    plain = AutoModelForCausalLM.from_pretrained(base)
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert same_tables(hsa.load_thresholds(again, tmp_path / "adapter"), config)
    assert torch.equal(logits(again), logits(adapted))


@pytest.mark.parametrize("way", ["peft", "trainer"])
def test_an_adapter_is_pushed_with_its_thresholds(hub, adapted, tmp_path, way):
    if way == "peft":
        adapted.push_to_hub(REPO)
    else:
        trainer(adapted, tmp_path).push_to_hub()
    assert "config.json" not in hub.files(REPO)
    loaded = AutoModelForCausalLM.from_pretrained(REPO)
    hsa.load_thresholds(loaded, REPO)
    adapted.eval()
    assert torch.equal(logits(loaded), logits(adapted))


def test_named_adapters(base, config, tmp_path):
    found = adapter(AutoModelForCausalLM.from_pretrained(base), adapter_name="mine")
    hsa.set_sparse_attention(found, config)
    found.save_pretrained(tmp_path / "adapters")
    assert (tmp_path / "adapters" / "mine" / SETTINGS_NAME).is_file()
    assert not (tmp_path / "adapters" / "config.json").exists()
    assert same_tables(SparseAttentionConfig.from_pretrained(tmp_path / "adapters/mine"), config)


def test_an_adapter_of_transformers_own(base, config, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    hsa.set_sparse_attention(model, config)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    hsa.load_thresholds(loaded, tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


def test_a_merged_adapter_is_a_whole_model(adapted, tmp_path):
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="bsfa")
    assert SparseAttentionConfig.from_model_config(loaded.config).tables is not None
