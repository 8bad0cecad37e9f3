"""The tasks of RULER, generated offline from texts that travel with the package.

Definitions, budgets and scores are those of NVIDIA/RULER; the wording is ours, *Paradise Lost*
stands where it has essays and SQuAD, and made-up people and towns where it has HotpotQA.
"""

from __future__ import annotations

from hf_sparse_attention.evaluation.samples import Task
from hf_sparse_attention.evaluation.tasks.counting import CommonWords, FrequentWords
from hf_sparse_attention.evaluation.tasks.depths import NeedleDepths
from hf_sparse_attention.evaluation.tasks.documents import LinkedQuestions, PoemQuestions
from hf_sparse_attention.evaluation.tasks.needles import NEEDLE_TASKS
from hf_sparse_attention.evaluation.tasks.tracking import VariableTracking

_ALL: tuple[Task, ...] = (
    *NEEDLE_TASKS,
    VariableTracking("vt", max_new_tokens=30),
    CommonWords("cwe", max_new_tokens=120, smallest=20),
    FrequentWords("fwe", max_new_tokens=50, smallest=64),
    PoemQuestions("qa_1", max_new_tokens=32),
    LinkedQuestions("qa_2", max_new_tokens=32, smallest=3),
)
#: Every task under its name in RULER.
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
#: Not in RULER: only when asked for by name.
STRESS_TASKS: dict[str, Task] = {"needle_depths": NeedleDepths()}
