"""Settings of other tools, to and from ours.

`export` writes what ModelOpt, TensorRT-LLM, SGLang and vLLM take; `import_modelopt` and
`import_bsfa` read what ModelOpt and BSFA's authors write. Whatever the other side decides
differently is named in `notes`, never hidden.
"""

from hf_sparse_attention.interop.engines import ENGINES, Export, export
from hf_sparse_attention.interop.files import write_key, write_text
from hf_sparse_attention.interop.imports import Imported, import_bsfa, import_modelopt

__all__ = [
    "ENGINES",
    "Export",
    "Imported",
    "export",
    "import_bsfa",
    "import_modelopt",
    "write_key",
    "write_text",
]
