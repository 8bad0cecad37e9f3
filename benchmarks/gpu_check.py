"""What `make gpu-check` runs on a machine with a GPU: correctness first, JSON under $OUT.

The package has no GPU kernel yet. Until it has, this checks what runs on a GPU today: the reference
backend and the dense one, and a model under "blasst", each against float64 on the CPU. Timings will
stand here once there is a kernel to time; a slow reference is not worth a number.
"""

import json
import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import __version__ as transformers_version

from hf_sparse_attention import (
    SkipRule,
    available_backends,
    block_skip_attention,
    collect_stats,
    set_sparse_attention,
)

FEATURES = {
    "plain": {},
    "window": {"window": 100},
    "softcap": {"softcap": 5.0},
    "padded": {"key_valid": torch.arange(300)[None].expand(2, -1) > torch.tensor([[7], [90]])},
}
RULES = {"never": SkipRule.never(), "blasst": SkipRule.blasst(0.3), "budget": SkipRule.budget(0.1)}


def attention_errors(device: torch.device) -> list[dict]:
    """The reference and dense backends on `device` against float64 on the CPU.

    The tolerance is four times the error that float32 itself makes on the CPU.
    """
    q, k, v = (torch.randn(2, heads, 300, 64, dtype=torch.float64) for heads in (4, 2, 2))
    rows = []
    for feature, options in FEATURES.items():
        for name, rule in RULES.items():
            exact = block_skip_attention(q, k, v, rule=rule, backend="reference", **options).out
            single = [x.float() for x in (q, k, v)]
            cpu = block_skip_attention(*single, rule=rule, backend="reference", **options).out
            there = [x.to(device) for x in single]
            moved = {n: x.to(device) if torch.is_tensor(x) else x for n, x in options.items()}
            for backend in ("reference", "dense") if name == "never" else ("reference",):
                rule_there = SkipRule(
                    *(
                        None if x is None else x.to(device)
                        for x in (rule.log_lambda, rule.block_threshold, rule.max_dropped_mass)
                    )
                )
                got = block_skip_attention(*there, rule=rule_there, backend=backend, **moved).out
                error = (got.cpu().double() - exact).abs().max().item()
                allowed = 4 * (cpu.double() - exact).abs().max().item() + 1e-7
                rows.append(
                    {
                        "feature": feature,
                        "rule": name,
                        "backend": backend,
                        "max_abs_error": error,
                        "allowed": allowed,
                        "ok": error <= allowed,
                    }
                )
    return rows


@torch.inference_mode()
def model_errors(device: torch.device) -> list[dict]:
    """A small Llama under "blasst" against eager, and what it skips under a budget."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager").to(device).eval()
    ids = torch.randint(256, (2, 700), device=device)
    mask = torch.ones_like(ids)
    mask[0, :200] = 0
    eager = model(ids, attention_mask=mask).logits
    set_sparse_attention(model, "blasst", threshold_scale_factor=0.0, min_length=0)
    dense = model(ids, attention_mask=mask).logits
    error = (dense - eager)[mask.bool()].abs().max().item()
    set_sparse_attention(model, "blasst", max_dropped_mass=0.3, min_length=0)
    with collect_stats(model) as stats:
        model(ids, attention_mask=mask)
    allowed = 1e-4 * eager.abs().max().item()
    return [
        {
            "model": "Llama",
            "max_abs_error": error,
            "allowed": allowed,
            "ok": error <= allowed,
            "budget_sparsity": stats.sparsity("prefill"),
        }
    ]


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("gpu-check: expected a CUDA device, found none; `make test` needs none")
    # Errors are compared with float32's own: TF32 would be another precision.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    device = torch.device("cuda")
    result = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers_version,
        "backends": available_backends(),
        "attention": attention_errors(device),
        "model": model_errors(device),
    }
    folder = Path(os.environ.get("OUT", "benchmarks/results"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "gpu_check.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    rows = [*result["attention"], *result["model"]]
    for row in rows:
        print("ok  " if row["ok"] else "FAIL", json.dumps(row))
    print(f"{sum(r['ok'] for r in rows)} of {len(rows)} right; wrote {path}")
    sys.exit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    main()
