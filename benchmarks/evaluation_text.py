"""What docs/evaluation-results.md says beside its tables."""

from hf_sparse_attention.evaluation import markdown

HEAD = f"""# Evaluation: results

Made by `python -m benchmarks.evaluation_tables` from `benchmarks/results/evaluation_*.json`, which
`python -m benchmarks.evaluation` measures; don't edit by hand. What the tasks and settings are:
[evaluation.md](evaluation.md).

**What is rough here.** Other work ran on these machines meanwhile: times are ratios on one sample,
taken in turns; [results.md](results.md) has those of a quiet machine. Counts of answers are small:
each section says what one answer more or less is worth, and no smaller difference can be seen in
it. Where no answer was wrong, or all were, no error can be told. Answers are shorter than RULER
lets them be.

**How to read the tables.**

{markdown.LEGEND}

**By task.**

{markdown.TASK_LEGEND}

**Skipped, and the certificate.**

{markdown.SKIPPED}
"""

#: What sets a result apart from another of the same model and length, by its file.
TITLES = {"smollm2_others": ", the rest of RULER"}
#: What has to be known about a result, by its file.
NOTES = {
    "smollm2": """\
Dense is PyTorch's SDPA, which is slow in bfloat16: most of the speed is our kernel's and not the
skipping's. How much it is, at 8192 tokens on a quiet machine: "no skipping" in
[results.md](results.md).""",
    "smollm2_others": """\
What dense cannot do says nothing about skipping: of these tasks, only `niah_multiquery` and `fwe`
are partly within reach of a model of this size. Four questions of each show that much, no more.""",
    "gemma3": """\
15 of its 18 layers see a window of 512 tokens only. Rough: it shows that a windowed model runs
under every rule and still answers, and no more. Dense fails `niah_multikey_1` in all samples and
some settings do not: four answers cannot tell whether that is more than chance.""",
    "retrieval": """\
It was trained on up to 1024 tokens. At 2048 it is beyond that: dense loses three answers in ten,
and most settings fewer. It knows no text, so that there is no perplexity; and its thresholds are
calibrated on its own four tasks (of another seed), where those of the other models come from prose
and code. The skipping's own share of the speed is what a setting has over `never`.""",
}
STRESS = """\
The needle lies inside of one block of 64 tokens, and its key is named six times in the newest
blocks, which are visited first: by such local statistics about half of the heads skip the needle's
block at 64x64 and a lambda of 0.1 ([findings.md](findings.md#the-needles-own-block)), and the
answer is up to those that keep it."""
BY_LENGTH = """\
The tasks that all lengths have in common. Thresholds are calibrated at each length anew."""
TIMES = """\
Each plan on one thread; two at a time on two cores take half of it all. Calibration comes on top,
and is a minute or two up to 4096 tokens. All of it can be cut off at any time, and goes on where it
was."""
