"""The model in examples/retrieval: its checkpoint is the recorded one, and answers."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse_attention  # noqa: F401 - registers "blasst"

FOLDER = Path(__file__).parents[1] / "examples" / "retrieval"
CHECKPOINT = FOLDER / "checkpoint"

sys.path.insert(0, str(FOLDER))
import tasks  # noqa: E402


def test_the_checkpoint_is_the_recorded_one() -> None:
    digest, name = (CHECKPOINT / "SHA256SUMS").read_text().split()
    assert hashlib.sha256((CHECKPOINT / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("task", tasks.TASKS)
def test_it_answers(task: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        CHECKPOINT, dtype=torch.float32, attn_implementation="sdpa"
    )
    recorded = json.loads((CHECKPOINT / "training.json").read_text())["accuracy"]["256"][task]
    found = tasks.accuracy(model, task, 256, count=16)
    # 256 questions: three standard errors of a share, and one wrong answer where it makes none.
    error = (recorded * (1 - recorded) / 256) ** 0.5
    assert abs(found - recorded) <= 3 * error + 1 / 256
    assert found > 0.5


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_question_has_its_answer_in_the_context(task: str) -> None:
    (sample,) = tasks.held_out(task, 128, count=1)
    tokens, labels = sample.input_ids[0], sample.labels[0]
    assert tokens.shape == labels.shape == (128,)
    answers = (labels != tasks.IGNORE).nonzero().flatten()
    assert len(answers) == 16
    context = tokens[: answers[0] - 2]
    for at in answers.tolist():
        assert tokens[at] == labels[at]
        assert tokens[at - 2] == tasks.ASK
        assert labels[at] in context


def test_the_seed_decides() -> None:
    first, again = (next(tasks.held_out("pairs", 128, 1)) for _ in range(2))
    assert torch.equal(first.input_ids, again.input_ids)
