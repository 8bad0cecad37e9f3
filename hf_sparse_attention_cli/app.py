"""The application: its commands, and how they end.

Exit codes: 0 done; 1 refused, with one line on stderr that says what was expected and what was got;
2 wrong usage. What is asked for goes to stdout; progress, warnings and errors go to stderr.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hf_sparse_attention_cli import benchmark, calibrate, evaluate, inspect, push, transfer

#: What bad input, missing files, a Hub that refuses and a missing optional package raise.
REFUSALS = (ValueError, OSError, ImportError)


class Commands(TyperGroup):
    """Turns a refusal into one line and exit code 1; a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader has seen enough; click ends quietly
        except REFUSALS as error:
            if ctx.params.get("traceback"):
                raise
            message = " ".join(str(error).split()) or type(error).__name__
            typer.echo(f"error: {message}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)


@app.callback(
    epilog="Exit codes: 0 done; 1 refused, one line on stderr says why; 2 wrong usage. "
    "With --json a command prints one JSON object on stdout and nothing else there."
)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    traceback: Annotated[  # noqa: ARG001 - read by Commands.invoke
        bool, typer.Option("--traceback", help="Show where an error comes from.")
    ] = False,
) -> None:
    """Block-skipping attention for transformers: calibrate a model, evaluate it, hand it on.

    Start with `hf-sparse-attention calibrate org/model --out calibrated --with-model`; then
    `from_pretrained("calibrated", attn_implementation="blasst")` runs it.
    """
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("hf-sparse-attention"))
        raise typer.Exit


def _command(function: Any, name: str, *examples: str) -> None:
    # "\b" keeps click from joining the lines; two spaces make a line break in markdown.
    epilog = "Examples:\n\n" + "\n\n".join(f"`{example}`" for example in examples)
    app.command(name, epilog=epilog, no_args_is_help=True)(function)


_command(
    calibrate.calibrate,
    "calibrate",
    "hf-sparse-attention calibrate org/model --out calibrated --with-model --report",
    "hf-sparse-attention calibrate org/model --out calibrated --max-kl prefill=0.01,decode=0.005",
    "hf-sparse-attention calibrate org/model --out calibrated --push me/model-sparse --private",
    "hf-sparse-attention calibrate path/to/model --out settings --data notes/ --lengths 2048,8192",
    "hf-sparse-attention calibrate model.gguf --out calibrated --target-sparsity 0.5,0.3,0.7",
)
_command(
    evaluate.evaluate,
    "evaluate",
    "hf-sparse-attention evaluate org/model --out evaluated --report evaluated/report.html",
    "hf-sparse-attention evaluate org/model --out evaluated --tasks niah_single_1,vt --samples 50",
    "hf-sparse-attention evaluate calibrated --out evaluated --settings blasst:0.5,blasst:0.5:head",
    "hf-sparse-attention evaluate org/model --out evaluated --resume",
)
_command(
    benchmark.benchmark,
    "benchmark",
    "hf-sparse-attention benchmark org/model --lengths 1024,4096,16384",
    "hf-sparse-attention benchmark calibrated --settings blasst:0.5,blasst:0.7 --out speed.json",
)
_command(
    inspect.inspect,
    "inspect",
    "hf-sparse-attention inspect calibrated",
    "hf-sparse-attention inspect org/model --revision v1 --json | jq .fits",
)
_command(
    push.push,
    "push",
    "hf-sparse-attention push calibrated org/model",
    "hf-sparse-attention push calibrated org/model --with-model --private",
    "hf-sparse-attention push calibrated org/model --evaluation evaluated",
)
_command(
    transfer.export,
    "export",
    "hf-sparse-attention export calibrated --to tensorrt-llm --out config.yml",
    "hf-sparse-attention export org/model --to modelopt --out path/to/checkpoint",
    'eval "$(hf-sparse-attention export org/model --to sglang --target-sparsity 0.5)"',
)
_command(
    transfer.import_,
    "import",
    "hf-sparse-attention import path/to/modelopt-checkpoint --out settings --geometry 64x64",
    "hf-sparse-attention import llama.inference.pt --out settings",
)


def main() -> None:
    """The console script."""
    app(prog_name="hf-sparse-attention")
