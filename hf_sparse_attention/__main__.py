"""`python -m hf_sparse_attention` is the command `hf-sparse-attention`."""

from hf_sparse_attention_cli.app import main

if __name__ == "__main__":
    main()
