"""A further target for a compiled bundle: whole or not at all, with the files a compile would have made."""

import errno
import fcntl
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from planish.compiler.backends import ort
from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.layout import RECIPE_FILE
from planish.compiler.errors import (
    BundleCorruptError,
    EngineBuildError,
    MissingExtraError,
    OutputFolderError,
    RecipeError,
)
from planish.compiler.pipeline import build as module
from planish.compiler.pipeline.build import build_target
from planish.compiler.pipeline.compile import compile_model
from tests.command import Run


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    """A bundle to change."""
    return shutil.copytree(bundle.path, tmp_path / "bundle")


def files(path: Path) -> list[str]:
    return sorted(each.relative_to(path).as_posix() for each in path.rglob("*"))


def test_an_engine_for_a_compiled_bundle(copy: Path, tiny: Path, tmp_path: Path) -> None:
    limits = {"max_context": 32, "max_batch_size": 1, "max_input_len": 8, "sms": (89,)}
    built = build_target(copy, "rtx", **limits)  # type: ignore[arg-type]
    assert built.manifest.targets == ("ort", "rtx")
    built.manifest.verify(copy)
    expected = compile_model(
        tiny,
        tmp_path / "at_once",
        scheme="w4a8k8v8",
        select="none",
        targets=("ort", "rtx"),
        **limits,  # type: ignore[arg-type]
    )
    assert files(copy) == files(expected.path)
    record = json.loads((copy / "engines" / "rtx" / "engine.json").read_text())
    # For one sequence and short prompts an engine is built for two: see build_engines.
    assert (record["sms"], record["max_batch"], record["max_context"]) == ([89], 2, 32)
    assert record["onnx"] == json.loads((expected.path / "engines/rtx/engine.json").read_text())["onnx"]
    assert json.loads((copy / "report" / "report.json").read_text())["engines"]["rtx"] == record
    # Other limits leave its context, and what an engine of another target takes leaves them all.
    build_target(copy, "rtx", max_batch_size=4, max_input_len=16)
    build_target(copy, "tensorrt", tensorrt_version="10.3", max_context=64, max_batch_size=1)
    build_target(copy, "rtx")
    record = json.loads((copy / "engines" / "rtx" / "engine.json").read_text())
    assert (record["sms"], record["max_batch"], record["max_prompt"], record["max_context"]) == ([89], 4, 16, 32)


