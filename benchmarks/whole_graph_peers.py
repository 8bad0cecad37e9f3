"""OpenVINO and ONNX Runtime on exports of a model: the children of `benchmarks.whole_graph`.

    PEERS_PYTHON benchmarks/whole_graph_peers.py export MODEL FOLDER
    PEERS_PYTHON benchmarks/whole_graph_peers.py run NAME FOLDER IDS.json NEW_TOKENS THREADS

They run in an environment of their own, as optimum-intel wants an older transformers:

    pip install optimum-intel[openvino] openvino-genai onnxruntime-genai onnx-ir torch

Each is run by its makers' own generation library (openvino-genai, onnxruntime-genai), which keeps
the key-value cache and computes the logits of the last position only. Nothing of this package, nor
of benchmarks/, is imported here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

#: What is exported, and what it is told at run time.
OPENVINO = {
    "openvino float32": ("ov_fp32", {"INFERENCE_PRECISION_HINT": "f32"}),
    "openvino bfloat16": ("ov_fp32", {"INFERENCE_PRECISION_HINT": "bf16"}),
    "openvino int8": ("ov_int8", {"INFERENCE_PRECISION_HINT": "bf16"}),
}
ONNXRUNTIME = {"onnxruntime float32": "ort_fp32", "onnxruntime int8": "ort_int8"}
PEERS = (*OPENVINO, *ONNXRUNTIME)


def export(model: str, folder: Path) -> None:
    """Exports `model` in each form, as each maker's documentation says; keeps what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for precision in ("fp32", "int8"):
        if not (folder / f"ov_{precision}").exists():
            optimum = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino"]
            form = ["--task", "text-generation-with-past", "--weight-format", precision]
            target = str(folder / f"ov_{precision}")
            subprocess.run([*optimum, "--model", model, *form, target], check=True)
        if not (folder / f"ort_{precision}").exists():
            builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu"]
            target = str(folder / f"ort_{precision}")
            subprocess.run([*builder, "-i", model, "-o", target, "-p", precision], check=True)


def openvino(name: str, folder: Path, ids: list[int], new: int, threads: int) -> dict[str, Any]:
    """By openvino-genai's LLMPipeline."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    sub, options = OPENVINO[name]
    options = {**options, "INFERENCE_NUM_THREADS": threads}
    pipe = genai.LLMPipeline(str(folder / sub), "CPU", **options)
    config = genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
    pipe.generate(ov.Tensor(np.array([ids[:64]])), genai.GenerationConfig(max_new_tokens=2))
    result = pipe.generate(ov.Tensor(np.array([ids])), config)
    metrics = result.perf_metrics
    return {
        "prefill": metrics.get_ttft().mean / 1e3,
        "decode": metrics.get_tpot().mean / 1e3,
        "tokens": [int(token) for token in result.tokens[0]],
        "version": f"openvino {ov.__version__.split('-')[0]}, genai {genai.__version__}",
    }


def onnxruntime(name: str, folder: Path, ids: list[int], new: int, threads: int) -> dict[str, Any]:
    """By onnxruntime-genai's Generator."""
    import numpy as np
    import onnxruntime_genai as genai

    config = genai.Config(str(folder / ONNXRUNTIME[name]))
    session = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": session}}))
    model = genai.Model(config)

    def generator(prompt: list[int], more: int) -> Any:
        params = genai.GeneratorParams(model)
        params.set_search_options(
            max_length=len(prompt) + more, min_length=len(prompt) + more, do_sample=False
        )
        return genai.Generator(model, params)

    warm = generator(ids[:64], 3)
    warm.append_tokens(np.array([ids[:64]], dtype=np.int32))
    warm.generate_next_token()
    run = generator(ids, new)
    start = time.perf_counter()
    run.append_tokens(np.array([ids], dtype=np.int32))
    run.generate_next_token()
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(new - 1):
        run.generate_next_token()
    decode = (time.perf_counter() - start) / (new - 1)
    return {
        "prefill": prefill,
        "decode": decode,
        "tokens": [int(token) for token in run.get_sequence(0)[len(ids) :]],
        "version": f"onnxruntime-genai {genai.__version__}",
    }


def main() -> None:
    """The command line: see the module's docstring."""
    if sys.argv[1] == "export":
        export(sys.argv[2], Path(sys.argv[3]))
        return
    _, _, name, folder, ids, new, threads = sys.argv
    run = openvino if name in OPENVINO else onnxruntime
    tokens = json.loads(Path(ids).read_text())
    print(json.dumps(run(name, Path(folder), tokens, int(new), int(threads))))


if __name__ == "__main__":
    main()
