"""Texts are joined as the papers join them, and cut into windows; unusable ones are named by file and line."""

import gzip
import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from planish.compiler.errors import TextError
from planish.compiler.measure.texts import Text, cut_windows, dataset, read_text, text_file
from planish.compiler.progress import Silent
from planish.compiler.runtime.tokenizer import Tokenizer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that stands for the Hub: repository/revision/path."""
    root = tmp_path / "hub"

    def listing(self: object, repository: str, *, repo_type: str, revision: str) -> list[str]:
        folder = root / repository / revision
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    def download(repository: str, path: str, *, repo_type: str, revision: str) -> str:
        assert repo_type == "dataset"
        return str(root / repository / revision / path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listing)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return root


def put_rows(path: Path, rows: list[str]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (extra 'datasets')")
    arrow = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True)
    parquet.write_table(arrow.table({"text": rows}), path)


def test_wikitext2_is_all_rows_joined_by_blank_lines(hub: Path) -> None:
    # Empty rows count: papers join the column as it is.
    rows = ["", " = Title = \n", "", " A line , as it stands . \n"] * 200
    put_rows(hub / "Salesforce/wikitext/refs/convert/parquet/wikitext-2-raw-v1/test/0000.parquet", rows)
    found = dataset("wikitext2", Silent())
    assert found.content == "\n\n".join(rows)
    assert (found.tokens, found.sizes(None, None, 4096)) == (None, (2048, None))


def test_c4_is_the_beginning_of_the_first_shard(hub: Path) -> None:
    path = hub / "allenai/c4/main/en/c4-validation.00000-of-00008.json.gz"
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": f"document {i}\u2028", "url": "x"}) + "\n" for i in range(1200))
    found = dataset("c4", Silent())
    assert found.content == " ".join(f"document {i}\u2028" for i in range(1100))
    assert found.tokens == 256 * 2048


def test_other_data_sets(hub: Path) -> None:
    put_rows(hub / "org/texts/refs/convert/parquet/default/train/0000.parquet", ["one", " ", "two"])
    assert dataset("org/texts", Silent()).content == "one\n\ntwo"
    with pytest.raises(TextError, match="no split 'test'"):
        dataset("org/texts:default:test", Silent())


@pytest.mark.parametrize("name", ["wikitext", "no.txt", "a/b/c"])
def test_names_that_are_no_data_set(name: str) -> None:
    with pytest.raises(TextError, match=f"'{name}' is no data set: give wikitext2, c4, or a name on the Hub"):
        dataset(name, Silent())


def test_a_data_set_out_of_reach() -> None:
    with pytest.raises(TextError, match=r"cannot be read.*Connect to the network, or give"):
        dataset("wikitext2", Silent())


def test_windows_are_cut_in_order_and_the_tail_is_dropped(tiny: Path, text: Path) -> None:
    tokenizer, content = Tokenizer(tiny), read_text(text)
    ids = tokenizer.encode(content)
    cut = cut_windows(tokenizer, text_file(text), 50, None)
    assert cut.shape == (len(ids) // 50, 50)
    np.testing.assert_array_equal(cut.ravel(), ids[: cut.size])
    limited = cut_windows(tokenizer, Text("t", content, tokens=149), 50, None)
    np.testing.assert_array_equal(limited, cut[:2])


def test_sizes_of_windows() -> None:
    assert Text("t", "").sizes(None, None, 4096) == (512, 20)
    assert Text("t", "").sizes(None, None, 256) == (256, 20)
    assert Text("t", "").sizes(128, 3, 256) == (128, 3)
    with pytest.raises(TextError, match="Windows of 257 tokens are longer than the model's context of 256"):
        Text("t", "").sizes(257, None, 256)


def test_jsonl_texts_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    texts = ["one", "two\nlines", "a\u2028b"]
    path.write_text("\n".join(json.dumps({"text": t, "id": 1}, ensure_ascii=False) for t in texts) + "\n\n")
    assert read_text(path) == "one\n\ntwo\nlines\n\na\u2028b"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.txt", b" \n", "holds no text"),
        ("text.txt", b"\xff\xfe", "cannot be read"),
        ("text.jsonl", b'{"text": "a"}\nx\n', "line 2: not JSON"),
        ("text.jsonl", b'{"text": 3}\n', "line 1: no field 'text'"),
    ],
)
def test_unusable_texts(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message):
        read_text(tmp_path / name)


def test_missing_text(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="cannot be read"):
        read_text(tmp_path / "no.txt")
