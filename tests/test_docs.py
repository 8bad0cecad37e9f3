"""Every Python block of the README and of docs/ runs, top to bottom, file by file.

The blocks load "path/to/model": the working directory holds a tiny random one there. They push to a
Hub on the loopback interface, as "owner".
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_tokenizer import byte_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ANY_FENCE = re.compile(r"^\s*```\s*(\w+)", re.MULTILINE)


def blocks(page: Path) -> Iterator[tuple[int, str]]:
    """The Python blocks of a page: (line, code)."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        yield text[: match.start(1)].count("\n") + 1, match.group(1)


def save_tiny_model(folder: Path) -> None:
    """A random two-layer Llama with a byte-level tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_tiny_model(tmp_path / "path" / "to" / "model")
    words = "The rain in Spain stays mainly in the plain. "
    (tmp_path / "long.txt").write_text(words * 60)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.usefixtures("workspace", "hub")
def test_python_blocks_run(page: Path) -> None:
    namespace: dict[str, object] = {"__name__": "docs"}
    with torch.random.fork_rng():
        for line, code in blocks(page):
            # The line numbers of a traceback are those of the page.
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_fence_is_found(page: Path) -> None:
    """A fence that is indented or misspelt would silently not run."""
    fences = [name for name in ANY_FENCE.findall(page.read_text()) if name.lower().startswith("py")]
    assert len(fences) == len(list(blocks(page)))
