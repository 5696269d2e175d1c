"""`planish doctor`: what is here, what is missing, and whether a named model could be compiled."""

import subprocess
from collections import namedtuple
from pathlib import Path

import huggingface_hub
import pytest

from planish.compiler import doctor
from planish.compiler.doctor_plugins import kernels_state, packer_state
from planish.compiler.pipeline import forecast as module
from planish.plugins.native import SOURCES
from tests.command import Run


def test_a_model_by_name(run: Run, tiny: Path) -> None:
    done = run("doctor", "--for", tiny, "--scheme", "w4a4k4v4", "--target", "ort", "--json")
    assert done.code == 0, done.err
    found = done.json["forecast"]
    assert found["bundle"] == sum(found["sizes"].values())
    assert set(found["sizes"]) == {"portable", "ort", "transforms", "records"}
    assert found["lacks"] == []
    assert 5 < found["seconds"] < 600
    assert "disk and memory suffice" in done.err


def test_a_recipe_and_a_budget(run: Run, wide_tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {wide_tiny}\nscheme: w2a16\nselect: fixed:affine\n")

    def portable(*arguments: object) -> int:
        done = run("doctor", "--recipe", path, *arguments, "--json")
        assert done.code == 0, done.err
        return int(done.json["forecast"]["sizes"]["portable"])

    plain, budget = portable(), portable("--avg-bits", 3.2)
    weights = 2 * (320 * 192 + 192 * 192 + 3 * 328 * 192)
    # Two bits, and a float32 scale per row.
    low = 2 * weights + 32 * 2 * (320 + 192 + 656 + 192)
    assert budget - plain == pytest.approx((3.2 * weights - low) / 8, rel=0.02)
    path.write_text(path.read_text() + "overrides:\n  .*.mlp.down_proj: {bits: 8}\n")
    assert portable() - plain == 2 * 328 * 192 * 6 // 8


def test_what_is_too_small_is_said(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 5000, 5000)
    memory = namedtuple("memory", "total")(10**8)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: memory)
    done = run("doctor", "--for", tiny, "--scheme", "w4a4k4v4", "--select", "none", "--json")
    disk, resident = done.json["forecast"]["lacks"]
    assert disk.startswith("The disk has 5 kB free, and the compile needs about ")
    assert resident.startswith("This machine has 100 MB of memory, and the compile needs about ")
    assert "suffice" not in done.err


def test_of_the_hub_only_the_config_is_read(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(tiny / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    done = run("doctor", "--for", "org/some-model.v1", "--scheme", "w8a8", "--json")
    assert asked == [("org/some-model.v1", "config.json")]
    assert done.json["forecast"]["model"] == "org/some-model.v1"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--for", "smollm2"], 2, "a model and a scheme together"),
        (["--scheme", "w4a4"], 2, "a model and a scheme together"),
        (["--for", "nowhere", "--scheme", "w4a4"], 10, "does not exist"),
        (["--for", "org/none", "--scheme", "w4a4"], 10, "cannot be downloaded"),
        (["--for", "smollm2", "--scheme", "w5"], 18, "is not a scheme"),
        (["--for", "smollm2", "--scheme", "w4a4", "--target", "tpu"], 19, "tpu"),
        (["--for", "smollm2", "--scheme", "w4a4", "--select", "luck"], 25, "luck"),
    ],
)
def test_bad_input(run: Run, arguments: list[str], code: int, words: str) -> None:
    refused = run("doctor", *arguments)
    assert refused.code == code
    assert words in " ".join(refused.err.split())


def test_kernels_that_are_not_built(tmp_path: Path) -> None:
    state, todo = kernels_state(tmp_path / "none.so")
    assert state == "not built"
    assert todo is not None
    assert "make plugins" in todo


def test_kernels_that_are_no_library(tmp_path: Path) -> None:
    (tmp_path / "kernels.so").write_text("not ELF")
    state, todo = kernels_state(tmp_path / "kernels.so")
    assert "cannot be loaded" in state
    assert todo is not None


@pytest.mark.skipif(packer_state()[1] is not None, reason="there is no C++ compiler")
@pytest.mark.parametrize("lacking", ["", "planish_small_linear"])
def test_kernels_of_this_planish_or_another(lacking: str, tmp_path: Path) -> None:
    header = (SOURCES / "planish_kernels.h").read_text(encoding="utf-8")
    names = [name for name in doctor_names(header) if name != lacking]
    assert {"planish_quantize_tokens", "planish_last_error"} <= set(names)
    source = tmp_path / "kernels.c"
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in names))
    library = tmp_path / "kernels.so"
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    state, todo = kernels_state(library)
    if not lacking:
        assert f"its {len(names)} functions" in state
        assert todo is None
    else:
        assert "is of another planish" in state
        assert todo is not None
        assert "lacks planish_small_linear, which" in todo


def doctor_names(header: str) -> list[str]:
    """Return what the header declares, read another way: what stands in front of a parenthesis at a line's start."""
    return [
        line.split("(")[0].split()[-1].lstrip("*")
        for line in header.splitlines()
        if "(" in line and "planish_" in line.split("(")[0] and not line.startswith((" ", "/", "#"))
    ]


def test_gpus_are_named_with_their_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "NVIDIA H100 80GB HBM3, 9.0, 580.95.05\nNVIDIA L4, 8.9, 580.95.05\n"
    done = subprocess.CompletedProcess([], 0, listed, "")
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: done)
    assert doctor.diagnose()["gpus"] == [
        "NVIDIA H100 80GB HBM3, SM 90, driver 580.95.05",
        "NVIDIA L4, SM 89, driver 580.95.05",
    ]
