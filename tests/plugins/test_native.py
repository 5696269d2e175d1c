"""C++ is compiled once, again when it changed, and its failures say what to do."""

import ctypes
from pathlib import Path

import pytest

from planish.plugins.native import NativeBuildError, build_library, cache_folder, find_compiler

ANSWER = '#include "portable.cuh"\nextern "C" int answer() { return %d; }\n'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text(ANSWER % 42)
    return path


def test_library_is_compiled_once(source: Path, tmp_path: Path) -> None:
    library = build_library(source, tmp_path / "built")
    assert ctypes.CDLL(str(library)).answer() == 42
    made = library.stat().st_mtime_ns
    assert build_library(source, tmp_path / "built") == library
    assert library.stat().st_mtime_ns == made
    assert list((tmp_path / "built").iterdir()) == [library]


def test_edited_source_makes_another_library(source: Path, tmp_path: Path) -> None:
    before = build_library(source, tmp_path)
    source.write_text(ANSWER % 43)
    after = build_library(source, tmp_path)
    assert before != after
    assert ctypes.CDLL(str(after)).answer() == 43


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeBuildError, match=r"none of c\+\+, g\+\+, clang\+\+ is there. Install g\+\+ or clang"):
        find_compiler()


def test_named_compiler_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NativeBuildError, match="CXX names 'no-such-compiler', which is no program"):
        find_compiler()


def test_source_that_does_not_compile(source: Path, tmp_path: Path) -> None:
    source.write_text("int broken( { }")
    with pytest.raises(NativeBuildError, match=r"answer\.cpp.*failed"):
        build_library(source, tmp_path / "built")
    assert not list((tmp_path / "built").iterdir())


def test_cache_folder_that_cannot_be_made(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NativeBuildError, match=r"cannot be written: Not a directory\. Set XDG_CACHE_HOME"):
        build_library(source, tmp_path / "file" / "below")


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "planish"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "planish"
