"""A compile leaves a whole bundle or none, resumes after a kill, and says what is wrong with the output folder."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.errors import AccuracyError, DiskFullError, OutputFolderError, PlanishError
from planish.compiler.pipeline import compilation, work_folder
from planish.compiler.pipeline import compile as pipeline
from planish.compiler.pipeline.compile import compile_model
from planish.compiler.pipeline.work_folder import WorkFolder
from planish.compiler.progress import Silent
from planish.compiler.quantize import codes as quantize
from planish.compiler.verify.verification import verify
from planish.passes.scheme import SchemeError
from tests.tiny import write_tiny

SCHEME = "w4a8k8v8"


class Heard(Silent):
    """Remembers what a compile said."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def say(self, message: str) -> None:
        self.messages.append(message)

    def __contains__(self, part: str) -> bool:
        return any(part in message for message in self.messages)


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def model_hashes(bundle: Bundle) -> dict[str, str]:
    return {name: record.sha256 for name, record in bundle.manifest.files.items() if "model.onnx" in name}


def test_a_bundle_holds_what_the_design_says(bundle: Bundle, tiny: Path) -> None:
    files = set(bundle.manifest.files)
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= files
    assert {"recipe.yaml", "plan.json", "model.onnx", "model.onnx.data"} <= files
    assert {"engines/ort/model.onnx", "engines/ort/model.onnx.data"} <= files
    assert {"report/report.json", "report/report.html"} <= files
    assert not partial(bundle.path).exists()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (bundle.path / name).read_bytes() == (tiny / name).read_bytes()


def test_its_recipe_makes_it_again(bundle: Bundle, tmp_path: Path) -> None:
    again = compile_model(None, tmp_path / "again", recipe=bundle.path / "recipe.yaml")
    assert model_hashes(again) == model_hashes(bundle)


def test_plan_and_report(bundle: Bundle) -> None:
    plan = json.loads((bundle.path / "plan.json").read_text())
    assert len(plan["linears"]) == 15
    assert plan["left_float"] == []
    down = next(entry for entry in plan["linears"] if entry["module"] == "model.layers.1.mlp.down_proj")
    assert (down["format"], down["shape"], down["average_bits"]) == ("w4a8", [64, 160], 4 + 32 / 160)
    # A 4-bit grid fitted to Gaussian weights leaves about a hundredth of their energy as error; 8 bits far less.
    assert 17 < down["weight_sqnr_db"] < 24
    assert plan["linears"][-1]["weight_sqnr_db"] > 38
    report = json.loads((bundle.path / "report" / "report.json").read_text())
    assert report["linears"] == 14
    assert report["verification"]["logits_error"] < 1e-3
    page = (bundle.path / "report" / "report.html").read_text()
    assert "model.layers.1.mlp.down_proj" in page
    assert "http" not in page


def test_float_linears_are_named_with_the_reason(tiny: Path, tmp_path: Path) -> None:
    made = compile_model(tiny, tmp_path / "out", scheme="w16a16k8v8", num_layers=1)
    plan = json.loads((made.path / "plan.json").read_text())
    assert plan["linears"] == []
    assert len(plan["left_float"]) == 8
    assert {entry["module"] for entry in plan["left_float"]} >= {"lm_head", "model.layers.0.self_attn.q_proj"}
    assert made.config.num_hidden_layers == 1


