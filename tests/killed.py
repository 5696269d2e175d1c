"""The command line, killed like by a power cut: `python -m tests.killed FUNCTION N ARGUMENTS...`.

The process ends by SIGKILL when the function, one of `WATCHED`, is called for the Nth time.
"""

import functools
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from planish.compiler.cli import main
from planish.compiler.learn import flattening
from planish.compiler.learn.polish import low_bit_model
from planish.compiler.pipeline import flatten

__all__ = ["WATCHED", "watch"]

#: By a name: whose function it is, and what it is called there.
WATCHED: dict[str, tuple[Any, str]] = {
    "calibrate": (flatten, "calibration_tokens"),
    "flatten a block": (flattening, "flatten_block"),
    "run a block between streams": (flattening, "run_block"),
    "loss of a polished sequence": (low_bit_model.LowBitModel, "loss"),
}


def watch(replace: Callable[[Any, str, Any], None], called: Callable[[str, int], None]) -> None:
    """Have `called` told before each call of a watched function, with its name and how many calls there were.

    `replace` sets an attribute, like setattr.
    """
    calls: Counter[str] = Counter()

    def told(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            called(name, calls[name])
            return function(*args, **kwargs)

        return call

    for name, (owner, attribute) in WATCHED.items():
        replace(owner, attribute, told(name, getattr(owner, attribute)))


if __name__ == "__main__":
    deadly = sys.argv[1], int(sys.argv[2])

    def kill(*call: Any) -> None:
        if call == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    watch(setattr, kill)
    sys.argv = ["planish", *sys.argv[3:]]
    main()
