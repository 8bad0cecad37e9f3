"""The methods, one module each.

To add one: a subclass of `Method`, and its entry here and in `config.METHOD_NAMES`.
"""

from __future__ import annotations

from hf_sparse_attention.methods.base import Method
from hf_sparse_attention.methods.blasst import DEFAULT_MAX_DROPPED_MASS, Blasst
from hf_sparse_attention.methods.bsfa import Bsfa

METHODS: dict[str, Method] = {method.name: method for method in (Blasst(), Bsfa())}

__all__ = ["DEFAULT_MAX_DROPPED_MASS", "METHODS", "Method"]
