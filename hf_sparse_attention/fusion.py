"""`fuse_attention`: what surrounds attention in a decoder layer, in fewer passes, on the CPU.

Q, K and V come from one matrix product whose weight is laid out for it beforehand; the norm of
their heads and the rotary embedding are one pass in place (the kernel's `rotate_`); the output
projection's weight is laid out, too. The module keeps its weights, its names and its hooks: only
its class is replaced, by one made from it, and `unfuse_attention` puts the old one back. Wherever a
call is not plain inference on the CPU, the module's own forward runs.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_sparse_attention.backends import cpu, kernel
from hf_sparse_attention.fusion_source import Reading, read_forward, read_norm
from hf_sparse_attention.packed_linear import PackedLinear

logger = logging.getLogger(__name__)

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
_ATTRIBUTE = "_sparse_attention_fused"


def fuse_attention(model: nn.Module) -> list[str]:
    """Lets the attention modules of `model` run fused where nothing is trained or compiled.

    Takes effect in eager inference (`torch.no_grad`, as in `generate`) on the CPU, with any
    attention implementation but "eager"; anything else runs as before. Each module then holds a
    second copy of its projections' weights. Changes of the weights are noticed, except those made
    through `.data`: after such, fuse again.

    Args:
        model: a transformers model in evaluation mode or not, already with our attention or not.

    Returns:
        The names of the modules that are fused now. Attention modules that are left as they are
        are named in a warning, once for each reason.

    Raises:
        RuntimeError: there is no compiled CPU kernel; says why.
    """
    if (missing := cpu.available()) is not None:
        raise RuntimeError(f"fuse_attention: {missing}")
    unfuse_attention(model)
    fused, refused = [], dict[str, list[str]]()
    for name, module in model.named_modules():
        if not all(hasattr(module, projection) for projection in _PROJECTIONS[:3]):
            continue
        kind: Any = type(module)
        reading = read_forward(kind)
        reason = reading if isinstance(reading, str) else _unfit(module, reading)
        if isinstance(reading, str) or reason is not None:
            refused.setdefault(f"{kind.__name__}: {reason}", []).append(name)
            continue
        setattr(module, _ATTRIBUTE, _Fused(reading))
        module.__class__ = type(kind.__name__, (_FusedAttention, kind), {"__module__": __name__})
        fused.append(name)
    if not fused and not refused:
        logger.warning("not fused: expected modules with q_proj, k_proj and v_proj, found none")
    for reason, names in refused.items():
        logger.warning("not fused: %s (%d modules, first %s)", reason, len(names), names[0])
    return fused


def unfuse_attention(model: nn.Module) -> None:
    """Undoes `fuse_attention`: the modules are as they were, and their copies of weights gone."""
    for module in model.modules():
        if isinstance(module, _FusedAttention):
            module.__class__ = type(module).__bases__[1]
            delattr(module, _ATTRIBUTE)


def fused_modules(model: nn.Module) -> list[str]:
    """The names of the attention modules that `fuse_attention` has made run fused."""
    return [name for name, x in model.named_modules() if isinstance(x, _FusedAttention)]


class _FusedAttention(nn.Module):
    """What stands before a module's own class."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        fused: _Fused = getattr(self, _ATTRIBUTE)
        if args or not fused.serves(self, hidden_states, kwargs):
            return super().forward(hidden_states, *args, **kwargs)
        return fused.run(self, hidden_states, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PROJECTIONS:  # an adapter is put on or merged: the weights may be others
            getattr(self, _ATTRIBUTE).forget()
        super().__setattr__(name, value)


class _Fused:
    """How one module runs fused: its packed weights, made when they are first needed."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.forget()

    def forget(self) -> None:
        """Drops the copies of the weights."""
        self.state: list[tuple[int, int, torch.dtype]] | None = None
        self.made_from: list[Tensor] = []  # kept, so that nothing else can lie at its address
        self.qkv: PackedLinear | None = None
        self.output: PackedLinear | None = None
        self.norm: Tensor | None = None
        self.eps = 0.0

    def __deepcopy__(self, _: Any) -> _Fused:
        return _Fused(self.reading)  # a copied module packs its own weights

    def serves(self, module: Any, hidden: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether this call is one that runs fused."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or module.training:
            return False
        implementation = module.config._attn_implementation
        if implementation == "eager" or torch.is_autocast_enabled("cpu"):
            return False
        tables = kwargs.get("position_embeddings")
        if tables is None or not all(_is_table(x, hidden, module.head_dim) for x in tables):
            return False
        if hidden.dtype != module.q_proj.weight.dtype:
            return False
        owners = _owners(module, self.reading)
        if not all(map(_is_plain, owners)):
            return False
        weights = _weights(owners)
        state = [(x.data_ptr(), x._version, x.dtype) for x in weights]
        if state != self.state:
            if _unfit(module, self.reading) is not None:
                return False
            self._pack(module)
            self.state, self.made_from = state, [x.detach() for x in weights]
        return True

    def run(
        self,
        module: Any,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The module's forward; `hidden_states` `[B, L, hidden]`, the tables `[B|1, L, D]`."""
        assert self.qkv is not None
        assert self.output is not None
        size = module.head_dim
        # [B, heads of q, k and v, L, D]; each position's heads lie side by side.
        heads = self.qkv(hidden_states).view(*hidden_states.shape[:2], -1, size).transpose(1, 2)
        counts = [getattr(module, name).out_features // size for name in _PROJECTIONS[:3]]
        cpu.rotate_(heads[:, : counts[0] + counts[1]], *position_embeddings, self.norm, self.eps)
        q, k, v = torch.split(heads, counts, dim=1)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, module.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
        more = {name: get(module) for name, get in self.reading.arguments}
        out, weights = attend(module, q, k, v, attention_mask, dropout=0.0, **more, **kwargs)
        return self.output(out.flatten(2)), weights

    def _pack(self, module: Any) -> None:
        self.forget()
        projections = [getattr(module, name) for name in _PROJECTIONS]
        self.qkv, self.output = PackedLinear(projections[:3]), PackedLinear(projections[3:])
        if self.reading.has_norm:
            read = [read_norm(getattr(module, name)) for name in _NORMS]
            rows = []
            for known, projection in zip(read, projections[:2], strict=True):
                assert known is not None  # _unfit has seen it
                weight, self.eps = known
                rows.append(weight.expand(projection.out_features // module.head_dim, -1))
            self.norm = torch.cat(rows)


def _unfit(module: Any, reading: Reading) -> str | None:
    """Why this module, whose forward we understand, cannot run fused as it is now; or None."""
    projections = [getattr(module, name) for name in _PROJECTIONS]
    for projection in projections:
        if type(projection) is not nn.Linear or not _is_plain(projection):
            return f"a projection is not a plain nn.Linear, but {type(projection).__name__}"
        weight = projection.weight
        if weight.device.type != "cpu" or weight.dtype not in kernel.DTYPES:
            return f"a projection's weight is {weight.dtype} on {weight.device}"
        if weight.is_inference():
            return "a projection's weight was made in inference mode, where changes do not show"
    if len({x.weight.dtype for x in projections}) > 1:
        return "its projections differ in dtype"
    if len({x.bias is None for x in projections[:3]}) > 1:
        return "only some of q, k and v have a bias"
    if module.head_dim % 2 or module.head_dim > cpu.MAX_HEAD_SIZE:
        return f"heads of {module.head_dim} channels"
    if reading.has_norm:
        norms = [getattr(module, name) for name in _NORMS]
        read = [read_norm(norm) if _is_plain(norm) else None for norm in norms]
        if any(x is None for x in read):
            return f"its heads go through another norm: {type(norms[0]).__name__}"
        if len({eps for x in read if x is not None for eps in x[1:]}) > 1:
            return "the norms of q and k differ in eps"
    return None


def _is_plain(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward, and nothing else."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _owners(module: Any, reading: Reading) -> list[nn.Module]:
    names = _PROJECTIONS + (_NORMS if reading.has_norm else ())
    return [getattr(module, name) for name in names]


def _weights(owners: list[nn.Module]) -> list[Tensor]:
    found = [getattr(x, name, None) for x in owners for name in ("weight", "bias")]
    return [x for x in found if isinstance(x, Tensor)]


def _is_table(table: Tensor, hidden: Tensor, size: int) -> bool:
    """Whether `rotate_` takes it: cos or sin, `[B|1, L, D]`, for all of the heads' channels."""
    return (
        hidden.dim() == 3
        and table.dim() == 3
        and table.shape[0] in (1, hidden.shape[0])
        and table.shape[1:] == (hidden.shape[1], size)
        and table.dtype == hidden.dtype
        and table.stride(2) == 1
        and hidden.device.type == "cpu"
    )
