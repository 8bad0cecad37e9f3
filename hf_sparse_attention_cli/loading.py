"""What `calibrate` works on: the model with its tokenizer, and the text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer


def where(model: str, gguf_file: str | None) -> tuple[str, str | None]:
    """The folder or repository, and the GGUF file in it."""
    if gguf_file is None and model.endswith(".gguf"):
        return str(Path(model).parent), Path(model).name
    return model, gguf_file


def rows(data: str | None, split: str, samples: int | None) -> Any:
    """What `calibrate` takes: None, a path, or a streaming dataset."""
    if data is None or Path(data).exists():
        return data
    if data.startswith((".", "/", "~")) or data.endswith((".txt", ".jsonl", ".md")):
        check_local("--data", data)
    if samples is None:
        raise typer.BadParameter(
            f"{data} is no local file, and a dataset of the Hub may be endless: say how many",
            param_hint="--samples",
        )
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "--data: expected the package datasets for a dataset of the Hub, found none; "
            "pip install datasets"
        ) from error
    return datasets.load_dataset(data, split=split, streaming=True)


def check_local(option: str, path: str | None) -> None:
    """Raises FileNotFoundError if nothing is at `path`."""
    if path is not None and not Path(path).exists():
        raise FileNotFoundError(f"{option}: expected a file or folder at {path}, found none")


def load(
    source: str,
    gguf_file: str | None,
    *,
    dtype: str,
    device: str | None,
    device_map: str | None,
    revision: str | None,
    trust_remote_code: bool,
    quiet: bool,
) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if quiet:
        logging.disable_progress_bar()
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if gguf_file is not None:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    if device_map is not None:
        options["device_map"] = device_map
    network = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **options
    )
    if device_map is None:
        rank = os.environ.get("LOCAL_RANK", "0")
        network.to(device or (f"cuda:{rank}" if torch.cuda.is_available() else "cpu"))
    return network.eval(), tokenizer
