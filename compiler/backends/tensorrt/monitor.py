"""TensorRT's nested phases as one percentage."""

import dataclasses
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

__all__ = ["ProgressTree", "make_monitor"]


@dataclasses.dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class ProgressTree:
    """Adds up phases: a phase is as far as its finished steps and its running children say.

    A phase of n steps gives each step 1/n of itself; a child fills the step of its parent that is under way.
    """

    def __init__(self, report: Callable[[int], None]) -> None:
        self._report = report
        self._phases: dict[str, _Phase] = {}
        self._percent = 0
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Begin a phase."""
        with self._lock:
            self._phases[name] = _Phase(parent, max(steps, 1))

    def step(self, name: str, step: int) -> None:
        """Finish step number `step`, from 0, of a phase."""
        with self._lock:
            phase = self._phases.get(name)
            if phase is None:
                return
            phase.done = min(max(phase.done, step + 1), phase.steps)
            self._tell()

    def finish(self, name: str) -> None:
        """End a phase."""
        with self._lock:
            phase = self._phases.pop(name, None)
            if phase is not None and phase.parent is None:
                self._percent = 100
                self._report(100)

    def _tell(self) -> None:
        roots = [name for name, phase in self._phases.items() if phase.parent is None]
        percent = int(100 * max((self._share(name) for name in roots), default=0))
        # A child that ends before its parent counts the step would turn the bar back.
        if percent > self._percent:
            self._percent = percent
            self._report(percent)

    def _share(self, name: str) -> float:
        phase = self._phases[name]
        children = [child for child, other in self._phases.items() if other.parent == name]
        under_way = max((self._share(child) for child in children), default=0.0)
        return min(1.0, (phase.done + under_way) / phase.steps)


def make_monitor(trt: ModuleType, tree: ProgressTree) -> Any:
    """Return an IProgressMonitor of package `trt` that feeds `tree`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            tree.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            tree.step(phase_name, step)
            return True

        def phase_finish(self, phase_name: str) -> None:
            tree.finish(phase_name)

    return Monitor()
