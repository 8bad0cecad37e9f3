"""Runs a model over the samples: with a progress bar, resumable, and on several processes.

About every half minute the sums so far are written to the output folder, together with what they
belong to: the model, the settings, and a digest of the samples. A run that was killed continues
from there and ends as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as dump_safetensors
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_sparse_attention.calibration.processes import Processes
from hf_sparse_attention.thresholds import write_atomically

if TYPE_CHECKING:
    from hf_sparse_attention.calibration.observation import Observations

STATE_NAME = "calibration_state.safetensors"
SECONDS_BETWEEN_SAVES = 30.0
#: A save may take at most this share of the time between two.
SHARE_OF_SAVING = 0.05


def run(
    model: nn.Module,
    samples: Iterable[Tensor],
    observations: Observations,
    output_dir: str | Path | None = None,
    progress: bool = True,
    description: str = "calibrating",
) -> list[int]:
    """Runs `model`, whose attention `observations` watches, over `samples`.

    Under torchrun or `accelerate launch` each process runs a part, and all end with the sums of
    all. The logits are never computed: they would be larger than everything else.

    Args:
        model: a transformers model, on one device or spread by `device_map`.
        samples: token ids `[n]` int64; the same in every process and, to resume, in every run.
        observations: what they are added to.
        output_dir: where the state is kept, until `forget` removes it; None keeps none.
        progress: show a bar.
        description: what stands before the bar.

    Returns:
        The length of each sample, in their order.

    Raises:
        ValueError: no samples, no causal attention seen, or a state in `output_dir` that belongs to
            another calibration.
    """
    processes = Processes.of(model)
    inner, device = _inner(model), _input_device(model)
    seen = Seen()
    stream = seen.watch(samples)
    file = Path(output_dir) / STATE_NAME if output_dir is not None else None
    arguments = _arguments(model, observations) if file else {}
    done = _resume(file, arguments, observations, processes, seen, stream)
    bar = tqdm(
        total=len(samples) if isinstance(samples, Sized) else None,
        initial=done,
        desc=description,
        unit=" samples",
        disable=not progress or processes.rank > 0,
    )
    pace = _Pace()
    with bar, torch.no_grad():
        for ids in stream:
            if processes.falls_to_me(len(ids)):
                inner(input_ids=ids[None].to(device), use_cache=False)
                if not observations.heads:
                    raise ValueError(
                        "calibrate: expected causal attention through transformers' interface, "
                        f"saw none in {type(model).__name__}"
                    )
            bar.set_postfix(tokens=sum(seen.lengths), refresh=False)
            bar.update()
            if file and pace.is_due(len(ids)):
                state = processes.together(observations)
                if processes.rank == 0:
                    _write(file, arguments, seen, state)
                pace.saved(processes)
    if not seen.lengths:
        raise ValueError("calibrate: expected at least one sample, got none")
    state = processes.together(observations)
    if file and processes.rank == 0:
        _write(file, arguments, seen, state)
    if processes.count > 1:
        observations.load_state_dict(state)
    return seen.lengths


def forget(output_dir: str | Path) -> None:
    """Removes the state of a run from `output_dir`, and what a killed write of it may have left."""
    for file in Path(output_dir).glob(f"*{STATE_NAME}*"):
        file.unlink(missing_ok=True)


@dataclass
class Seen:
    """The samples that were taken: their lengths, and a digest of their tokens."""

    lengths: list[int] = field(default_factory=list)
    _hash: Any = field(default_factory=hashlib.sha256)

    def watch(self, samples: Iterable[Tensor]) -> Iterator[Tensor]:
        """The samples, noted down as they pass."""
        for ids in samples:
            self.lengths.append(len(ids))
            self._hash.update(f"{len(ids)}:".encode())
            self._hash.update(ids.to("cpu", torch.int64).numpy().tobytes())
            yield ids

    @property
    def digest(self) -> str:
        """sha256, in hex."""
        return str(self._hash.hexdigest())


class _Pace:
    """When to save: first after one sample, then at about equal times, measured in tokens.

    In tokens, since all processes must come to the same answer, and clocks differ.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.quota = 0
        self.since = time.monotonic()

    def is_due(self, tokens: int) -> bool:
        self.tokens += tokens
        if self.tokens <= self.quota:
            return False
        self.save_begins = time.monotonic()
        return True

    def saved(self, processes: Processes) -> None:
        now = time.monotonic()
        wanted = max(SECONDS_BETWEEN_SAVES, (now - self.save_begins) / SHARE_OF_SAVING)
        speed = self.tokens / max(self.save_begins - self.since, 1e-3)
        self.quota = processes.agree(int(wanted * speed))
        self.tokens, self.since = 0, now


def _write(
    file: Path, arguments: Mapping[str, Any], seen: Seen, state: Mapping[str, Tensor]
) -> None:
    about = {"arguments": arguments, "samples": len(seen.lengths), "data": seen.digest}
    write_atomically(file, dump_safetensors(dict(state), {"calibration": json.dumps(about)}))


def _resume(
    file: Path | None,
    arguments: Mapping[str, Any],
    observations: Observations,
    processes: Processes,
    seen: Seen,
    stream: Iterator[Tensor],
) -> int:
    """Takes up the state in `file`, if there is one, and steps over the samples that it holds."""
    if file is None:
        return 0
    data = processes.share(file.read_bytes() if file.exists() and processes.rank == 0 else b"")
    if not data:
        return 0
    try:
        state = load_safetensors(data)
        about = json.loads(_metadata(data)["calibration"])
        before: Mapping[str, Any] = about["arguments"]
        samples, digest = int(about["samples"]), about["data"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: expected the state of a calibration, got {error}") from error
    differences = [
        f"{name}: expected {arguments[name]}, got {before.get(name)}"
        for name in arguments
        if arguments[name] != before.get(name)
    ]
    for _ in range(samples):
        if next(stream, None) is None:
            break
    if (len(seen.lengths), seen.digest) != (samples, digest):
        differences.append(f"data: expected these samples, got {samples} others")
    if differences:
        raise ValueError(
            f"{file}: the state of another calibration ({'; '.join(differences)}); delete it to "
            "start anew, or choose another output_dir"
        )
    if processes.rank == 0:  # the others' sums are added to it
        observations.load_state_dict(state)
    return samples


def _metadata(data: bytes) -> dict[str, str]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata: dict[str, str] = header["__metadata__"]
    return metadata


def _arguments(model: nn.Module, observations: Observations) -> dict[str, Any]:
    """What a state belongs to, JSON-ready."""
    return {
        "model": f"{type(model).__name__}, {sum(p.numel() for p in model.parameters())} parameters",
        "weights": weights_digest(model),
        "geometries": [repr(geometry) for geometry in observations.geometries.values()],
        "levels": list(observations.levels),
        "keep_sink": observations.keep_sink,
    }


def weights_digest(model: nn.Module) -> str:
    """Of a few values of each parameter: enough to tell another checkpoint, quick for any size."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta":
            flat = parameter.detach().reshape(-1)
            few = flat[:: max(1, len(flat) // 16)][:16]
            digest.update(few.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def _inner(model: Any) -> Any:
    """The model without its head, under PEFT as well."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return getattr(model, "base_model", model)


def _input_device(model: nn.Module) -> torch.device:
    """Where token ids go; accelerate's hooks move them on where the weights are offloaded."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
