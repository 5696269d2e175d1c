"""Answers survive, a half-written one is dropped, and settings keep files apart."""

from pathlib import Path

import pytest

from planish.compiler.errors import OutputFolderError
from planish.compiler.harness.answers import Answers

SETTINGS = {"model": "a", "code": "b"}


def test_answers_are_found_again(tmp_path: Path) -> None:
    with Answers.hold(tmp_path / "new", SETTINGS) as answers:
        assert answers.get("one") is None
        answers.keep({"one": [-1.5, True], "two": "text\u2028"})
        assert answers.get("one") == [-1.5, True]
    with Answers.hold(tmp_path / "new", SETTINGS) as answers:
        assert (answers.get("one"), answers.get("two"), answers.get("three")) == ([-1.5, True], "text\u2028", None)
    with Answers.hold(tmp_path / "new", {**SETTINGS, "model": "c"}) as answers:
        assert answers.get("one") is None


@pytest.mark.parametrize("cut", [1, 7])
def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path, cut: int) -> None:
    with Answers.hold(tmp_path, SETTINGS) as answers:
        answers.keep({"one": [-1.5, True], "two": [-2.5, False]})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-cut])
    for _ in range(2):
        with Answers.hold(tmp_path, SETTINGS) as answers:
            assert answers.get("one") == [-1.5, True]
            assert answers.get("two") is None
            answers.keep({"three": [0.5, True]})
    with Answers.hold(tmp_path, SETTINGS) as answers:
        assert answers.get("three") == [0.5, True]


@pytest.mark.parametrize("damage", [b"5\n", b'"\xff"\n', b"\xff\n", b"[1, 2, 3]\n"])
def test_a_damaged_line_ends_what_is_known(tmp_path: Path, damage: bytes) -> None:
    with Answers.hold(tmp_path, SETTINGS) as answers:
        answers.keep({"one": [-1.5, True]})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + damage)
    for _ in range(2):
        with Answers.hold(tmp_path, SETTINGS) as answers:
            assert answers.get("one") == [-1.5, True]
            answers.keep({"two": "text"})
    with Answers.hold(tmp_path, SETTINGS) as answers:
        assert answers.get("two") == "text"


def test_one_evaluation_at_a_time(tmp_path: Path) -> None:
    with Answers.hold(tmp_path, SETTINGS), pytest.raises(OutputFolderError, match="Another evaluation"):
        Answers.hold(tmp_path, SETTINGS)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputFolderError, match=r"cannot be written.*--answers"):
        Answers.hold(tmp_path / "file" / "folder", SETTINGS)
