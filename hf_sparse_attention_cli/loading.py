"""What the commands work on: the model with its tokenizer, and the text."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from hf_sparse_attention_cli import options


@dataclass(frozen=True)
class ModelSource:
    """Which model, and how it is loaded; `takes_model` makes these the options of a command."""

    model: options.Model
    dtype: options.Dtype = "auto"
    device: options.Device = None
    device_map: options.DeviceMap = None
    gguf_file: options.GgufFile = None
    revision: options.Revision = None
    trust_remote_code: options.TrustRemoteCode = False
    quiet: options.Quiet = False

    def load(self) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        if self.quiet:
            logging.disable_progress_bar()
        source, gguf_file = self._place()
        shared: dict[str, Any] = {
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
        }
        if gguf_file is not None:
            shared["gguf_file"] = gguf_file
        tokenizer = AutoTokenizer.from_pretrained(source, **shared)
        if gguf_file is not None:
            from transformers import GgufConfig

            shared["quantization_config"] = GgufConfig(dequantize=True)
        if self.device_map is not None:
            shared["device_map"] = self.device_map
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        network = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **shared)
        if self.device_map is None:
            rank = os.environ.get("LOCAL_RANK", "0")
            own = f"cuda:{rank}" if torch.cuda.is_available() else "cpu"
            network.to(self.device or own)
        return network.eval(), tokenizer

    def _place(self) -> tuple[str, str | None]:
        """The folder or repository, and the GGUF file in it."""
        if self.gguf_file is None and self.model.endswith(".gguf"):
            return str(Path(self.model).parent), Path(self.model).name
        return self.model, self.gguf_file


def takes_model(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, with the options of `ModelSource` in the place of its first parameter, `source`.

    The model is its first argument; how that is loaded comes behind the command's own options.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    model, *rest = inspect.signature(ModelSource, eval_str=True).parameters.values()
    names = [model.name, *(option.name for option in rest)]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        command(ModelSource(**{name: given.pop(name) for name in names}), **given)

    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [x.replace(kind=inspect.Parameter.KEYWORD_ONLY) for x in (model, *own, *rest)]
    )
    return run


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
