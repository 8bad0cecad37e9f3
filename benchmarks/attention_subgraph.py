"""A layer's whole attention, from Q, K and V's projections to the output's, and BERT's pattern.

    python -m benchmarks.attention_subgraph [--parts prefill decode pieces pattern] [--rounds 7]

One attention module of transformers with random weights, in the shapes of SmolLM2-135M and of
Llama-3.2-1B, against itself under sdpa, eager and compiled. The hidden states carry one channel
that lifts the keys of some 64-key blocks far above the others' (through a rotary channel so slow
that positions do not matter), so the share of blocks that BLASST skips is set, and dense attention
is right all the same: every contestant must be about as close to float64 as sdpa is before it is
timed. Contestants take turns, round by round. What a part is made of is in attention_pieces.py, the
pattern in mha_pattern.py.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from benchmarks import attention_pieces, mha_pattern
from benchmarks.cpu_attention import HERE, LAMBDA, SEED, machine, measure, ratios
from hf_sparse_attention import (
    GrowingCache,
    SparseAttentionConfig,
    collect_stats,
    fuse_attention,
    set_sparse_attention,
)
from hf_sparse_attention.types import BlockGeometry

SHAPES = {
    "SmolLM2-135M": {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3},
    "Llama-3.2-1B": {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8},
}
HEAD_SIZE = 64
PREFILL, DECODE = 4096, 8192
#: Of which share of the blocks the keys are low; the sink and the diagonal are kept anyway.
LOW_BLOCKS = 0.78
#: A contestant may be this many times as far from float64 as sdpa is: sums are in another order
#: (tests/comparisons.py allows the same).
GATE = 4.0
#: Decoding steps that are timed together.
STEPS = 20


def attention_model(shape: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """A model of one layer, whose projections read the channel of `hidden_states`."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        **SHAPES[shape],
        head_dim=HEAD_SIZE,
        num_hidden_layers=1,
        intermediate_size=64,
        vocab_size=64,
        max_position_embeddings=2 * DECODE,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    model = LlamaForCausalLM(config).eval()
    attention = model.model.layers[0].self_attn
    slowest = HEAD_SIZE // 2 - 1
    for projection, channel, size in ((attention.q_proj, 0, 8.0), (attention.k_proj, 1, 32.0)):
        projection.weight.data[:, :2] = 0.0
        projection.weight.data[slowest::HEAD_SIZE, channel] = size
    attention.v_proj.weight.data[:, :2] = 0.0
    return model.to(dtype)


