"""The prompt of a benchmark fits into the context of the models that are measured; what a process ends in is told."""

import shutil
import subprocess
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.compare import comparison
from planish.compiler.errors import (
    DeviceError,
    DiskFullError,
    EngineLimitError,
    EngineMismatchError,
    NotPlanishModelError,
    PlanishError,
    TextError,
)
from planish.compiler.export import float_model
from planish.compiler.measure import bench_worker
from planish.compiler.measure.bench import bench, measure_sides, prompt_length
from planish.compiler.measure.texts import text_file
from planish.compiler.progress import Silent
from planish.compiler.runtime.runnable import Runnable
from planish.compiler.runtime.session import Session

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("context", "asked", "tokens"), [(8192, None, 512), (546, None, 512), (545, None, 511), (35, None, 1), (256, 9, 9)]
)
def test_what_fits(context: int, asked: int | None, tokens: int) -> None:
    assert prompt_length(context, asked=asked) == tokens


@pytest.mark.parametrize(
    ("context", "asked", "remedy"),
    [
        (256, 223, "1 to 222 tokens"),
        (256, 0, "1 to 222 tokens"),
        (34, None, "be timed"),
        (8, None, "be timed"),
    ],
)
def test_what_does_not_fit(context: int, asked: int | None, remedy: str) -> None:
    with pytest.raises(TextError, match=f"context of {context}.*{remedy}"):
        prompt_length(context, asked=asked)


def test_a_comparison_stays_within_the_shortest_context(
    bundle: Bundle, float_bundle: Bundle, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def measured(models: Any, *, tokens: int, **_: Any) -> dict[str, Any]:
        asked.append(tokens)
        return {}

    monkeypatch.setattr(comparison, "measure_sides", measured)
    models = [str(bundle.path), str(float_bundle.path)]
    comparison.compare_models(models, [text_file(text)], Silent(), seqlen=32, windows=1, divergence=False)
    assert asked == [bundle.manifest.max_context - 34] == [222]


def test_what_is_run_stays_within_the_context(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    class Watched(Session):
        def run(self, *arguments: Any, **options: Any) -> Any:
            logits, cache = super().run(*arguments, **options)
            lengths.append(len(cache))
            return logits, cache

    monkeypatch.setattr(Runnable, "load", lambda runnable, threads: Watched(runnable.model, threads))
    tokens = prompt_length(64, 5)
    bench_worker.main(bundle.runnable(), 1, tokens, 5)
    # All of the context is used, and no more.
    assert max(lengths) == 64


def test_a_disk_without_room_for_the_float_model(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 20, 1 << 20, 0))
        with pytest.raises(DiskFullError, match="set TMPDIR"):
            bench(bundle, tokens=16, repeats=1)

    def cut_short(*_: Any, **__: Any) -> None:
        raise OSError("1048576 requested and 503808 written")

    monkeypatch.setattr(float_model, "save_model", cut_short)
    with pytest.raises(DiskFullError, match="set TMPDIR"):
        bench(bundle, tokens=16, repeats=1)


def test_the_error_of_a_process_is_raised(tmp_path: Path) -> None:
    side = Runnable(tmp_path / "gone.onnx")
    with pytest.raises(NotPlanishModelError, match=r"gone\.onnx could not be measured: ONNX Runtime cannot load"):
        measure_sides({"gone": side}, repeats=1)


@pytest.mark.parametrize(
    ("code", "error"),
    [(22, EngineMismatchError), (28, DeviceError), (33, EngineLimitError), (1, PlanishError)],
)
def test_exit_codes_are_passed_on(code: int, error: type[PlanishError], monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.CompletedProcess([], code, "", "warning\nno room\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(PlanishError, match=r"could not be measured: no room$") as raised:
        measure_sides({"model": Runnable(Path("model.onnx"))}, repeats=1)
    assert (type(raised.value), raised.value.exit_code) == (error, code)


def test_a_process_that_the_system_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -9, "", ""))
    with pytest.raises(PlanishError, match=r"could not be measured: SIGKILL ended .* memory was too small"):
        measure_sides({"model": Runnable(Path("model.onnx"))}, repeats=1)
