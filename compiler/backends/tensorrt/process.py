"""Run the building process and turn the ways it can end into results and errors."""

import contextlib
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from typing import IO

from pydantic import ValidationError

from planish.compiler.backends.tensorrt.flavour import flavour_of
from planish.compiler.backends.tensorrt.job import Built, Failed, Job, Log, Message, Progressed
from planish.compiler.errors import EngineBuildError
from planish.compiler.progress import Progress

__all__ = ["WORKER", "run_job"]

#: The module that builds.
WORKER = "planish.compiler.backends.tensorrt.worker"
#: Lines of log that an error message repeats.
_LAST_LINES = 12


def run_job(job: Job, progress: Progress) -> Built:
    """Build the engine of `job` in a process of its own.

    Raises:
        EngineBuildError: if the build fails, or the process dies; the message holds the end of TensorRT's log.
    """
    stage = f"build {job.flavour} engine"
    log: deque[str] = deque(maxlen=_LAST_LINES)
    command = [sys.executable, "-P", "-m", WORKER]
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            result = _converse(process, job, log, lambda percent: progress.step(stage, percent, 100))
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        if isinstance(result, Built) and code == 0:
            return result
        if isinstance(result, Failed):
            raise EngineBuildError(_with_log(f"The engine was not built. {result.text}", log))
        stderr.seek(0)
        log.extend(line.rstrip() for line in stderr)
        raise EngineBuildError(_with_log(f"{flavour_of(job.flavour).title} {_ended(code)} while building.", log))


def _converse(
    process: "subprocess.Popen[str]", job: Job, log: deque[str], tell: Callable[[int], None]
) -> Built | Failed | None:
    """Send the job and read messages until the process closes its output; return the last word, if it spoke one."""
    result: Built | Failed | None = None
    stdin, stdout = _pipes(process)
    # A worker that is dead already says why when its end is looked at.
    with contextlib.suppress(BrokenPipeError), stdin:
        stdin.write(job.model_dump_json())
    for line in stdout:
        try:
            message = Message.model_validate_json(line).message
        except ValidationError:
            log.append(line.rstrip())
            continue
        if isinstance(message, Progressed):
            tell(message.percent)
        elif isinstance(message, Log):
            log.append(message.text)
        else:
            result = message
    return result


def _pipes(process: "subprocess.Popen[str]") -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with status {code}"
    return f"was ended by {signal.Signals(-code).name}"


def _with_log(message: str, log: deque[str]) -> str:
    return message + "".join(f"\n  {line}" for line in log)
