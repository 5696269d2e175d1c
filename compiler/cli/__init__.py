"""The command line: a thin layer over the Python API, one command per file."""

import sys

from planish.compiler.cli.app import app
from planish.compiler.cli.bench import run_bench
from planish.compiler.cli.compile import run_compile
from planish.compiler.cli.doctor import run_doctor
from planish.compiler.cli.evaluate import run_eval
from planish.compiler.cli.export import run_export
from planish.compiler.cli.generate import run_generate
from planish.compiler.cli.inspect import run_inspect
from planish.compiler.errors import PlanishError

__all__ = ["app", "main"]

for _name, _command in {
    "compile": run_compile,
    "export": run_export,
    "eval": run_eval,
    "generate": run_generate,
    "bench": run_bench,
    "inspect": run_inspect,
    "doctor": run_doctor,
}.items():
    app.command(_name)(_command)


def main() -> None:
    """Run the command line; the exit code is that of the error, or 0."""
    try:
        app()
    except PlanishError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
