"""nvcc is found where it may be, told apart from not being there, and given every architecture."""

import re
import sys
from pathlib import Path

import pytest

from planish.plugins import cuda_build
from planish.plugins.cuda_build import ARCHITECTURES, UNITS, build_kernels, find_tool
from planish.plugins.native import SOURCES, NativeBuildError

#: Of CUDA 13 and 12.
SAYS_WHAT_IT_GETS = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.88"; exit; fi
for last; do :; done
echo "$@" > "$last"
"""
OLDER = SAYS_WHAT_IT_GETS.replace("13.0", "12.4")


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Take away every nvcc of the machine; /bin stays, for sh."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_tools_of_wheels_and_of_a_toolkit(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_tool("nvcc") is None
    wheel = program(nowhere / "nvidia" / "cu13" / "bin" / "nvcc", SAYS_WHAT_IT_GETS)
    assert find_tool("nvcc") == wheel
    toolkit = program(nowhere / "toolkit" / "bin" / "nvcc", SAYS_WHAT_IT_GETS)
    monkeypatch.setenv("CUDA_HOME", str(nowhere / "toolkit"))
    assert find_tool("nvcc") == toolkit
    # One that does not know all architectures, where there is another.
    program(toolkit, OLDER)
    assert find_tool("nvcc") == wheel
    wheel.unlink()
    assert find_tool("nvcc") == toolkit


def test_no_nvcc(nowhere: Path) -> None:
    with pytest.raises(NativeBuildError, match=r"needs nvcc of CUDA 13, and there is none\. Install"):
        build_kernels(nowhere / "library.so")


def test_every_unit_and_architecture_is_compiled(nowhere: Path) -> None:
    program(nowhere / "nvcc", SAYS_WHAT_IT_GETS)
    command = build_kernels(nowhere / "built" / "library.so").read_text().split()
    assert all(f"-gencode=arch=compute_{each},code=sm_{each}" in command for each in ARCHITECTURES)
    assert {str(SOURCES / f"{unit}.cu") for unit in UNITS} <= set(command)
    assert {path.stem for path in SOURCES.glob("*.cu")} == set(UNITS)
    assert not any("fast" in part for part in command)


def test_nvcc_fails(nowhere: Path) -> None:
    fails = "echo 'no such architecture' >&2; exit 1; for last"
    program(nowhere / "nvcc", OLDER.replace("for last", fails))
    with pytest.raises(NativeBuildError) as raised:
        build_kernels(nowhere / "library.so")
    assert re.match(rf"{nowhere}/nvcc failed on .* It is of CUDA 12, and 13 is wanted\.", str(raised.value))
    assert str(raised.value).endswith("\nno such architecture")


def test_main_does_without_nvcc(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda_build, "host_library", lambda: type("Library", (), {"_name": "packer.so"}))
    monkeypatch.setattr(sys, "argv", ["cuda_build", str(nowhere / "library.so")])
    cuda_build.main()
    assert "kernels: not compiled, there is no nvcc" in capsys.readouterr().out
