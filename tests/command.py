"""How a command of the command line ended."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

__all__ = ["Result", "Run"]


@dataclasses.dataclass
class Result:
    """Exit code, and what was written to stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one line of stdout."""
        (line,) = self.out.splitlines()
        content: dict[str, Any] = json.loads(line)
        return content


Run = Callable[..., Result]