def hidden_states(model: LlamaForCausalLM, length: int) -> Tensor:
    """`[1, L, hidden]`: noise; channel 0 is 1, channel 1 is 1 where keys are high, else 0."""
    torch.manual_seed(SEED + 1)
    x = torch.randn(1, length, model.config.hidden_size)
    blocks = torch.arange(-(-length // 64)) % 100 * 61 % 100 >= 100 * LOW_BLOCKS  # spread evenly
    blocks[0] = True
    x[..., 0] = 1.0
    x[..., 1] = blocks.repeat_interleave(64)[:length].float()
    return x.to(model.dtype)


def with_attention(model: LlamaForCausalLM, lam: float | None, keys: int) -> LlamaForCausalLM:
    """A copy of the model under sdpa (None), or ours with this lambda at `keys` keys."""
    model = copy.deepcopy(model)
    if lam is None:
        model.set_attn_implementation("sdpa")
        return model
    factor = {"a": lam * keys, "b": 0.0}
    config = SparseAttentionConfig(
        geometry=BlockGeometry.from_name("64x64"),
        threshold_scale_factor={"prefill": factor, "decode": factor},
        min_length=0,
    )
    set_sparse_attention(model, config)
    return model


def fused(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy of the model with its attention fused."""
    model = copy.deepcopy(model)
    assert fuse_attention(model)
    return model


def runner(model: LlamaForCausalLM, x: Tensor, compiled: bool = False) -> Callable[[], Tensor]:
    """The layer's attention over `x`, without a cache."""
    attention = model.model.layers[0].self_attn
    tables = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    run = torch.compile(attention) if compiled else attention
    return lambda: run(x, position_embeddings=tables, attention_mask=None)[0]


def prefill_case(shape: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Every contestant over one input."""
    base = attention_model(shape, dtype)
    x = hidden_states(base, PREFILL)
    sdpa, dense, sparse = (with_attention(base, lam, PREFILL) for lam in (None, 0.0, LAMBDA))
    contestants = {"sdpa": runner(sdpa, x), "sdpa compiled": runner(sdpa, x, compiled=True)}
    for name, model in (("own", dense), ("own skipping", sparse)):
        contestants[name] = runner(model, x)
        contestants[f"{name}, fused"] = runner(fused(model), x)
        contestants[f"{name}, compiled"] = runner(model, x, compiled=True)
    with collect_stats(sparse) as stats:
        contestants["own skipping"]()
    exact = runner(copy.deepcopy(sdpa).double(), x.double())()
    errors = gated({name: run() for name, run in contestants.items()}, exact)
    times = measure(contestants, rounds, torch.get_num_threads())
    return case_of(shape, dtype, PREFILL, errors, times) | {"skipped": stats.sparsity("prefill")}


def decode_case(shape: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Single tokens behind a prompt, attention dense, by implementation and kind of cache."""
    base = attention_model(shape, dtype)
    sdpa, own = with_attention(base, None, DECODE), with_attention(base, 0.0, DECODE)
    room = DECODE + STEPS * (rounds + 2)
    kinds: dict[str, Callable[[Any], Any]] = {
        "dynamic": lambda config: DynamicCache(config=config),
        "growing": lambda config: GrowingCache(config=config),
        "static": lambda config: StaticCache(config=config, max_cache_len=room),
    }
    models = {"sdpa": sdpa, "own": own, "own fused": fused(own)}
    chosen = [("sdpa", "dynamic"), ("sdpa", "static"), ("sdpa", "growing")]
    chosen += [(name, kind) for name in ("own", "own fused") for kind in kinds]
    x = hidden_states(base, room)
    prompt = prompt_of(own, x)
    firsts, contestants = {}, {}
    for name, kind in chosen:
        step = stepper(models[name], kinds[kind], prompt, x)
        firsts[f"{name}, {kind}"] = step(1)
        contestants[f"{name}, {kind}"] = lambda step=step: step(STEPS)
    double = copy.deepcopy(sdpa).double()
    exact = stepper(double, kinds["dynamic"], [t.double() for t in prompt], x.double())(1)
    errors = gated(firsts, exact, base="sdpa, dynamic")
    times = measure(contestants, rounds, torch.get_num_threads())
    bases = ("sdpa, dynamic", "sdpa, static")
    return case_of(shape, dtype, DECODE, errors, times, bases) | {"steps": STEPS}


def prompt_of(model: LlamaForCausalLM, x: Tensor) -> list[Tensor]:
    """K and V of the first `DECODE` of `x`: the same for all contestants."""
    cache, tokens = DynamicCache(config=model.config), x[:, :DECODE]
    tables = model.model.rotary_emb(tokens, torch.arange(DECODE)[None])
    model.model.layers[0].self_attn(
        tokens, position_embeddings=tables, attention_mask=None, past_key_values=cache
    )
    return [cache.layers[0].keys, cache.layers[0].values]


def stepper(
    model: LlamaForCausalLM, kind: Callable[[Any], Any], prompt: list[Tensor], x: Tensor
) -> Callable[[int], Tensor]:
    """Runs so many more tokens of `x` through the layer's attention, on a cache with the prompt."""
    attention, cache = model.model.layers[0].self_attn, kind(model.config)
    cache.update(*prompt, 0)
    column, at = torch.arange(x.shape[1]), DECODE

    def steps(count: int) -> Tensor:
        nonlocal at
        for _ in range(count):
            token = x[:, at : at + 1]
            tables = model.model.rotary_emb(token, torch.tensor([[at]]))
            # Which columns of a static cache the token sees, as transformers says it.
            mask = (column <= at)[None, None, None] if isinstance(cache, StaticCache) else None
            out = attention(
                token, position_embeddings=tables, attention_mask=mask, past_key_values=cache
            )[0]
            at += 1
        return out

    return steps


def gated(outputs: dict[str, Tensor], exact: Tensor, base: str = "sdpa") -> dict[str, float]:
    """Each output's largest error, as a part of the largest value.

    Raises:
        AssertionError: one is further off than `GATE` times what `base` is.
    """
    scale = exact.abs().max().item()
    errors = {name: (x.double() - exact).abs().max().item() / scale for name, x in outputs.items()}
    for name, error in errors.items():
        assert error <= GATE * errors[base], (
            f"{name}: off by {error:.2e}, {base} {errors[base]:.2e}"
        )
    return errors


def case_of(
    shape: str,
    dtype: torch.dtype,
    length: int,
    errors: dict[str, float],
    times: dict[str, list[float]],
    bases: tuple[str, ...] = ("sdpa", "sdpa compiled"),
) -> dict[str, Any]:
    """What is kept of one case, printed on the way."""
    case = {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "length": length,
        "threads": torch.get_num_threads(),
        "errors": errors,
        "seconds": times,
        "speedup_over": {name: ratios(times, name) for name in bases},
    }
    print(f"\n{shape} {case['dtype']} {length}, {case['threads']} threads")
    for name in times:
        shown = [f"{case['speedup_over'][b][name]['median']:6.2f} x {b}" for b in bases]
        print(f"  {name:24s} {min(times[name]) * 1e3:9.2f} ms  {'  '.join(shown)}", flush=True)
    return case


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {"prefill": prefill_case, "decode": decode_case}
    parser.add_argument("--parts", nargs="+", default=[*parts, "pieces", "pattern"])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=HERE / "results/attention_subgraph.json")
    args = parser.parse_args()
    path: Path = args.output
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results["machine"] = machine() | {"transformers": transformers.__version__}
    results |= {"seed": SEED, "lambda": LAMBDA, "low_blocks": LOW_BLOCKS, "gate": GATE}
    torch.set_num_threads(args.threads)
    stamp = {name: results["machine"][name] for name in ("kernel", "time")}
    for part in args.parts:
        for dtype in args.dtype:
            if part == "pattern":
                cases = mha_pattern.cases(getattr(torch, dtype), args.rounds)
            elif part == "pieces":
                cases = [
                    attention_pieces.case(s, SHAPES[s], getattr(torch, dtype), n, args.rounds)
                    for s in args.shapes
                    for n in (1, PREFILL)
                ]
            else:
                cases = [parts[part](s, getattr(torch, dtype), args.rounds) for s in args.shapes]
            fresh = [key_of(case) for case in cases]
            kept = [case for case in results.get(part, []) if key_of(case) not in fresh]
            results[part] = sorted(kept + [case | stamp for case in cases], key=key_of)
            path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten: {path}")


def key_of(case: dict[str, Any]) -> tuple[str, ...]:
    """What makes a case of a part the same case."""
    return tuple(f"{case[name]:>20}" for name in ("dtype", "shape", "length", "threads"))


if __name__ == "__main__":
    with torch.no_grad():
        main()
