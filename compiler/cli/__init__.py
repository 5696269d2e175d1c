"""The command line: a thin layer over the Python API, one command per file."""

import sys

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

# In the list of commands a line is cut off behind what 80 columns hold: these are short enough.
app.command("compile")(run_compile)
app.command("build", short_help="Lower a bundle to a further target, or anew.")(run_build)
app.command("export", short_help="Export a checkpoint in float32, for plain ONNX Runtime.")(run_export)
app.command("eval", short_help="Measure perplexity, divergence, and scores on tasks.")(run_eval)
app.command("compare", short_help="Measure models in one run, and show them side by side.")(run_compare)
app.command("generate")(run_generate)
app.command("bench", short_help="Measure prefill, decode and resident memory.")(run_bench)
app.command("inspect", short_help="Say what is in a bundle, or what is loud in a checkpoint.")(run_inspect)
app.command("doctor", short_help="Say what this machine has and lacks, and what a compile takes.")(run_doctor)
app.add_typer(study_app, name="study")


def main() -> None:
    """Run the command line; the exit code is that of the error, or 0."""
    try:
        app()
    except PlanishError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
