"""What docs/findings.md says about its tables."""

HEAD = """\
# Findings: what the papers leave open, in numbers

Made by `python -m benchmarks.findings_page` from `benchmarks/results/`; don't edit by hand.
Attention alone, on SmolLM2-135M-Instruct's own queries, keys and values in float32: 2048 tokens
of *Alice's Adventures in Wonderland*, ten of its thirty layers, prefill, sink and diagonal first
unless it says otherwise. One small model: what holds for others is open.

An *error* is |out - exact| / |exact| of a layer's attention output, the mean over the layers.
*Dropped mass* is the share of a query's softmax that its skipped blocks held. Sparsity counts all
blocks that causal attention visits. At 2048 tokens little can be skipped at small errors: longer
texts have more to skip at the same lambda.

What more there is of calibration: [calibration-results.md](calibration-results.md). Answers to
questions: [evaluation-results.md](evaluation-results.md)."""

GRANULARITY = """\
The whole model, in bfloat16, calibrated on nine texts and measured on others: the KL of its
next-token distributions from dense's, in nats, at equal sparsity, means over prose, code and
needles. 0.002 is bfloat16's own: so far apart are two kernels that skip nothing.

With blocks of 64 keys a threshold for each head instead of one for all takes about two fifths of
the KL away in prefill where 70% is skipped, a quarter to a third in decode, and less where half is.
One for each layer gets half of that in prefill, and nearly all in decode. The longer the text, the
less KL there is to take away. Where we lose: with single keys, the default on a CPU, none of it can
be told from rounding. Nor do they come closer to the sparsity asked for: all three are off by up to
0.13 to 0.18 ([calibration-results.md](calibration-results.md)). And 16 questions a task tell no
difference in answers ([evaluation-results.md](evaluation-results.md))."""

ORDER = """\
The sink and the diagonal first, the default, skips almost what could be skipped if each row knew
its final max beforehand: no dynamic order has much left to win. Up to half of the blocks skipped
it loses less than ascending at equal sparsity. Diagonal first does as well: what counts is to see
a row's strongest keys early, and these are the sink and the nearest ones. Where we lose: at 50%
skipped the reverse order has the smallest mean error. Its running max starts low, so it needs a
lambda three times as large, and at such lambdas any order is far from exact."""

BLOCKS = """\
The smaller the block, the more is skipped at equal error, and it is the keys of a block that
count more than its rows. Single keys skip most by far, at no extra cost on a CPU; a GPU's matrix
units cannot use them. At equal lambda blocks of different sizes are not comparable at all:
thresholds hold for the blocks they were calibrated with. Where we lose: blocks of 128 keys, which
Hopper's matrix units want, skip a fifth less than those of 64; the shorter the text, the more of
that is the sink and the diagonal, which are larger shares of it."""

INT8 = """\
The share of the blocks that lambda skips for which an upper bound on the scores, without the keys
in full precision, proves that they are skipped. One number or a box for each block proves nothing
at all; int8 keys prove most, at a quarter (float32) or half (bfloat16) of the bytes. Where we
lose: the smaller lambda, the more blocks lie within the bound's margin, and their keys are then
read after all."""

INT8_DECODE = """\
Of all blocks that decode visits at 8192 keys, the share that lambda skips, and the share that a
kept int8 copy of K proves to be skipped, from the seed's maximum alone
([int8-filter.md](int8-filter.md)). Then what has to be read for each key and head in bfloat16: K
and the kept share of V; or the part of the copy that is scanned until it does not pay, and the kept
shares of both. "At most" is how much faster than dense decode either could be if reading were all.
The shares are those of head size 64, at D=128, too.

Skips come in runs, and nine in ten or more of them are proved, so that a copy pays from half of the
blocks on. Twice as fast as dense, which skipping V alone can never be, is within reach where the
second table says, and not at 73%. Where we lose: no time is in this. The seed is read again by
every split, a second kernel has to start, and bytes may not be what a GPU waits for."""

LENGTH = """\
For each text and length the lambda that skips a given share, times L: constant along a line if
lambda were a / L, and then the slope of ln lambda over ln L were -1. Layers 3, 12 and 21.

It is not, at these lengths: lambda falls faster, and more slowly the longer the text. Most of what
breaks it are the sink and the diagonal, which never go: 42% of all blocks at 512 tokens, 12% at
2048, 6% at 4096, so that a short text has to skip nearly all others to reach the same share; at 512
tokens half of the blocks would take a lambda of 1 on prose and code, which is no threshold any
more. Of the free blocks alone, neither sink nor diagonal, lambda comes close to a / L where half of
them go (from 2048 to 4096 tokens the slope is -1.04 to -1.14). The fewer go, the faster it falls
even so: at 20% the free blocks account for more than half of it. The kind of text matters less than
the length. Where we lose: one a / L for 2048 to 8192 tokens of three kinds of text is up to 15
points of sparsity off ([calibration-results.md](calibration-results.md)); calibrate at the lengths
that you run."""

CERTIFICATE = """\
The bound that comes with every output, beside the mass that was really dropped, of all queries of
all heads; the median ratio over those that lost more than 1e-4.

For single keys the bound is the truth. For blocks it takes every key for as large as the block's
largest, and is about ten times too large: where it says that little was lost, little was lost, but
at a lambda of 0.1 it says almost nothing about the worst row. So does lambda itself: single rows
lose far more than the mean."""

BUDGET = """\
With `max_dropped_mass=eps` alone, no other rule. *Allowed* is eps / (1 + eps), for every row.

No row goes beyond it, and with single keys the rule spends what it is allowed: it skips 20% to 40%
at 2048 tokens. Where we lose: with blocks of 64 keys the certificate is too loose and a row of 64
queries has to agree, so that even at the 99th percentile a query spends 2% to 3% of its budget, and
2% to 5% are skipped. With such blocks the budget is a safety net, no source of speed."""

NEEDLES = """\
The stress test `needle_depths` ([evaluation-tasks.md](evaluation-tasks.md)): the share of all heads
of all layers that would skip the block in which the needle lies, in the block row that ends with
the question, and when the first token of the answer is decoded. Three samples a depth, 2048 tokens.

At lambda 0.1 half of the heads leave out the block with the answer, and seven of ten when decoding:
the answer is up to the heads that keep it, and nothing in the rule looks at which those are. At the
very start it lies in the sink's block, which is never skipped; towards the end it is skipped less.
What that does to answers, as a heat map for each setting: the stress tests in
[evaluation-results.md](evaluation-results.md). SmolLM2 answers nearly always even so:
21 of 22 questions with 70% of the blocks skipped."""
