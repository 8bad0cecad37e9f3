"""Observes a tiny model; alone, or as a script under torchrun on each rank of several.

calibrating_processes.py MODEL OUT: writes what each rank ends with to OUT/rank<N>.safetensors.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_sparse_attention.calibration.attach import attached
from hf_sparse_attention.calibration.observation import Observations
from hf_sparse_attention.calibration.progress import run
from hf_sparse_attention.types import BlockGeometry

GEOMETRIES = [BlockGeometry(16, 16), BlockGeometry(16, 1)]
LENGTHS = [48, 96, 20, 64, 33]


def samples(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 97, (n,), generator=generator) for n in lengths]


def observed(model, output_dir=None, ids=None):
    """What a run over the samples tells, and its lengths."""
    observations = Observations(GEOMETRIES, levels=[1, 2])
    with attached(model, observations):
        lengths = run(model, ids or samples(), observations, output_dir, progress=False)
    return observations.state_dict(), lengths


if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
    out = Path(sys.argv[2])
    passes = []
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    state, lengths = observed(model, out)
    state["passes"], state["lengths"] = torch.tensor(len(passes)), torch.tensor(lengths)
    save_file(state, out / f"rank{torch.distributed.get_rank()}.safetensors")
    torch.distributed.destroy_process_group()
