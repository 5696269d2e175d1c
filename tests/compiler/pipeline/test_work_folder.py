"""What a compile or an export refuses to write over or to throw away, and what it goes on with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.float_bundle import export_bundle
from planish.compiler.bundle.layout import engine_folder
from planish.compiler.errors import OutputFolderError
from planish.compiler.pipeline import compilation
from planish.compiler.pipeline.compile import compile_model
from planish.compiler.pipeline.work_folder import check_output

SETTINGS: dict[str, Any] = {"scheme": "w4a8k8v8", "select": "none", "num_layers": 1}


class Lowered:
    """Stands in for lowering: a file that says how, and a stop as by Ctrl-C at one of the targets."""

    def __init__(self) -> None:
        self.targets: list[str] = []
        self.stop_at = ""

    def __call__(self, target: str, portable: Path, folder: Path, recipe: Any, *rest: object) -> None:
        self.targets.append(target)
        folder.mkdir(parents=True)
        (folder / f"batch {recipe.max_batch_size}").write_text("an engine, or half of one")
        if target == self.stop_at:
            raise KeyboardInterrupt


def files(bundle: Bundle, target: str) -> list[str]:
    return [path.name for path in engine_folder(bundle.path, target).iterdir()]


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> Lowered:
    stub = Lowered()
    monkeypatch.setattr(compilation, "lower", stub)
    # The verification runs the model of the target ort, which is not made here.
    verify = compilation.verify
    monkeypatch.setattr(
        compilation,
        "verify",
        lambda checkpoint, scheme, codes, model, *rest: verify(
            checkpoint, scheme, codes, model if model.exists() else model.parents[2] / model.name, *rest
        ),
    )
    return stub


@pytest.fixture
def killed_compile(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a compile left that ended with its portable model made."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compilation, "lower", stop)
        with pytest.raises(KeyboardInterrupt):
            compile_model(tiny, tmp_path / "out", **SETTINGS)
    return tmp_path / "out.partial"


def test_an_export_keeps_the_work_of_a_compile(tiny: Path, tmp_path: Path, killed_compile: Path) -> None:
    with pytest.raises(OutputFolderError, match=r"unfinished work .* command compile, not export"):
        export_bundle(tiny, tmp_path / "out", num_layers=1)
    assert (killed_compile / "bundle" / "model.onnx.data").is_file()
    assert compile_model(tiny, tmp_path / "out", **SETTINGS).manifest.targets == ("ort",)


@pytest.mark.parametrize("make", [compile_model, export_bundle])
def test_the_current_folder(
    make: Callable[..., Bundle], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = SETTINGS if make is compile_model else {}
    for out in (".", tmp_path):
        with pytest.raises(OutputFolderError, match=r"is the current folder, .* such as /.*/bundle\.$"):
            make(tiny, out, **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(OutputFolderError, match=r"is a mount point, .* such as /.*/bundle\.$"):
        check_output(tmp_path)
    check_output(tmp_path / "bundle")


def test_corrected_settings_of_engines_go_on(tiny: Path, tmp_path: Path, lowered: Lowered) -> None:
    out, given = tmp_path / "out", {**SETTINGS, "targets": ["ort", "rtx", "tensorrt"], "tensorrt_version": "10.3"}
    lowered.stop_at = "tensorrt"
    for batch, again in ((1, ["ort", "rtx", "tensorrt"]), (1, ["tensorrt"]), (2, ["rtx", "tensorrt"])):
        lowered.targets.clear()
        with pytest.raises(KeyboardInterrupt):
            compile_model(tiny, out, **given, max_batch_size=batch)
        assert lowered.targets == again
    lowered.targets.clear()
    made = compile_model(tiny, out, **{**SETTINGS, "targets": ["ort", "rtx"]}, max_batch_size=2)
    assert lowered.targets == []
    assert made.manifest.targets == ("ort", "rtx")
    assert files(made, "rtx") == ["batch 2"]
    assert not engine_folder(made.path, "tensorrt").exists()


def test_an_engine_of_other_settings_is_forgotten_before_it_is_replaced(
    tiny: Path, tmp_path: Path, lowered: Lowered
) -> None:
    out, given = tmp_path / "out", {**SETTINGS, "targets": ["rtx", "tensorrt"], "tensorrt_version": "10.3"}
    for batch, stop in ((1, "tensorrt"), (2, "rtx"), (1, "tensorrt")):
        lowered.stop_at = stop
        lowered.targets.clear()
        with pytest.raises(KeyboardInterrupt):
            compile_model(tiny, out, **given, max_batch_size=batch)
    assert lowered.targets == ["rtx", "tensorrt"]
