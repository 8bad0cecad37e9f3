"""The command `hf-sparse-attention`.

It stands beside the package and not in it, because importing the package registers with
transformers, which takes seconds; `--help`, completion and a mistyped option shall not wait. Only a
command that runs imports `hf_sparse_attention`, inside its function.
"""
