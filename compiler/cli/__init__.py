"""The command line: a thin layer over the Python API, one command per file."""

import sys
from io import TextIOWrapper

from planish.compiler.cli.app import app
from planish.compiler.cli.bench import run_bench
from planish.compiler.cli.build import run_build
from planish.compiler.cli.compare import run_compare
from planish.compiler.cli.compile import run_compile
from planish.compiler.cli.doctor import run_doctor
from planish.compiler.cli.evaluate import run_eval
from planish.compiler.cli.export import run_export
from planish.compiler.cli.generate import run_generate
from planish.compiler.cli.inspect import run_inspect
from planish.compiler.cli.study import study_app
from planish.compiler.errors import PlanishError

__all__ = ["app", "main"]

# What each does in a line of `planish --help`, which cuts longer ones off.
app.command("compile", short_help="Compile a checkpoint to a bundle that runs.")(run_compile)
app.command("build", short_help="Add a target to a bundle without compiling again.")(run_build)
app.command("export", short_help="Export a checkpoint as a float32 ONNX model.")(run_export)
app.command("eval", short_help="Measure perplexity, divergence, and scores on tasks.")(run_eval)
app.command("compare", short_help="Measure models in one run, side by side.")(run_compare)
app.command("generate", short_help="Generate text with a bundle.")(run_generate)
app.command("bench", short_help="Measure the speed and memory of a bundle.")(run_bench)
app.command("inspect", short_help="Say what is in a bundle, or find outliers.")(run_inspect)
app.command("doctor", short_help="Say what this machine has, and what a compile takes.")(run_doctor)
app.add_typer(study_app, name="study", short_help="Measure what a choice of the compiler is worth.")


def main() -> None:
    """Run the command line; the exit code is that of the error, or 0."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A terminal that cannot show what a model writes shows a question mark.
            stream.reconfigure(errors="replace")
    try:
        app()
    except (PlanishError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, PlanishError) else PlanishError.exit_code)
