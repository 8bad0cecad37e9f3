"""What benchmarks/whole_graph.py makes of its runs."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.whole_graph import BASES, summary
from benchmarks.whole_graph_peers import PEERS


def run(prefill: float, decode: float, first: int = 5, **more: Any) -> dict[str, Any]:
    return {"prefill": prefill, "decode": decode, "tokens": [first, 6], **more}


def runs(**contestant: Any) -> dict[str, list[dict[str, Any] | str]]:
    exact = run(8.0, 0.4, perplexity=20.0, likeliest=[5, 7])
    return {
        BASES[0]: [exact, run(9.0, 0.4), run(10.0, 0.4)],
        BASES[1]: [run(4.0, 0.8, perplexity=20.2)],
        "ours": [run(2.0, 0.1, perplexity=20.1, **contestant), run(3.0, 0.1), run(2.0, 0.2)],
        PEERS[0]: ["it is not installed"],
    }


def test_ratios_are_taken_within_a_round() -> None:
    _, bf16, ours, peer = summary(runs())
    assert ours["rounds"] == 3
    assert ours["prefill_over"] == {BASES[0]: 4.0, BASES[1]: 2.0}  # median of 4, 3 and 5
    assert ours["decode_over"][BASES[0]] == 4.0
    assert ours["perplexity_ratio"] == pytest.approx(20.1 / 20.0)
    assert bf16["prefill_over"][BASES[0]] == 2.0
    assert peer == {"name": PEERS[0], "reason": "it is not installed"}


def test_another_beginning_is_no_contestant() -> None:
    assert summary(runs(first=7))
    with pytest.raises(AssertionError, match="ours: begins with 9"):
        summary(runs(first=9))
