"""The section on sparse attention in a repository's README.md.

It stands between two markers, so that the next push replaces it and nothing else. The rest of the
file stays byte for byte as it was, except that the tag is added to the metadata where it is not.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub.repocard import metadata_load, metadata_save

from hf_sparse_attention import storage
from hf_sparse_attention.config_schema import OWN_KEY
from hf_sparse_attention.types import PHASES

if TYPE_CHECKING:
    from hf_sparse_attention.config import SparseAttentionConfig

NAME = "README.md"
TAG = "sparse-attention"
#: Where a repository keeps the files that the section shows or links.
ATTACHMENTS = "sparse_attention"

_START = "<!-- sparse-attention: start. The next push replaces what is between the markers. -->"
_END = "<!-- sparse-attention: end -->"
_SECTION = re.compile(
    r"<!-- sparse-attention: start((?!<!-- sparse-attention: start).)*?" + re.escape(_END),
    re.DOTALL,
)
_IMAGES = (".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp")
_NAMES = {"blasst": "BLASST", "bsfa": "Block-Sparse FlashAttention (BSFA)"}
_PAPERS = {
    "blasst": "https://arxiv.org/abs/2512.12087",
    "bsfa": "https://arxiv.org/abs/2512.07011",
}


def write_section(
    folder: Path,
    config: SparseAttentionConfig,
    repo_id: str,
    revision: str | None,
    attachments: Mapping[str, str | Path],
    base_model: str | None = None,
) -> None:
    """Puts the section into `folder`'s README.md, and the attachments beside it.

    Args:
        folder: a copy of the repository's small files, the settings among them.
        config: what the section describes.
        repo_id: the repository that the usage example loads.
        revision: the branch that it loads; None is main.
        attachments: local files by title; images are shown, Markdown goes into the section as it
            is, other files are linked.
        base_model: the model that the settings are for; None: what the metadata says, if it does.

    Raises:
        ValueError: the metadata at the top of README.md is not YAML.
    """
    readme = folder / NAME
    metadata = _metadata(readme, base_model)
    lines = []
    for title, file in attachments.items():
        if Path(file).suffix.lower() == ".md":
            lines.append(Path(file).read_text("utf-8").strip())
            continue
        place = f"{ATTACHMENTS}/{Path(file).name}"
        (folder / ATTACHMENTS).mkdir(exist_ok=True)
        shutil.copyfile(file, folder / place)
        image = "!" if Path(file).suffix.lower() in _IMAGES else ""
        lines.append(f"{image}[{title}]({place})")
    text = "\n\n".join(
        [
            _START,
            *_about(config),
            *_tables(config),
            *lines,
            *_usage(folder, config, repo_id, revision, metadata.get("base_model")),
        ]
    )
    content = readme.read_bytes().decode()
    newline = "\r\n" if "\r\n" in content else "\n"
    section = f"{text}\n\n{_END}".replace("\n", newline)
    if _SECTION.search(content):
        content = _SECTION.sub(lambda _: section, content, count=1)
    else:
        content = content.rstrip() + 2 * newline + section + newline
    readme.write_bytes(content.encode())


def _metadata(readme: Path, base_model: str | None) -> dict[str, Any]:
    """The metadata of `readme`, which is made if it is not there; with our tag and `base_model`."""
    try:
        metadata: dict[str, Any] = (metadata_load(readme) or {}) if readme.is_file() else {}
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{readme.name}: expected metadata in YAML, got {error}") from error
    tags = metadata.get("tags") or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    wanted: dict[str, Any] = {"base_model": base_model} if base_model else {}
    if TAG not in tags:
        wanted["tags"] = [*tags, TAG]
    if any(metadata.get(name) != value for name, value in wanted.items()):
        metadata |= wanted
        metadata_save(readme, metadata)
    return metadata


def _about(config: SparseAttentionConfig) -> list[str]:
    """What this is and how it was calibrated, as paragraphs."""
    about = (
        f"Calibrated for [{_NAMES[config.method]}]({_PAPERS[config.method]}): blocks of keys that "
        "would get next to no attention are skipped. The settings are in the config's "
        "`sparse_attention_config`; without `attn_implementation` the model runs as ever."
    )
    facts = []
    if config.tables is not None and config.tables.levels:
        facts.append(f"BSFA levels (blocks kept): {', '.join(map(str, config.tables.levels))}")
    for name, by_phase in (
        ("target sparsity", config.target_sparsity),
        ("error budget (max_dropped_mass)", config.max_dropped_mass),
    ):
        if by_phase:
            values = ", ".join(f"{x:g} ({phase})" for phase, x in by_phase.items())
            facts.append(f"{name}: {values}")
    for key, value in config.provenance.items():
        if isinstance(value, (list, tuple)) and all(
            isinstance(x, (str, int, float)) for x in value
        ):
            value = ", ".join(map(str, value))
        if isinstance(value, (str, int, float)):
            facts.append(f"{key.replace('_', ' ')}: {value}")
    return ["## Sparse attention", about, "\n".join(f"- {fact}" for fact in facts)]


def _tables(config: SparseAttentionConfig) -> list[str]:
    """The fits, and predicted against measured sparsity, each a titled table."""
    own = config.to_dict()[OWN_KEY]
    fits, held_out = [], []
    for geometry, fit in own.get("fits", {}).items():
        for phase in (phase for phase in PHASES if phase in fit):
            entry = fit[phase]
            place = {"blocks": geometry, "phase": phase}
            names = ("a", "b", "lengths", "sparsity", "r2", "target_sparsity")
            fits.append({**place, **{n: entry[n] for n in names if n in entry}})
            held_out += [{**place, **row} for row in entry.get("held_out", [])]
    found = []
    if fits:
        title = "Scale factor `a * exp(b * target_sparsity)`, over the lengths and targets fitted:"
        found += [title, _table(fits)]
    if held_out:
        found += ["On text that was not calibrated on:", _table(held_out)]
    return found


def _table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of all the columns that any row has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [_line(name.replace("_", " ") for name in columns), _line("---" for _ in columns)]
    return "\n".join(lines + [_line(_cell(row.get(name)) for name in columns) for row in rows])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return " to ".join(map(_cell, value))
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


def _usage(
    folder: Path,
    config: SparseAttentionConfig,
    repo_id: str,
    revision: str | None,
    base_model: Any,
) -> list[str]:
    """How to load what was pushed, as paragraphs."""
    file = folder / storage.CONFIG_NAME
    whole_model = file.is_file() and "model_type" in storage.read_json(file)
    pin = f', revision="{revision}"' if revision else ""
    name = f'"{repo_id}"{pin}'
    if whole_model:
        load = (
            f'AutoModelForCausalLM.from_pretrained({name}, attn_implementation="{config.method}")'
        )
        lines = [f"model = {load}"]
    else:
        base = base_model if isinstance(base_model, str) else "base-model"
        if (folder / storage.ADAPTER_NAME).is_file():  # transformers loads the base with it
            base = repo_id
        lines = [
            f'model = AutoModelForCausalLM.from_pretrained("{base}")',
            f"hf_sparse_attention.load_thresholds(model, {name})",
        ]
    code = [
        "import hf_sparse_attention",
        "from transformers import AutoModelForCausalLM",
        "",
        *lines,
    ]
    return ["With `pip install hf-sparse-attention`:", "\n".join(["```python", *code, "```"])]
