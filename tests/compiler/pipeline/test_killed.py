"""A compile that was killed and is given again makes the bundle it would have made, and repeats nothing."""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from planish.compiler.bundle.bundle import Bundle
from tests.command import Run
from tests.killed import WATCHED, watch
from tests.tiny import write_tiny

ROOT = Path(__file__).parents[3]
LAYERS, SEQUENCES, EPOCHS = 3, 6, 3
#: Five sequences are fitted to, four and one at a time, and one is held out: polishing measures the start on it, every
#: epoch, and what it makes of the last steps.
BATCHES = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("killed") / "model", num_hidden_layers=LAYERS)


@pytest.fixture
def command(model: Path, text: Path) -> Callable[[Path], list[str]]:
    """Returns the arguments that compile to a folder."""
    few = ("--select", "fixed:affine", "--dataset", text, "--nsamples", SEQUENCES, "--seqlen", 32, "--polish", EPOCHS)
    return lambda out: [str(each) for each in ("compile", model, "--scheme", "w3a3k3v3", *few, "-o", out)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the watched functions were called in this process."""
    counted: Counter[str] = Counter()

    def note(name: str, _: int) -> None:
        counted[name] += 1

    watch(monkeypatch.setattr, note)
    return counted


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, bytes]:
    """The files of a bundle that nothing killed, once they are known."""
    return {}


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files that hold weights, transforms and graphs."""
    names = [name for name in Bundle.open(folder).manifest.files if "model.onnx" in name or "plan" in name]
    assert len(names) == 6
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize(
    ("where", "number", "left"),
    [
        # In the middle of writing what comes out of block 1: its codes are there, and are made again.
        ("run a block between streams", 3 * BATCHES + 2, (0, 2, 2 * 2 * BATCHES, 2 + EPOCHS * SEQUENCES)),
        # At block 2, before anything of it is there.
        ("flatten a block", 3, (0, 1, 2 * BATCHES, 2 + EPOCHS * SEQUENCES)),
        # In the middle of the second epoch of polishing; the first one is kept, and so is how far the model was before.
        ("loss of a polished sequence", 1 + SEQUENCES + 3, (0, 0, 0, 2 * SEQUENCES + 1)),
    ],
)
def test_goes_on(
    where: str,
    number: int,
    left: tuple[int, ...],
    run: Run,
    command: Callable[[Path], list[str]],
    calls: Counter[str],
    undisturbed: dict[str, bytes],
    tmp_path: Path,
) -> None:
    if not undisturbed:
        assert run(*command(tmp_path / "whole")).code == 0
        whole = (1, LAYERS, LAYERS * 2 * BATCHES, 2 + EPOCHS * SEQUENCES)
        assert tuple(calls[name] for name in WATCHED) == whole
        calls.clear()
        undisturbed |= contents(tmp_path / "whole")
    arguments = [sys.executable, "-m", "tests.killed", where, str(number), *command(tmp_path / "out")]
    killed = subprocess.run(arguments, cwd=ROOT, env=os.environ, check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out").exists()
    resumed = run(*command(tmp_path / "out"))
    assert (resumed.code, "resuming from" in resumed.err) == (0, True), resumed.err
    assert tuple(calls[name] for name in WATCHED) == left
    assert contents(tmp_path / "out") == undisturbed
