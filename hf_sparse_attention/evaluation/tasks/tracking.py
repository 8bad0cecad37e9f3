"""Variable tracking, RULER's `vt`: which names hold a value that was handed on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from hf_sparse_attention.evaluation.tasks.base import Draft, GrowingTask
from hf_sparse_attention.evaluation.tasks.draws import Draws
from hf_sparse_attention.evaluation.tasks.haystacks import NOISE

#: Lines of haystack in the worked example that stands before the question.
EXAMPLE_UNITS = 10


@dataclass(frozen=True)
class VariableTracking(GrowingTask):
    """A chain "VAR A = 12345", "VAR B = VAR A", ... in the haystack of one line over and over.

    Attributes:
        hops: assignments after the first; the names of the chain, one more, are the answers.
    """

    hops: int = 4

    def draft(self, units: int, length: int, draws: Draws) -> Draft:
        question, prefix, names = self._asked(EXAMPLE_UNITS, 3, draws)
        example = f"{question}{prefix} {' '.join(names)}\n\n"
        question, prefix, names = self._asked(units, 5, draws)
        return Draft(example + question, prefix, names)

    def _asked(self, units: int, letters: int, draws: Draws) -> tuple[str, str, tuple[str, ...]]:
        """A question about `units` lines and a chain, how its answer begins, and the answer."""
        chosen: dict[str, None] = {}
        while len(chosen) <= self.hops:
            chosen[draws.letters(letters)] = None
        names, value = tuple(chosen), draws.number(5)
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {b} = VAR {a}" for a, b in pairwise(names)]
        # In the chain's order: nothing is used before it is assigned.
        places = sorted(draws.some(range(units + len(chain)), len(chain)))
        lines = [NOISE] * units
        for place, assignment in zip(places, chain, strict=True):
            lines.insert(place, f"{assignment}.")
        question = (
            "Follow the variable assignments that are hidden in the text below.\n\n"
            + "\n".join(lines)
            + f"\nQuestion: Which variables of the text above hold the value {value}?"
        )
        prefix = (
            f" Answer: By the chain of assignments in the text above, {len(names)} variables hold "
            f"the value {value}. They are:"
        )
        return question, prefix, names
