"""Which of a layer's heads this process holds, under tensor parallelism.

`from_pretrained(..., tp_plan="auto")` cuts the query, key and value projections by columns, so each
rank computes a contiguous run of heads and the attention function sees only those. Thresholds
are numbered by the layer's global heads. What says which run is ours is the projections' own
weights: transformers (and torch's `parallelize_module`) leaves them as DTensors, whose mesh knows
the rank; module attributes such as `num_heads` are not kept up to date.
"""

from __future__ import annotations

from typing import Any

from torch import distributed, nn

from hf_sparse_attention.interface import config_value

#: Of a process in a mesh: its rank, and how many there are.
Share = tuple[int, int]


def is_distributed() -> bool:
    """Whether this process works together with others."""
    return distributed.is_available() and distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return not is_distributed() or distributed.get_rank() == 0


def shares_of(module: nn.Module) -> tuple[Share, ...]:
    """The mesh dimensions along which a parameter of `module` is cut; the likeliest first.

    Under FSDP alone they cut storage, not heads; with both there are two, and the one called "tp"
    comes first. `first_head` tells by the number of heads.
    """
    if not is_distributed():
        return ()
    from torch.distributed.tensor import DTensor

    shares: dict[Share, str] = {}
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor):
            continue
        mesh = parameter.device_mesh
        names = mesh.mesh_dim_names or ("",) * mesh.ndim
        for dim, (name, placement) in enumerate(zip(names, parameter.placements, strict=True)):
            if placement.is_shard() and mesh.size(dim) > 1:
                shares.setdefault((mesh.get_local_rank(dim), mesh.size(dim)), name)
    return tuple(sorted(shares, key=lambda share: "tp" not in shares[share]))


def heads_in_all(module: nn.Module) -> int | None:
    """The query heads of the whole layer by the model's config; None if that does not say."""
    heads: Any = config_value(getattr(module, "config", None), "num_attention_heads")
    return heads if isinstance(heads, int) else None


def first_head(shares: tuple[Share, ...], heads: int, in_all: int | None) -> int | None:
    """The layer's number of the first of `heads` query heads seen here; None if nothing tells.

    Args:
        shares: as `shares_of` found them.
        heads: query heads of the call.
        in_all: query heads of the layer, all ranks together.
    """
    if in_all is None or heads >= in_all:
        return 0
    return next((rank * heads for rank, size in shares if heads * size == in_all), None)
