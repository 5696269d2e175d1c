"""Tell how far a long run is: as bars on a terminal, as lines elsewhere, or not at all."""

import sys
import time
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichBars

__all__ = ["Bars", "Lines", "Progress", "Silent", "progress_for"]


class Progress(Protocol):
    """What a long run calls."""

    def step(self, stage: str, done: int, total: int) -> None:
        """Say that `done` of `total` parts of `stage` are finished."""

    def say(self, message: str) -> None:
        """Say something that is not progress but should be read."""


class Silent:
    """Says nothing; the default of the Python API."""

    def step(self, stage: str, done: int, total: int) -> None:
        """Do nothing."""

    def say(self, message: str) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Lines(Silent):
    """Writes one line when a stage is done, for logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._started: dict[str, float] = {}

    def step(self, stage: str, done: int, total: int) -> None:
        """Write a line if the stage is finished."""
        started = self._started.setdefault(stage, time.perf_counter())
        if done >= total:
            self.say(f"{stage}: {total}/{total} ({time.perf_counter() - started:.1f} s)")

    def say(self, message: str) -> None:
        """Write `message`."""
        print(message, file=self._stream, flush=True)


class Bars(Silent):
    """Draws one bar per stage."""

    def __init__(self, stream: TextIO) -> None:
        self._bars = RichBars(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(file=stream),
        )
        self._tasks: dict[str, TaskID] = {}

    def step(self, stage: str, done: int, total: int) -> None:
        """Move the bar of `stage`."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage)
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def say(self, message: str) -> None:
        """Write `message` above the bars."""
        self._bars.console.print(message, markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()


def progress_for(stream: TextIO = sys.stderr) -> Bars | Lines:
    """Return bars if `stream` is a terminal, else lines."""
    return Bars(stream) if stream.isatty() else Lines(stream)
