"""How many blocks a kept int8 copy of K proves in decode, and what that leaves to read.

    python -m benchmarks.int8_decode          # a few minutes on one thread

SmolLM2-135M-Instruct's own queries and keys on the bundled book, rounded to bfloat16. Every
position of a sample is decoded against all keys before it, as the kernels do: blocks of 64, splits
of 1024 keys that start from the seed's maximum, the group's heads voting together. With lambda < 1
a block's gap does not depend on what was skipped before it, so one pass gives every lambda. A block
is proved if the bound of docs/int8-filter.md, with the seed's maximum, lies below lambda; the
margins for rounding, far below the others, are left out. `giving_up` counts as the GPU kernels do:
they scan 16 blocks at a time, until the scan has cost a block of K more than it has saved.

`python -m benchmarks.findings_page` shows the result.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.cpu_attention import machine
from benchmarks.findings import LAYERS
from benchmarks.model_attention import capture
from benchmarks.table_format import HERE

OUTPUT = HERE / "results" / "int8_decode.json"
LENGTHS = (2048, 4096, 8192)
POSITIONS = 32  # of each length: the last ones, 8 apart
BLOCK, SPLIT, WORD = 64, 16, 16  # keys; blocks
TARGETS = (0.5, 0.6, 0.7, 0.73, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975)


def bounds_on_scores(q: Tensor, k: Tensor) -> Tensor:
    """What the copy allows the scores of q `[R, D]` against k `[L, D]` to be at most, `[R, L]`."""
    mean = k.mean(0)
    k = k - mean
    a = (k.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    b = (q.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    copied, rough = a * (k / a).round(), b * (q / b).round()
    missed = (q - rough).norm(dim=-1, keepdim=True) * copied.norm(dim=-1)
    missed = missed + q.norm(dim=-1, keepdim=True) * (k - copied).norm(dim=-1)
    return (q @ mean)[:, None] + rough @ copied.T + missed


def gaps(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Of one position's group q `[G, D]`, scaled, and its keys k `[L, D]`, oldest first.

    Returns:
        For each block but the seed's: how far its largest score lies above the running max, and how
        far the bound on it lies above the seed's max, the largest over the group; `[NK - 2]`.
    """
    tops, most = (
        pad(x, (0, -len(k) % BLOCK), value=-math.inf).unflatten(1, (-1, BLOCK)).amax(-1)
        for x in (q @ k.T, bounds_on_scores(q, k))
    )
    seed = torch.maximum(tops[:, :1], tops[:, -1:])
    # Each split starts anew from the seed; block 0 and the newest are in the first and last one.
    m = pad(tops, (0, -tops.shape[1] % SPLIT), value=-math.inf).unflatten(1, (-1, SPLIT))
    m = torch.cat([seed[:, None].expand(-1, m.shape[1], 1), m], 2).cummax(2).values[..., :-1]
    m = m.flatten(1)[:, : tops.shape[1]]
    exact, proof = (tops - m).amax(0), (most - seed).amax(0)
    assert (exact <= proof + 1e-4 * most.abs().amax()).all(), "no bound"
    return exact[1:-1], proof[1:-1]


def scanned_and_proved(proof: Tensor, log_lambda: float, cost: float) -> tuple[int, int]:
    """Blocks, of one position and group: until each word's debt exceeds one block of K."""
    proved = proof < log_lambda
    words = pad(proved, (1, -(len(proved) + 1) % WORD)).view(-1, WORD)
    real = pad(torch.ones_like(proved), (1, -(len(proved) + 1) % WORD)).view(-1, WORD)
    debt = (real * cost - words.double()).cumsum(1)
    given_up = pad(debt, (1, -1)).cummax(1).values > 1.0
    return int((real & ~given_up).sum()), int((words & ~given_up).sum())


def at_length(layers: dict[int, tuple[Tensor, ...]], length: int) -> dict[str, Any]:
    """Every target at one length: shares of all blocks, the two of the seed included."""
    found = []
    for q, k, _ in layers.values():
        group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
        q, k = (x.bfloat16().float() for x in (q, k))
        for position in range(length - 8 * POSITIONS + 7, length, 8):
            for head in range(k.shape[1]):
                rows = q[0, head * group : (head + 1) * group, position] * scale
                found.append(gaps(rows, k[0, head, : position + 1]))
    exact = torch.cat([x for x, _ in found]).sort().values
    blocks = len(exact) + 2 * len(found)
    proofs = torch.cat([y for _, y in found])
    rows = []
    for target in TARGETS:
        at = int(target * blocks)
        if at >= len(exact) or exact[at] >= 0:
            continue
        log_lambda = exact[at].item()
        row = {
            "target": target,
            "lambda": math.exp(log_lambda),
            "skipped": (exact < log_lambda).sum().item() / blocks,
            "proved": (proofs < log_lambda).sum().item() / blocks,
        }
        for size in (64, 128):
            cost = (size + 12) / (2 * size)
            counts = [scanned_and_proved(y, log_lambda, cost) for _, y in found]
            scanned, proved = (sum(x) / blocks for x in zip(*counts, strict=True))
            row[f"giving_up_{size}"] = {"scanned": scanned, "proved": proved}
        rows.append(row)
        print(length, row, flush=True)
    return {"length": length, "rows": rows}


def main() -> None:
    """All lengths, of the same prompt's keys."""
    layers = capture(max(LENGTHS), LAYERS)
    result = {
        "machine": machine(),
        "model": "SmolLM2-135M-Instruct",
        "layers": LAYERS,
        "positions": POSITIONS,
        "lengths": [at_length(layers, length) for length in LENGTHS],
    }
    OUTPUT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {OUTPUT}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
