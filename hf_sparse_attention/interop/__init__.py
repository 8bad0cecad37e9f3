"""Settings of other tools, to and from ours.

`export` writes what ModelOpt, TensorRT-LLM, SGLang and vLLM take. Whatever the other side decides
differently is named in `notes`, never hidden.
"""

from hf_sparse_attention.interop.engines import ENGINES, Export, export
from hf_sparse_attention.interop.files import write_key

__all__ = ["ENGINES", "Export", "export", "write_key"]