def test_the_recipe_goes_on_making_the_same_model(
    copy: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is built is not asked here, only what the recipe says afterwards.
    monkeypatch.setattr(module, "lower", lambda *_: None)
    before = yaml.safe_load((copy / RECIPE_FILE).read_text())
    build_target(copy, "tensorrt", tensorrt_version="10.3", max_context=32, max_batch_size=2)
    added = {"targets": ["ort", "tensorrt"], "tensorrt_version": "10.3"}
    assert yaml.safe_load((copy / RECIPE_FILE).read_text()) == {**before, **added}
    build_target(copy, "rtx", max_context=64, max_input_len=8, sms=(89,))
    added |= {"targets": ["ort", "tensorrt", "rtx"], "sms": [89]}
    assert yaml.safe_load((copy / RECIPE_FILE).read_text()) == {**before, **added}
    again = compile_model(None, tmp_path / "again", recipe=copy / RECIPE_FILE, targets=("ort",))
    assert again.manifest.max_context == bundle.manifest.max_context == 256
    assert again.manifest.files["model.onnx"] == bundle.manifest.files["model.onnx"]


def test_links_are_refused_before_anything_is_built(copy: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "disk"
    elsewhere.mkdir()
    (copy / "engines" / "rtx").symlink_to(elsewhere)
    before = (copy / "planish.json").read_bytes()
    with pytest.raises(OutputFolderError, match=r"engines/rtx is a symbolic link"):
        build_target(copy, "rtx", max_context=32)
    for name in ("model.onnx", "model.onnx.data"):
        (copy / name).rename(tmp_path / name)
        (copy / name).symlink_to(tmp_path / name)
    with pytest.raises(OutputFolderError, match="cp -rL"):
        build_target(copy, "ort")
    assert (copy / "planish.json").read_bytes() == before
    Bundle.open(copy)


def test_a_model_for_the_tensorrt_of_another_machine(copy: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    given = ("--target", "tensorrt", "--tensorrt-version", "10.3", "--max-context", "32", "--json")
    assert run("build", str(copy), *given).json["targets"] == ["ort", "tensorrt"]
    folder = copy / "engines" / "tensorrt"
    assert {path.name for path in folder.iterdir()} == {"engine.json", "model.onnx", "model.onnx.data"}
    page = (copy / "report" / "report.html").read_text()
    assert "to be built where it is to run, by TensorRT 10.3; plugins, asked for auto: none" in page
    assert "RMSNormalization" in page
    assert yaml.safe_load((copy / RECIPE_FILE).read_text())["tensorrt_version"] == "10.3"
    assert "no engine is built of it yet" in run("inspect", str(copy)).out
    # The next build is for the TensorRT that is installed here, and there is none.
    assert run("build", str(copy), "--target", "tensorrt").code == MissingExtraError.exit_code
    for wrong in (("--tensorrt-version", "ten"), ("--plugins", "perhaps")):
        assert run("build", str(copy), "--target", "tensorrt", *wrong).code == RecipeError.exit_code


def test_a_target_is_made_again(copy: Path, bundle: Bundle) -> None:
    (copy / "engines" / "ort" / "left over").write_text("of an older planish")
    built = build_target(copy, "ort")
    assert built.manifest.targets == ("ort",)
    assert files(copy) == files(bundle.path)
    for name in ("engines/ort/model.onnx", "engines/ort/model.onnx.data", "model.onnx.data"):
        assert built.manifest.files[name] == bundle.manifest.files[name]


def test_a_build_that_fails_leaves_the_bundle_as_it_was(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}

    def fail(*_: object) -> None:
        (module.engine_folder(copy, "ort").with_name(".ort.partial") / "half").write_text("written")
        raise EngineBuildError("no")

    monkeypatch.setattr(ort, "build_ort", fail)
    with pytest.raises(EngineBuildError):
        build_target(copy, "ort")
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("killed_at", ["rmtree", "rename"])
def test_a_kill_between_old_and_new_leaves_a_bundle_without_the_target(
    killed_at: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, rename = shutil.rmtree, Path.rename

    def killed_removing(path: Path, **options: bool) -> None:
        if path == module.engine_folder(copy, "ort"):
            os.remove(path / "model.onnx.data")
            raise KeyboardInterrupt
        remove(path, **options)

    def killed_renaming(path: Path, to: Path) -> Path:
        if to == module.engine_folder(copy, "ort"):
            raise KeyboardInterrupt
        return rename(path, to)

    with monkeypatch.context() as patch:
        if killed_at == "rmtree":
            patch.setattr(module.shutil, "rmtree", killed_removing)
        else:
            patch.setattr(Path, "rename", killed_renaming)
        with pytest.raises(KeyboardInterrupt):
            build_target(copy, "ort")
    left = Bundle.open(copy)
    assert left.manifest.targets == ()
    assert left.model_path() == copy / "model.onnx"
    assert build_target(copy, "ort").manifest.targets == ("ort",)
    Bundle.open(copy)


def test_only_what_planish_wrote_is_recorded(copy: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = [copy / name for name in ("notes.txt", "report/notes.txt", "engines/rtx/model.engine")]
    killed = copy / "engines" / ".tensorrt.partial" / "engine.json"

    def built(_: str, __: Path, made: Path, *___: object) -> None:
        (made / "engine.json").write_text("{}")

    monkeypatch.setattr(module, "lower", built)
    # The report is of engines that are whole.
    monkeypatch.setattr(module, "write_report", lambda *_: None)
    build_target(copy, "rtx")
    for path in (*foreign, killed):
        path.parent.mkdir(exist_ok=True)
        path.write_text("not of this build")
    monkeypatch.undo()
    made = build_target(copy, "ort").manifest
    assert set(made.files) == {*bundle.manifest.files, "engines/rtx/engine.json"}
    assert not killed.parent.exists()
    foreign[0].write_text("changed")
    for path in foreign[1:]:
        path.unlink()
    Bundle.open(copy)


def test_leftovers_that_are_recorded_are_forgotten(copy: Path, bundle: Bundle) -> None:
    killed = copy / "engines" / ".rtx.partial" / "engine.json"
    killed.parent.mkdir()
    killed.write_text("{}")
    bundle.manifest.recording(copy, [killed]).write_records(copy)
    assert set(build_target(copy, "ort").manifest.files) == set(bundle.manifest.files)
    Bundle.open(copy)


def test_a_second_build_at_once_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lower, refused = module.lower, []

    def meanwhile(*given: Any) -> None:
        with pytest.raises(OutputFolderError, match="Another build is writing to") as raised:
            build_target(copy, "ort")
        refused.append(raised.value.exit_code)
        lower(*given)

    monkeypatch.setattr(module, "lower", meanwhile)
    build_target(copy, "ort")
    assert refused == [12]
    # The lock ends with the build.
    monkeypatch.undo()
    build_target(copy, "ort")


def test_a_disk_that_locks_no_folders(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert build_target(copy, "ort").manifest.targets == ("ort",)


def test_a_bundle_that_cannot_be_written_is_found_before_the_work(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In the way of the temporary name, whoever runs the tests: nothing is forbidden to root.
    (copy / "planish.json.partial").mkdir()
    monkeypatch.setattr(module, "lower", lambda *_: pytest.fail("the work began"))
    with pytest.raises(OutputFolderError, match=r"planish\.json cannot be written"):
        build_target(copy, "ort")


def test_what_cannot_be_built(copy: Path) -> None:
    with pytest.raises(RecipeError, match="targets"):
        build_target(copy, "cuda")
    with pytest.raises(MissingExtraError):
        build_target(copy, "tensorrt")
    (copy / "model.onnx.data").write_bytes(b"cut off")
    with pytest.raises(BundleCorruptError):
        build_target(copy, "ort")


def test_a_float_export_is_refused(float_bundle: Bundle) -> None:
    with pytest.raises(RecipeError, match="float export"):
        build_target(float_bundle.path, "ort")


def test_the_command(run: Run, copy: Path) -> None:
    done = run("build", copy, "--target", "ort", "--json")
    assert done.code == 0, done.err
    assert done.json["targets"] == ["ort"]
    assert done.json["bytes"] == sum(path.stat().st_size for path in (copy / "engines" / "ort").iterdir())
    assert run("build", copy, "--target", "cuda").code == RecipeError.exit_code
