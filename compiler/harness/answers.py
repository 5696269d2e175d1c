"""Answers to requests, kept in a file as they come, so that a killed evaluation goes on behind the last of them."""

import fcntl
import hashlib
import json
from pathlib import Path
from typing import IO, Any, Self

from planish.compiler.errors import OutputFolderError

__all__ = ["Answers"]


class Answers:
    """A file of answers, one a line, that belongs to one model run in one way.

    Example:
        >>> with Answers.hold(folder, {"model": "ab12", "code": "cd34"}) as answers:  # doctest: +SKIP
        ...     answers.keep({"request": [-3.5, True]})
    """

    def __init__(self, file: IO[bytes], known: dict[str, Any]) -> None:
        """Use `Answers.hold`, which opens the file."""
        self._file, self._known = file, known

    @classmethod
    def hold(cls, folder: Path, settings: dict[str, str]) -> Self:
        """Open the file in `folder` of an evaluation with these settings, or begin one, and keep others from it.

        A line that a killed run left incomplete is dropped.

        Raises:
            OutputFolderError: if the file cannot be written, or another evaluation with these settings is running.
        """
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        path = folder / f"{digest[:32]}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b")
        except OSError as error:
            raise OutputFolderError(
                f"Answers are kept in {folder}, which cannot be written ({error.strerror}). Name a folder by --answers."
            ) from error
        try:
            # The lock ends when the file is closed, and so with the process, however that ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise OutputFolderError(
                f"Another evaluation of the same model writes {path}. Wait for it, or name another folder by --answers."
            ) from error
        return cls(file, _read(file))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def get(self, request: str) -> Any:
        """Return the answer to a request, or None if there is none yet."""
        return self._known.get(_key(request))

    def keep(self, answers: dict[str, Any]) -> None:
        """Write answers, request -> what JSON can hold; they survive whatever ends the process behind this call."""
        for request, answer in answers.items():
            self._known[_key(request)] = answer
            self._file.write(json.dumps([_key(request), answer]).encode() + b"\n")
        self._file.flush()


def _read(file: IO[bytes]) -> dict[str, Any]:
    """Read what is whole, and cut off the rest."""
    known, whole = {}, 0
    file.seek(0)
    for line in file.read().splitlines(keepends=True):
        try:
            key, answer = json.loads(line)
        except (TypeError, ValueError):
            break
        if not line.endswith(b"\n"):
            break
        known[key] = answer
        whole += len(line)
    file.truncate(whole)
    return known


def _key(request: str) -> str:
    return hashlib.sha256(request.encode()).hexdigest()[:32]
