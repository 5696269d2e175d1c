"""A data set on the Hub: which of its files is read, and what is said when none can be."""

import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from planish.compiler.calibrate.hub_text import hub_text, is_hub_name
from planish.compiler.errors import CalibrationError, MissingExtraError
from planish.compiler.progress import Silent

BRANCH = "refs/convert/parquet"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that stands for the branch refs/convert/parquet of the data set org/texts."""

    def listing(self: object, repository: str, *, repo_type: str, revision: str) -> list[str]:
        assert (repository, repo_type, revision) == ("org/texts", "dataset", BRANCH)
        return [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]

    def download(repository: str, path: str, *, repo_type: str, revision: str) -> str:
        assert (repository, repo_type, revision) == ("org/texts", "dataset", BRANCH)
        return str(tmp_path / path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listing)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    (tmp_path / ".gitattributes").touch()
    return tmp_path


def put(hub: Path, *splits: str) -> None:
    """Make the folders of some splits, two files in each; the text is the path."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (extra 'datasets')")
    arrow = pytest.importorskip("pyarrow")
    for split in splits:
        (hub / split).mkdir(parents=True)
        for number in (0, 1):
            table = arrow.table({"id": [1, 2, 3], "text": [f"{split}/{number}", "  ", None]})
            parquet.write_table(table, hub / split / f"000{number}.parquet")


@pytest.mark.parametrize(
    ("splits", "name", "found"),
    [
        (["plain/test"], "org/texts", "plain/test"),
        (["default/test", "default/train", "other/train"], "org/texts", "default/train"),
        (["a/train", "b/train", "b/test"], "org/texts:b", "b/train"),
        (["a/train", "b/train", "b/test"], "org/texts:b:test", "b/test"),
        (["en/partial-train", "en/validation"], "org/texts:en", "en/partial-train"),
    ],
)
def test_the_first_file_of_the_split_is_read(hub: Path, splits: list[str], name: str, found: str) -> None:
    put(hub, *splits)
    assert hub_text(name, 10_000, Silent()) == f"{found}/0"


def test_enough_text_is_enough(hub: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (extra 'datasets')")
    arrow = pytest.importorskip("pyarrow")
    (hub / "default" / "train").mkdir(parents=True)
    texts = [f"number {i}" for i in range(5000)]
    parquet.write_table(arrow.table({"text": texts}), hub / "default" / "train" / "0000.parquet")
    some = hub_text("org/texts", 4000, Silent())
    assert 4000 <= len(some) < 10_000
    assert "\n\n".join(texts).startswith(some)
    assert hub_text("org/texts", 10**9, Silent()) == "\n\n".join(texts)


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"content": ["a"]}, "no column 'text', only content"), ({"text": ["", None]}, "holds no text")],
)
def test_a_data_set_without_text(hub: Path, columns: dict[str, list[Any]], message: str) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (extra 'datasets')")
    arrow = pytest.importorskip("pyarrow")
    (hub / "default" / "train").mkdir(parents=True)
    parquet.write_table(arrow.table(columns), hub / "default" / "train" / "0000.parquet")
    with pytest.raises(CalibrationError, match=message):
        hub_text("org/texts", 100, Silent())


@pytest.mark.parametrize(
    ("splits", "name", "message"),
    [
        (["a/train", "b/train"], "org/texts", "no config 'default'; it has a, b. Name one"),
        (["a/train"], "org/texts:b", "no config 'b'; it has a"),
        (["a/test", "a/validation"], "org/texts:a", "no split 'train'; it has test, validation"),
        (["a/train"], "org/texts:a:test", "no split 'test'; it has train"),
        ([], "org/texts", "no config 'default'; it has none"),
    ],
)
def test_what_is_not_there(hub: Path, splits: list[str], name: str, message: str) -> None:
    for split in splits:
        (hub / split).mkdir(parents=True)
        (hub / split / "0000.parquet").touch()
    with pytest.raises(CalibrationError, match=message):
        hub_text(name, 100, Silent())


def test_pyarrow_is_missing(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (hub / "a" / "train").mkdir(parents=True)
    (hub / "a" / "train" / "0000.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"'pyarrow' is not installed.*pip install 'planish\[datasets\]'"):
        hub_text("org/texts", 100, Silent())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "is gated.*hf auth login"),
        ("RepositoryNotFoundError", "has no data set org/texts"),
        ("RevisionNotFoundError", "no parquet copy"),
    ],
)
def test_the_hub_refuses(kind: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = getattr(huggingface_hub.errors, kind)

    def refuse(*args: Any, **options: Any) -> list[str]:
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    with pytest.raises(CalibrationError, match=message):
        hub_text("org/texts", 100, Silent())


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError, match=r"org/texts is no file here.*offline mode.*Connect to the network"):
        hub_text("org/texts", 100, Silent())


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("owner/name", True),
        ("owner/na.me-2:config-1", True),
        ("owner/name:config:split", True),
        ("name", False),
        ("owner/name:", False),
        ("owner/name:a:b:c", False),
        ("../name", False),
        ("/data/text", False),
        ("a/b/c", False),
    ],
)
def test_names(name: str, is_one: bool) -> None:
    assert is_hub_name(name) is is_one


@pytest.mark.hub
def test_a_real_data_set() -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra 'datasets')")
    text = hub_text("Salesforce/wikitext:wikitext-2-raw-v1:validation", 20_000, Silent())
    assert len(text) >= 20_000
    assert "Homarus gammarus" in text
