"""All time of a run is charged to a stage, its memory is that of the stage, and a killed run is not forgotten."""

import mmap
import sys
import time
from pathlib import Path

import pytest

from planish.compiler.pipeline import stages as module
from planish.compiler.pipeline.compile import compile_model
from planish.compiler.pipeline.stages import Stage, StageClock
from planish.compiler.progress import Silent

MEBIBYTE = 1 << 20


class Stopped(Silent):
    """Breaks off when a stage gets on."""

    def step(self, stage: str, done: int, total: int) -> None:
        if stage == "lower to ort":
            raise KeyboardInterrupt


def test_time_is_charged_to_the_stage_that_got_on() -> None:
    clock = StageClock(Silent(), [])
    time.sleep(0.12)
    clock.step("first", 1, 2)
    clock.step("first", 2, 2)
    time.sleep(0.05)
    clock.note("second")
    first, second = clock.stages
    assert (first["stage"], second["stage"]) == ("first", "second")
    assert 0.1 < first["seconds"] < 0.5
    assert 0.04 < second["seconds"] < 0.4


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets the peak of a process")
def test_memory_is_the_most_of_each_stage() -> None:
    clock = StageClock(Silent(), [])
    # Not by malloc, which may have as much at hand from what ran before.
    with mmap.mmap(-1, 200 * MEBIBYTE) as held:
        held.write(bytes([1]) * len(held))
    clock.note("large")
    clock.note("small")
    large, small = (each["peak_bytes"] for each in clock.stages)
    assert large > small + 150 * MEBIBYTE


def test_a_kernel_that_does_not_tell_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmRSS:\t1 kB\n")
    monkeypatch.setattr(module, "_STATUS", status)
    clock = StageClock(Silent(), [])
    clock.note("only")
    assert MEBIBYTE < clock.stages[0]["peak_bytes"] < 1 << 40


def test_it_goes_on_behind_a_killed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_INTERVAL", 0.0)
    kept: list[list[Stage]] = []
    before: list[Stage] = [{"stage": "flatten", "seconds": 100.0, "peak_bytes": 1 << 40}]
    clock = StageClock(Silent(), before, kept.append)
    clock.note("flatten")
    clock.note("plan")
    assert [each["stage"] for each in kept[-1]] == ["flatten", "plan"]
    assert 100 <= clock.stages[0]["seconds"] < 101
    assert clock.stages[0]["peak_bytes"] == 1 << 40


def test_a_compile_that_was_killed_counts(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_INTERVAL", 0.0)
    settings = {"scheme": "w4a8k8v8", "select": "none", "num_layers": 1}
    with pytest.raises(KeyboardInterrupt):
        compile_model(tiny, tmp_path / "out", progress=Stopped(), **settings)
    made = compile_model(tiny, tmp_path / "out", **settings)
    report = (made.path / "report" / "report.json").read_text()
    # What the second run found finished is there, with the time that the first one took.
    assert '"stage": "portable model"' in report
    assert '"stage": "verify"' in report
