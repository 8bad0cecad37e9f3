"""lm-evaluation-harness on sparse attention: `python -m hf_sparse_attention.evaluation.lm_eval`.

It takes what `lm_eval` takes. The harness hands `attn_implementation` in `--model_args` on to
`from_pretrained`, but has no hook by which a package could register anything before: so this
imports ours, and then runs it.
"""

from __future__ import annotations

import hf_sparse_attention  # noqa: F401 - registers "blasst" and "bsfa"


def main() -> None:
    """Runs the harness's own command line.

    Raises:
        ImportError: the harness is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ImportError(
            "lm_eval: expected the package lm-eval, found none or a part of it; "
            f"pip install 'hf-sparse-attention[lm-eval]' ({error})"
        ) from error
    cli_evaluate()


if __name__ == "__main__":
    main()
