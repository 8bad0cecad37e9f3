"""The tasks of RULER, generated offline from texts that travel with the package.

Definitions, budgets and scores are those of NVIDIA/RULER; the wording is ours, the essays are
*Paradise Lost*, and the documents of the question-answering tasks are ours or Milton's
(docs/evaluation-tasks.md says what differs).
"""

from __future__ import annotations

from hf_sparse_attention.evaluation.samples import Task
from hf_sparse_attention.evaluation.tasks.needles import NEEDLE_TASKS

#: Every task under its name in RULER.
TASKS: dict[str, Task] = {task.name: task for task in NEEDLE_TASKS}
