"""Several processes that calibrate together: who runs which sample, and how sums come together.

Each process holds the whole model. Every one walks through all samples and runs those that fall to
it; what they observed are integer sums, so the outcome is that of one process, bit for bit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as dump_safetensors
from torch import Tensor, nn

from hf_sparse_attention.sharding import is_distributed, shares_of

if TYPE_CHECKING:
    from hf_sparse_attention.calibration.observation import Observations


@dataclass
class Processes:
    """This process among those of torchrun or `accelerate launch`; alone if there are none.

    Args:
        rank: of this one; only rank 0 writes files and shows progress.
        count: how many there are.
        loads: what each has been given to do so far, in arbitrary units.
    """

    rank: int = 0
    count: int = 1
    loads: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> Processes:
        """Those that run now; joins them if the launcher says so and nobody has yet.

        Raises:
            ValueError: if `model` itself is split over the processes.
            ImportError: several were launched, none has called `init_process_group`, and
                `accelerate`, which would do so, is not installed.
        """
        if not is_distributed() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                from accelerate import PartialState
            except ImportError as error:
                raise ImportError(
                    "calibrate: several processes need accelerate (pip install accelerate), or "
                    "torch.distributed.init_process_group called beforehand"
                ) from error
            PartialState()
        if not is_distributed():
            return cls(loads=[0.0])
        if shares := shares_of(model):
            raise ValueError(
                "calibrate: expected a model that every process holds whole, got one split over "
                f"{shares[0][1]} (tensor parallelism or FSDP); load it with device_map instead"
            )
        return cls(dist.get_rank(), dist.get_world_size(), [0.0] * dist.get_world_size())

    def falls_to_me(self, tokens: int) -> bool:
        """Whether this process runs the next sample: the one that has least to do takes it."""
        taker = self.loads.index(min(self.loads))
        # Attention grows with the square of the length; it overtakes the rest at a few thousand.
        self.loads[taker] += tokens * (tokens + 4096.0)
        return taker == self.rank

    def agree(self, value: int) -> int:
        """What rank 0 says."""
        if self.count == 1:
            return value
        said = torch.tensor([value], dtype=torch.int64, device=self._device)
        dist.broadcast(said, src=0)
        return int(said)

    def together(self, observations: Observations) -> dict[str, Tensor]:
        """The state of what all processes observed, the same on each."""
        if self.count == 1:
            return observations.state_dict()
        total, other = (
            type(observations)(
                list(observations.geometries.values()), observations.levels, observations.keep_sink
            )
            for _ in range(2)
        )
        own = dump_safetensors(observations.state_dict())
        for rank in range(self.count):
            other.load_state_dict(load_safetensors(self.share(own, rank)))
            total.merge(other)
        return total.state_dict()

    def share(self, data: bytes, source: int = 0) -> bytes:
        """The `data` of process `source`, in every process."""
        if self.count == 1:
            return data
        size = torch.tensor([len(data)], dtype=torch.int64, device=self._device)
        dist.broadcast(size, src=source)
        buffer = torch.empty(int(size), dtype=torch.uint8, device=self._device)
        if source == self.rank:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(buffer, src=source)
        return buffer.cpu().numpy().tobytes()

    @property
    def _device(self) -> str:
        return "cuda" if dist.get_backend() == "nccl" else "cpu"
