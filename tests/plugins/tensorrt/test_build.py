"""The build finds headers and tools, and says which of them is missing."""

from pathlib import Path

import pytest

from planish.plugins.native import NativeBuildError
from planish.plugins.tensorrt import build
from planish.plugins.tensorrt.build import build_plugins, cuda_headers, tensorrt_headers


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_headers_of_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR", raising=False)
    assert tensorrt_headers() is None
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path))
    assert tensorrt_headers() is None
    (tmp_path / "NvInferRuntime.h").touch()
    assert tensorrt_headers() == tmp_path


def test_headers_of_cuda_are_those_of_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    nvcc = program(tmp_path / "nvcc", f"echo '#$ TOP={tmp_path}/bin/..' >&2")
    monkeypatch.setattr(build, "find_tool", lambda name: nvcc)
    assert cuda_headers() is None
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime_api.h").touch()
    assert cuda_headers() == tmp_path / "include"
    monkeypatch.setattr(build, "find_tool", lambda name: None)
    assert cuda_headers() is None


def test_no_cmake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeBuildError, match=r"needs CMake 3\.24, and there is none"):
        build_plugins(tmp_path / "build", tmp_path)


def test_cmake_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "cmake", "echo no such headers >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    with pytest.raises(NativeBuildError, match=r"cmake -S .*TENSORRT_INCLUDE_DIR=.* failed\.\nno such headers"):
        build_plugins(tmp_path / "build", tmp_path)


def test_what_is_missing_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR", raising=False)
    build.main()
    assert "plugins: not compiled, TENSORRT_INCLUDE_DIR names no headers of TensorRT" in capsys.readouterr().out
    monkeypatch.setattr(build, "tensorrt_headers", lambda: tmp_path)
    monkeypatch.setattr(build, "find_tool", lambda name: None)
    build.main()
    assert "plugins: not compiled, there is no nvcc" in capsys.readouterr().out
