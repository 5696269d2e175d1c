"""How long each stage of a compile took, and the most memory it had meanwhile, over all runs that it took."""

import contextlib
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from planish.compiler.progress import Progress

__all__ = ["Stage", "StageClock"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
#: Makes the kernel forget the largest resident memory so far; see proc_pid_clear_refs(5).
_FORGET_PEAK = "5"
#: Seconds between two writes of what is noted, while a stage goes on.
_INTERVAL = 1.0


class Stage(TypedDict):
    """What is noted of a stage: its name, seconds, and the most bytes resident meanwhile."""

    stage: str
    seconds: float
    peak_bytes: int


class StageClock:
    """Passes on the progress of a run, and charges the time since the last note to the stage that has got on.

    So all time of a run is charged to some stage: what comes in front of the first step of a stage is its preparation.
    """

    def __init__(
        self, progress: Progress, noted: list[Stage], keep: Callable[[list[Stage]], None] = lambda _: None
    ) -> None:
        """Go on behind what was `noted` by a run that was killed; `keep` is given all that is noted, now and then."""
        self._progress, self._keep = progress, keep
        self._stages = {each["stage"]: each for each in noted}
        self._last = self._kept = time.perf_counter()
        _peak_since_last()

    @property
    def stages(self) -> list[Stage]:
        """What is noted so far, in the order in which stages began, seconds rounded to hundredths."""
        return [{**each, "seconds": round(each["seconds"], 2)} for each in self._stages.values()]

    def step(self, stage: str, done: int, total: int) -> None:
        """Note that `stage` got on, and pass it on."""
        self.note(stage)
        self._progress.step(stage, done, total)

    def say(self, message: str) -> None:
        """Pass a message on."""
        self._progress.say(message)

    def note(self, stage: str) -> None:
        """Charge the time and the memory since the last note to `stage`."""
        now = time.perf_counter()
        entry = self._stages.setdefault(stage, {"stage": stage, "seconds": 0.0, "peak_bytes": 0})
        entry["seconds"] += now - self._last
        entry["peak_bytes"] = max(entry["peak_bytes"], _peak_since_last())
        self._last = now
        if now - self._kept >= _INTERVAL:
            self._kept = now
            self._keep(list(self._stages.values()))


def _peak_since_last() -> int:
    """Return the most bytes that were resident since the last call; since the process began where nothing forgets."""
    fields = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines())
    if "VmHWM" not in fields:
        # Some kernels, such as those of sandboxes, do not tell it there.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with contextlib.suppress(OSError):
        _CLEAR.write_text(_FORGET_PEAK, encoding="ascii")
    return int(fields["VmHWM"].split()[0]) * 1024
