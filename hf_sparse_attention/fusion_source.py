"""Whether an attention module's forward is one that `fusion.py` can stand in for: by its source.

A forward is understood if each of its statements is one we know, comments and types aside. So what
a model adds to the usual (a gate, a clamp, a norm elsewhere, layers without rotation) is noticed,
in versions of transformers that don't exist yet, too.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

_PROJECTION = "self.{x}_proj(hidden_states).view(hidden_shape)"
_NAMES = {"q": "query_states", "k": "key_states", "v": "value_states"}
_ATTENTION = "attn_output, attn_weights = attention_interface"
_CACHE_UPDATE = (
    "if past_key_values is not None:\n    key_states, value_states = "
    "past_key_values.update(key_states, value_states, self.layer_idx)"
)
_CHOICE = (
    "attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface("
    "self.config._attn_implementation, eager_attention_forward)"
)

#: What every forward must do.
_NEEDED = frozenset(
    {
        "input_shape = hidden_states.shape[:-1]",
        "hidden_shape = (*input_shape, -1, self.head_dim)",
        f"value_states = {_PROJECTION.format(x='v')}.transpose(1, 2)",
        "cos, sin = position_embeddings",
        "query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)",
        _CACHE_UPDATE,
        _CHOICE,
        "attn_output = attn_output.reshape(*input_shape, -1).contiguous()",
        "attn_output = self.o_proj(attn_output)",
        "return (attn_output, attn_weights)",
    }
)
#: How it makes q and k: without a norm, and with one in either of two spellings.
_PLAIN = frozenset(f"{_NAMES[x]} = {_PROJECTION.format(x=x)}.transpose(1, 2)" for x in "qk")
_NORMED = (
    frozenset(
        f"{_NAMES[x]} = self.{x}_norm({_PROJECTION.format(x=x)}).transpose(1, 2)" for x in "qk"
    ),
    _PLAIN | {f"{_NAMES[x]} = self.{x}_norm({_NAMES[x]})" for x in "qk"},
)
#: What it passes to the attention function, and how we get the same.
_ARGUMENTS: dict[str, tuple[str, Callable[[Any], Any]] | None] = {
    "dropout=0.0 if not self.training else self.attention_dropout": None,  # only in training
    "dropout=self.attention_dropout if self.training else 0.0": None,
    "scaling=self.scaling": ("scaling", attrgetter("scaling")),
    "sliding_window=self.sliding_window": ("sliding_window", attrgetter("sliding_window")),
    "sliding_window=getattr(self.config, 'sliding_window', None)": (
        "sliding_window",
        lambda module: getattr(module.config, "sliding_window", None),
    ),
    "softcap=self.attn_logit_softcapping": ("softcap", attrgetter("attn_logit_softcapping")),
    "**kwargs": None,
}
_ROTARY = (
    "def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):\n"
    "cos = cos.unsqueeze(unsqueeze_dim)\n"
    "sin = sin.unsqueeze(unsqueeze_dim)\n"
    "q_embed = q * cos + rotate_half(q) * sin\n"
    "k_embed = k * cos + rotate_half(k) * sin\n"
    "return (q_embed, k_embed)"
)
_ROTATE_HALF = (
    "def rotate_half(x):\n"
    "x1 = x[..., :x.shape[-1] // 2]\n"
    "x2 = x[..., x.shape[-1] // 2:]\n"
    "return torch.cat((-x2, x1), dim=-1)"
)
_NORM_PLAIN = (
    "def forward(self, hidden_states):\n"
    "input_dtype = hidden_states.dtype\n"
    "hidden_states = hidden_states.to(torch.float32)\n"
    "variance = hidden_states.pow(2).mean(-1, keepdim=True)\n"
    "hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)\n"
    "return self.weight * hidden_states.to(input_dtype)"
)
_NORM_SHIFTED = (
    "def forward(self, x):\n"
    "output = self._norm(x.float())\n"
    "output = output * (1.0 + self.weight.float())\n"
    "return output.type_as(x)\n"
    "def _norm(self, x):\n"
    "return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)"
)


@dataclass(frozen=True)
class Reading:
    """What is known of an attention class.

    Args:
        has_norm: q and k go through `q_norm` and `k_norm` before they are rotated.
        arguments: what the attention function gets besides, by keyword, from the module.
    """

    has_norm: bool
    arguments: tuple[tuple[str, Callable[[Any], Any]], ...]


@functools.cache
def read_forward(kind: type[nn.Module]) -> Reading | str:
    """What the forward of an attention class does, or why we do not understand it."""
    home = sys.modules.get(kind.__module__)
    try:
        function = _tree(kind.forward)
        rotary = [_text(getattr(home, name)) for name in ("apply_rotary_pos_emb", "rotate_half")]
    except (OSError, TypeError, AttributeError):
        return "it rotates q and k otherwise, or its source is not to be had"
    if rotary != [_ROTARY, _ROTATE_HALF]:
        return "it rotates q and k otherwise"
    statements = [ast.unparse(x) for x in function.body if not _is_docstring(x)]
    calls = [x for x in statements if x.startswith(_ATTENTION)]
    done = frozenset(statements) - set(calls)
    normed = next((form for form in _NORMED if done == _NEEDED | form), None)
    if normed is None and done != _NEEDED | _PLAIN:
        unknown = sorted(done - _NEEDED - _PLAIN) or sorted(_NEEDED - done)
        return f"its forward is another one: {unknown[0] if unknown else 'q or k is missing'}"
    if len(calls) != 1 or len(statements) != len(done) + 1:
        return "its forward does something twice"
    arguments = _arguments_of(calls[0])
    return arguments if isinstance(arguments, str) else Reading(normed is not None, arguments)


def read_norm(norm: nn.Module) -> tuple[Tensor, float] | None:
    """The weight, float32 `[D]`, and eps of an RMSNorm; None if it is not one we know."""
    kind: Any = type(norm)
    form = _norm_form(kind)
    weight: Any = norm.weight if form else None
    if form == _NORM_PLAIN:
        return weight.detach().float(), float(norm.variance_epsilon)  # type: ignore[arg-type]
    if form == _NORM_SHIFTED:
        return weight.detach().float() + 1.0, float(norm.eps)  # type: ignore[arg-type]
    return None


@functools.cache
def _norm_form(kind: type[nn.Module]) -> str | None:
    try:
        text = _text(kind.forward)
        if hasattr(kind, "_norm"):
            text += "\n" + _text(kind._norm)
    except (OSError, TypeError):
        return None
    return text if text in (_NORM_PLAIN, _NORM_SHIFTED) else None


def _arguments_of(statement: str) -> tuple[tuple[str, Callable[[Any], Any]], ...] | str:
    call = ast.parse(statement).body[0].value  # type: ignore[attr-defined]
    given = [ast.unparse(x) for x in call.args]
    if given != ["self", "query_states", "key_states", "value_states", "attention_mask"]:
        return f"it calls the attention function with {', '.join(given)}"
    keywords = [ast.unparse(x) for x in call.keywords]
    unknown = [x for x in keywords if x not in _ARGUMENTS]
    if unknown:
        return f"it calls the attention function with {unknown[0]}"
    return tuple(known for x in keywords if (known := _ARGUMENTS[x]) is not None)


def _tree(function: Any) -> ast.FunctionDef:
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    tree = ast.parse(source).body[0]
    if not isinstance(tree, ast.FunctionDef):
        raise TypeError(f"expected a function, got {type(tree).__name__}")
    return tree


def _text(function: Any) -> str:
    """The function without types, decorators and docstring, a line a statement."""
    tree = _tree(function)
    for argument in tree.args.args:
        argument.annotation = None
    head = f"def {tree.name}({ast.unparse(tree.args)}):"
    return "\n".join([head, *(ast.unparse(x) for x in tree.body if not _is_docstring(x))])


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