def test_output_not_empty(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(OutputFolderError, match="is not empty"):
        compile_model(tiny, tmp_path, scheme=SCHEME, select="none")
    with pytest.raises(OutputFolderError, match="is not a folder"):
        compile_model(tiny, tmp_path / "mine.txt", scheme=SCHEME, select="none")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_output_folder_is_taken(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert compile_model(tiny, tmp_path / "out", scheme=SCHEME, select="none", num_layers=1).path == tmp_path / "out"


def test_output_not_writable(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    # The superuser, whom tests may run as, may write anywhere; so the refusal is made here.
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputFolderError, match=r"cannot be written \(Permission denied\)"):
        compile_model(tiny, tmp_path / "out", scheme=SCHEME, select="none")


def test_output_below_a_file(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputFolderError, match="cannot be written"):
        compile_model(tiny, tmp_path / "file" / "out", scheme=SCHEME, select="none")


def test_a_work_folder_with_other_files_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    partial(tmp_path / "out").mkdir()
    mine = partial(tmp_path / "out") / "mine.txt"
    mine.write_text("keep me")
    with pytest.raises(OutputFolderError, match=r"did not write \(mine.txt\)"):
        compile_model(tiny, tmp_path / "out", scheme=SCHEME, select="none")
    assert mine.read_text() == "keep me"


def test_two_compiles_do_not_share_an_output(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with WorkFolder.hold(out, {}, Silent()), pytest.raises(OutputFolderError, match="Another compile"):
        compile_model(tiny, out, scheme=SCHEME, select="none")


def test_output_that_came_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "out" / "bundle of another compile").mkdir(parents=True)
    with (
        pytest.raises(OutputFolderError, match="is not empty"),
        WorkFolder.hold(tmp_path / "out", {}, Silent()),
    ):
        raise AssertionError("hours of work began for nothing")


def test_too_little_disk_is_found_before_work_begins(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(work_folder.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskFullError, match=r"0\.0 MB free and the compile needs about"):
        compile_model(tiny, tmp_path / "out", scheme=SCHEME, select="none")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_graph_holds_no_folder(tmp_path: Path) -> None:
    model, out = write_tiny(tmp_path / "model", head_dim=6), tmp_path / "out"
    with pytest.raises(SchemeError, match="multiple of 8 channels, and this model's have 6"):
        compile_model(model, out, scheme="w4a8k8v8", select="none")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert compile_model(model, out, scheme="w4a8", select="none", num_layers=1).path == out


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("1000 requested and 500 written"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_and_resumed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    out = tmp_path / "out"

    def full(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(compilation, "save_model", full)
        with pytest.raises(DiskFullError, match="run the same command again"):
            compile_model(tiny, out, scheme=SCHEME, select="none", num_layers=1)
    assert not out.exists()
    heard = Heard()
    compile_model(tiny, out, scheme=SCHEME, select="none", num_layers=1, progress=heard)
    assert "resuming" in heard


def test_a_failed_verification_leaves_no_bundle(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_ort = compilation.lower

    def wrong(target: str, portable: Path, folder: Path, *rest: object) -> None:
        build_ort(target, portable, folder, *rest)
        path = folder / "model.onnx.data"
        content = bytearray(path.read_bytes())
        content[: len(content) // 2] = bytes(len(content) // 2)
        path.write_bytes(content)

    monkeypatch.setattr(compilation, "lower", wrong)
    with pytest.raises(AccuracyError, match="drifts first"):
        compile_model(tiny, tmp_path / "out", scheme=SCHEME, select="none", num_layers=1)
    assert not (tmp_path / "out").exists()


def compile_until_verified(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile, stopped after the verification as by Ctrl-C."""

    def stop(*args: Any) -> None:
        verify(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compilation, "verify", stop)
        with pytest.raises(KeyboardInterrupt):
            compile_model(model, out, scheme=SCHEME, select="none")


def test_an_interrupted_compile_keeps_finished_stages(
    tiny: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, heard = tmp_path / "out", Heard()
    compile_until_verified(tiny, out, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(compilation, "save_model", lambda *_: pytest.fail("the portable model was written before"))
        patch.setattr(compilation, "lower", lambda *_: pytest.fail("the model was lowered before"))
        patch.setattr(quantize, "quantize_weight", lambda *_: pytest.fail("all blocks were quantised before"))
        made = compile_model(tiny, out, scheme=SCHEME, select="none", progress=heard)
    assert "resuming" in heard
    assert "portable model: kept" in heard
    assert model_hashes(made) == model_hashes(bundle)
    assert not partial(out).exists()


def test_a_damaged_stage_is_made_again(
    tiny: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    compile_until_verified(tiny, out, monkeypatch)
    os.truncate(partial(out) / "bundle" / "model.onnx.data", 5)
    assert model_hashes(compile_model(tiny, out, scheme=SCHEME, select="none")) == model_hashes(bundle)


@pytest.mark.parametrize("change", ["weights", "code"])
def test_work_that_no_command_would_finish_is_discarded(
    change: str, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out, heard = shutil.copytree(tiny, tmp_path / "model"), tmp_path / "out", Heard()
    compile_until_verified(model, out, monkeypatch)
    if change == "weights":
        write_tiny(model, seed=1)
    if change == "code":
        monkeypatch.setattr(pipeline, "code_fingerprint", lambda: "another")
    made = compile_model(model, out, scheme=SCHEME, select="none", progress=heard)
    assert "starting anew" in heard
    Bundle.open(made.path)


def test_work_of_another_command_is_kept(
    tiny: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    compile_until_verified(tiny, out, monkeypatch)
    message = f"unfinished work .* scheme {SCHEME}, not w3a8k8v8; num_layers None, not 1"
    with pytest.raises(OutputFolderError, match=message):
        compile_model(tiny, out, scheme="w3a8k8v8", select="none", num_layers=1)
    heard = Heard()
    assert model_hashes(compile_model(tiny, out, scheme=SCHEME, select="none", progress=heard)) == model_hashes(bundle)
    assert "resuming" in heard


def test_a_killed_compile_resumes(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Enough blocks that the process is still busy when the first of them is on disk.
    model = write_tiny(tmp_path / "deep", num_hidden_layers=24, intermediate_size=512)
    command = (
        f"from planish.compiler import compile_model; compile_model({str(model)!r}, {str(out)!r}, scheme='{SCHEME}', "
        "select='none')"
    )
    process = subprocess.Popen([sys.executable, "-c", command])
    blocks = partial(out) / "codes"
    deadline = time.monotonic() + 60
    while not list(blocks.glob("*.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    first = {path.name: path.stat().st_mtime_ns for path in blocks.glob("*.safetensors")}
    assert len(first) < 25

    heard = Heard()
    kept: dict[str, int] = {}

    def note(stage: str, done: int, total: int) -> None:
        if stage == "quantise" and done == total:
            kept.update({path.name: path.stat().st_mtime_ns for path in blocks.glob("*.safetensors")})

    heard.step = note
    made = compile_model(model, out, scheme=SCHEME, select="none", progress=heard)
    assert "resuming" in heard
    assert {name: kept[name] for name in first} == first
    assert len(kept) == 25
    fresh = compile_model(model, tmp_path / "fresh", scheme=SCHEME, select="none")
    assert model_hashes(made) == model_hashes(fresh)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "w5a4"}, "5-bit weights"),
        ({"scheme": "w4a4", "targets": ["tpu"]}, "'targets.0' is 'tpu'"),
        ({"scheme": "w4a4", "select": "best"}, "'best' is not a selection policy"),
        ({"scheme": "w4a4", "num_layers": 3}, "has 2"),
        ({}, "'scheme' is missing"),
    ],
)
def test_impossible_settings_are_refused_before_work_begins(
    tiny: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(PlanishError, match=message):
        compile_model(tiny, tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []


def test_many_groups(tmp_path: Path) -> None:
    """Of more than 32 groups a Split has more sizes than fit into the protobuf as an initializer."""
    model = write_tiny(tmp_path / "model", intermediate_size=528)
    made = compile_model(model, tmp_path / "out", scheme="w4a8k8v8g16", select="none")
    verification = json.loads((made.path / "report" / "report.json").read_text())["verification"]
    assert verification["logits_error"] < 1e-4
