"""What the commands share: the app, its logging, and how results are printed."""

import json
import logging
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from planish.compiler.json_numbers import finite

__all__ = ["JsonFlag", "Output", "app", "plain_table"]

app = typer.Typer(
    name="planish",
    help="Compile LLaMA checkpoints to low-bit ONNX models and TensorRT engines, and run them.",
    no_args_is_help=True,
    # Rich would take defaults in brackets for its markup, and cut long names of options off.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]


class Output:
    """Where a command writes: people read stdout, unless programs do; then people read stderr."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._stream = sys.stderr if as_json else sys.stdout
        self._console = Console(file=self._stream, highlight=False, markup=False, soft_wrap=True)

    def line(self, text: str) -> None:
        """Print a line for people."""
        self._console.print(text)

    def show(self, table: Table) -> None:
        """Print a table for people, as wide as the terminal."""
        self._console.print(table, soft_wrap=False)

    def rows(self, rows: dict[str, Any]) -> None:
        """Print names and values in two columns for people."""
        width = max(map(len, rows))
        for name, value in rows.items():
            self.line(f"{name:<{width}}  {value}")

    def table(self, title: str, names: list[str], rows: list[list[str]]) -> None:
        """Print a table for people, as wide as it needs to be: a column for each name, numbers to the right."""
        table = Table(title=title, title_justify="left")
        for place, name in enumerate(names):
            table.add_column(name, justify="right" if place else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        wide = Console(file=self._stream, highlight=False, markup=False, width=None if self._stream.isatty() else 200)
        wide.print(table)

    def piece(self, text: str) -> None:
        """Print a piece of running text, at once."""
        print(text, end="", file=self._stream, flush=True)

    def result(self, content: dict[str, Any]) -> None:
        """Print `content` as one line of JSON, if that was asked for; NaN and infinity become null."""
        if self._as_json:
            # In ASCII it can be written in every encoding, whatever a model or a path holds.
            print(json.dumps(finite(content), allow_nan=False))


def plain_table(title: str, columns: Sequence[str]) -> Table:
    """Return a table without lines, to add rows to."""
    table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        # However narrow the terminal, what a row is about stays in one piece.
        table.add_column(name, overflow="fold", no_wrap=not table.columns)
    return table


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"planish {version('planish')}")
        raise typer.Exit


@app.callback()
def configure(
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Same as --log-level info.")] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "warning",
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Set up logging."""
    levels = logging.getLevelNamesMapping()
    if log_level.upper() not in levels:
        raise typer.BadParameter(f"'{log_level}' is not a level", param_hint="--log-level")
    logging.basicConfig(
        level=min(levels[log_level.upper()], logging.INFO if verbose else logging.CRITICAL),
        format="%(name)s: %(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False)],
    )
