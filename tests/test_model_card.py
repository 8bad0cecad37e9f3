"""The section of README.md: what it says, that its code runs, and that it leaves the rest alone."""

import re

import pytest
import torch
from parallel_runs import GEOMETRY, tables
from tiny_models import llama, token_ids
from transformers import AutoModelForCausalLM

import hf_sparse_attention as hsa
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.fits import Fit, PhaseFit

REPO = "owner/model"
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
HELD_OUT = [{"length": 4096, "target": 0.5, "predicted": 0.48, "measured": 0.512345}]
PROVENANCE = {"samples": 12, "lengths": [2048, 4096], "data": "bundled", "nested": {"left": "out"}}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return llama()


@pytest.fixture
def bsfa(model):
    return SparseAttentionConfig(
        method="bsfa", tables=tables(model.config), geometry=GEOMETRY, min_length=0
    )


@pytest.fixture
def blasst():
    fit = PhaseFit(a=7.93, b=8.61, lengths=(2048, 8192), r2=0.987654, held_out=HELD_OUT)
    fits = {GEOMETRY.name: Fit(GEOMETRY, {"prefill": fit})}
    return SparseAttentionConfig(
        fits=fits, target_sparsity={"prefill": 0.5}, provenance=PROVENANCE, min_length=0
    )


def card(hub, repo=REPO, **where):
    return hub.files(repo, **where)["README.md"].decode()


def run(text):
    """What the card's code leaves behind: the model it loads, ready to run."""
    (code,) = CODE.findall(text)
    namespace = {}
    exec(code, namespace)
    return namespace["model"]


@torch.no_grad()
def skips(model):
    with hsa.collect_stats(model) as stats:
        model(token_ids(1, 100))
    return stats.sparsity("prefill") > 0.1


def test_it_says_what_it_is_and_how_it_was_calibrated(hub, blasst):
    blasst.push_to_hub(REPO)
    text = card(hub)
    for expected in (
        "tags:\n- sparse-attention",
        "## Sparse attention",
        "[BLASST](https://arxiv.org/abs/2512.12087)",
        "- target sparsity: 0.5 (prefill)",
        "- samples: 12",
        "- lengths: 2048, 4096",
        "- data: bundled",
        "| 16x16 | prefill | 7.93 | 8.61 | 2048 to 8192 | 0.9877 |",
        "| 16x16 | prefill | 4096 | 0.5 | 0.48 | 0.5123 |",
    ):
        assert expected in text
    assert "nested" not in text


def test_its_code_loads_the_model(hub, bsfa, model):
    bsfa.push_to_hub(REPO, model=model)
    bsfa.push_to_hub(REPO, revision="branch")
    assert skips(run(card(hub)))
    assert 'revision="branch"' in card(hub, revision="branch")
    assert skips(run(card(hub, revision="branch")))


def test_its_code_loads_thresholds_alone(hub, bsfa, model):
    model.push_to_hub("owner/base")
    bsfa.push_to_hub(REPO, base_model="owner/base")
    assert "base_model: owner/base" in card(hub)
    assert skips(run(card(hub)))
    bsfa.push_to_hub(REPO)  # the metadata remembers
    assert skips(run(card(hub)))


def test_its_code_loads_an_adapter(hub, bsfa, model, tmp_path):
    import peft

    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    bsfa.push_to_hub(REPO, model=peft.get_peft_model(base, lora))
    assert skips(run(card(hub)))


def test_the_next_push_replaces_the_section_and_nothing_else(hub, blasst, bsfa):
    before, after = "---\nlicense: mit\n---\n\n# Mine\n\n", "\n\n## More of mine\n\n<!-- x -->\n"
    hub.put(REPO, {"README.md": (before + after).encode()})
    blasst.push_to_hub(REPO)
    first = card(hub)
    hub.put(REPO, {"README.md": (first + after).encode()})
    bsfa.push_to_hub(REPO)
    second = card(hub)
    assert "license: mit" in second
    assert "# Mine" in second
    assert second.endswith(after)
    assert "2512.12087" in first
    assert "2512.12087" not in second
    assert second.count("## Sparse attention") == 1


def test_plots_are_shown_and_reports_linked(hub, blasst, tmp_path):
    (tmp_path / "heads.png").write_bytes(b"\x89PNG")
    (tmp_path / "report.html").write_text("<html>")
    attachments = {
        "Layers by heads": tmp_path / "heads.png",
        "Report": str(tmp_path / "report.html"),
    }
    blasst.push_to_hub(REPO, attachments=attachments)
    assert "![Layers by heads](sparse_attention/heads.png)" in card(hub)
    assert "\n[Report](sparse_attention/report.html)" in card(hub)
    assert hub.files(REPO)["sparse_attention/heads.png"] == b"\x89PNG"
    assert hub.files(REPO)["sparse_attention/report.html"] == b"<html>"


def test_a_missing_attachment_is_named_before_anything_is_pushed(hub, blasst):
    with pytest.raises(FileNotFoundError, match=r"attachments: expected a file, got 'no\.png'"):
        blasst.push_to_hub(REPO, attachments={"Plot": "no.png"})
    assert not hub.repos


def test_metadata_that_is_no_yaml_is_left_alone(hub, blasst):
    hub.put(REPO, {"README.md": b"---\na: [\n---\n"})
    with pytest.raises(ValueError, match=r"README\.md: expected metadata in YAML"):
        blasst.push_to_hub(REPO)
    assert len(hub.repos[REPO].messages) == 1
