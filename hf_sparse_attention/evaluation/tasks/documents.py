"""Questions about numbered documents: RULER's `qa_1` and `qa_2`, over documents of our own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from hf_sparse_attention.evaluation.tasks.base import Draft, GrowingTask, found_any
from hf_sparse_attention.evaluation.tasks.draws import Draws
from hf_sparse_attention.evaluation.tasks.haystacks import passages
from hf_sparse_attention.evaluation.tasks.milton import QUESTIONS, Question
from hf_sparse_attention.evaluation.tasks.registry import linked_entries


@dataclass(frozen=True)
class DocumentTask(GrowingTask):
    """One question, the documents that answer it, and others that do not, in random order."""

    @abstractmethod
    def documents(self, units: int, draws: Draws) -> tuple[str, tuple[str, ...], list[str]]:
        """A question, what may be answered, and `units` documents, not yet shuffled."""

    def draft(self, units: int, length: int, draws: Draws) -> Draft:
        question, answers, documents = self.documents(units, draws)
        context = "\n\n".join(
            f"Document {i}:\n{text}" for i, text in enumerate(draws.shuffled(documents), start=1)
        )
        task = "Answer the question from the documents. Say the answer and nothing else."
        return Draft(
            f"{task}\n\nThese are the documents.\n\n{context}\n\n{task}\n\nQuestion: {question}",
            " Answer:",
            answers,
        )

    def score(self, output: str, answers: Sequence[str]) -> float:
        """1 if the output contains any of the references, in whatever case."""
        return found_any(output, answers)


@dataclass(frozen=True)
class PoemQuestions(DocumentTask):
    """`qa_1`: a question whose answer stands in one passage of *Paradise Lost*, among others.

    Where RULER takes SQuAD: a short answer in one paragraph. No other passage has the answer in it.
    """

    def documents(self, units: int, draws: Draws) -> tuple[str, tuple[str, ...], list[str]]:
        question = draws.one(QUESTIONS)
        source, others = source_and_others(question)
        # Longer than the poem: its passages come again, as RULER's documents do.
        rounds = (units - 1) // len(others) + 1
        return question.text, question.answers, [source, *(draws.shuffled(others) * rounds)][:units]


@cache
def source_and_others(question: Question) -> tuple[str, list[str]]:
    """The passage that answers `question`, and those that have no answer to it in them."""
    (source,) = (passage for passage in passages() if question.anchor in passage)
    others = [passage for passage in passages() if not found_any(passage, question.answers)]
    return source, others


@dataclass(frozen=True)
class LinkedQuestions(DocumentTask):
    """`qa_2`: a question that takes two documents, about made-up people and their made-up towns.

    Where RULER takes HotpotQA. Nobody can know the answers from elsewhere.
    """

    def documents(self, units: int, draws: Draws) -> tuple[str, tuple[str, ...], list[str]]:
        question, answer, entries = linked_entries(units, draws)
        return question, (answer,), entries
