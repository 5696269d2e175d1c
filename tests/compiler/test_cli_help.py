"""The help of every command says all that was written for it, on narrow terminals and on wide ones."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from planish.compiler.cli import app
from tests.command import Run


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command and the words that call it."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), typer.main.get_command(app))]
    while waiting:
        words, command = waiting.pop()
        yield words, command
        waiting += [((*words, name), each) for name, each in getattr(command, "commands", {}).items()]


COMMANDS = dict(commands())


def run_together(text: str) -> str:
    """Return a text without spaces and ends of lines, which wrapping puts where it likes."""
    return "".join(text.split())


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words) or "planish")
def test_nothing_is_lost(run: Run, monkeypatch: pytest.MonkeyPatch, columns: int, words: tuple[str, ...]) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    done = run(*words, "--help")
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= columns
    said, command = run_together(done.out), COMMANDS[words]
    assert run_together(command.help) in said
    for parameter in command.params:
        assert parameter.help, parameter.name
        assert run_together(parameter.help) in said
        for name in (*parameter.opts, *parameter.secondary_opts):
            assert name in done.out or not name.startswith("-")
    # Nor is a command cut off in the list of them.
    assert not re.search(r"^  .*\.\.\.$", done.out, re.MULTILINE)


def test_there_are_brackets_to_lose() -> None:
    helps = [parameter.help for command in COMMANDS.values() for parameter in command.params]
    assert sum(any(word in each for word in ("[auto]", "[self]", "[:BUDGET]")) for each in helps) >= 4
