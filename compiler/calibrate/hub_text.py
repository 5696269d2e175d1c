"""Text and files of a data set on the Hugging Face Hub.

The Hub keeps a copy in parquet of every public data set, in its branch refs/convert/parquet, whatever files the data
set itself is made of. The first file of a split is downloaded into the Hub's own cache and read by pyarrow: one
optional package, where the library `datasets` needs pyarrow, pandas and a dozen more.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from planish.compiler.errors import CalibrationError
from planish.compiler.optional import require
from planish.compiler.progress import Progress

__all__ = ["hub_file", "hub_rows", "hub_text", "is_hub_name"]

_BRANCH = "refs/convert/parquet"
_NAME = re.compile(r"(?P<repository>\w[\w.-]*/[\w.-]+)(:(?P<config>[^:/]+))?(:(?P<split>[^:/]+))?")

#: Of a split that is too large to convert whole, the Hub converts the first part, into a folder with this prefix.
_PARTIAL = "partial-"


@dataclasses.dataclass(frozen=True)
class _Parquet:
    """The first parquet file of a split: `path` is where it lies in the branch."""

    config: str
    split: str
    path: str


def is_hub_name(name: str) -> bool:
    """Say whether `name` is spelled owner/name, owner/name:config or owner/name:config:split."""
    return _NAME.fullmatch(name) is not None


def hub_text(name: str, characters: int, progress: Progress) -> str:
    """Return the first documents of a data set, joined by blank lines: `characters` of them, or all there are.

    Args:
        name: owner/name[:config][:split]. The config may be left out where there is one or one is called `default`,
            the split where there is one or one is called `train`.
        characters: how much text is enough.
        progress: is told what is downloaded.

    Raises:
        CalibrationError: if the data set cannot be reached, has no such config or split, or no text in a column `text`.
        MissingExtraError: if pyarrow is not installed.
    """
    texts: list[str] = []
    length = 0
    for rows in hub_rows(name, progress):
        kept = [text for text in rows if isinstance(text, str) and text.strip()]
        texts += kept
        length += sum(map(len, kept))
        if length >= characters:
            break
    if not texts:
        raise CalibrationError(f"The data set {name} holds no text. Choose another, or give a .jsonl file.")
    return "\n\n".join(texts)


def hub_rows(name: str, progress: Progress) -> Iterator[list[Any]]:
    """Yield the column `text` of a data set as it stands, some rows at a time; the arguments are those of `hub_text`.

    Raises:
        CalibrationError: if the data set cannot be reached, has no such config or split, or no column `text`.
        MissingExtraError: if pyarrow is not installed.
    """
    found = _NAME.fullmatch(name)
    assert found is not None, name  # whoever calls checked it
    chosen = _choose(_list(found["repository"]), name, found["config"], found["split"])
    parquet = require("pyarrow.parquet")
    progress.say(f"text: {found['repository']}, config {chosen.config}, split {chosen.split}")
    with parquet.ParquetFile(hub_file(found["repository"], chosen.path, _BRANCH)) as file:
        columns = list(file.schema_arrow.names)
        if "text" not in columns:
            raise CalibrationError(
                f"The data set {name} has no column 'text', only {', '.join(columns)}. "
                "Choose another, or write its text to a .jsonl file."
            )
        for batch in file.iter_batches(columns=["text"], batch_size=256):
            yield batch.column(0).to_pylist()


def hub_file(repository: str, path: str, revision: str) -> Path:
    """Return a file of a data set, downloaded into the Hub's own cache.

    Raises:
        CalibrationError: if it cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, path, repo_type="dataset", revision=revision))
    except Exception as error:  # as in _list
        raise _unreachable(repository, error) from error


def _list(repository: str) -> list[_Parquet]:
    """Return the first file of every split of every config."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        paths = HfApi().list_repo_files(repository, repo_type="dataset", revision=_BRANCH)
    except GatedRepoError as error:
        raise CalibrationError(
            f"The data set {repository} is gated. Accept its licence on its page and log in: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise CalibrationError(
            f"The Hub has no data set {repository}, or it is private. Check the spelling, or give a .jsonl file."
        ) from error
    except RevisionNotFoundError as error:
        raise CalibrationError(
            f"The Hub has no parquet copy of the data set {repository}. Give its text as a .jsonl file."
        ) from error
    except Exception as error:  # connection errors are those of an HTTP client that differs between versions
        raise _unreachable(repository, error) from error
    parts = [path.split("/") for path in sorted(paths) if path.endswith("/0000.parquet")]
    return [_Parquet(part[0], part[1].removeprefix(_PARTIAL), "/".join(part)) for part in parts if len(part) == 3]


def _choose(files: list[_Parquet], name: str, config: str | None, split: str | None) -> _Parquet:
    """Return the file of the asked config and split, or of those that need not be named."""
    config = _pick(name, "config", {file.config for file in files}, config, "default")
    splits = {file.split: file for file in files if file.config == config}
    return splits[_pick(name, "split", set(splits), split, "train")]


def _pick(name: str, kind: str, there: set[str], asked: str | None, usual: str) -> str:
    if asked is None:
        asked = next(iter(there)) if len(there) == 1 else usual
    if asked not in there:
        raise CalibrationError(
            f"The data set {name} has no {kind} '{asked}'; it has {', '.join(sorted(there)) or 'none'}. "
            "Name one: owner/name:config:split."
        )
    return asked


def _unreachable(repository: str, error: Exception) -> CalibrationError:
    return CalibrationError(
        f"{repository} is no file here, and as a data set of the Hub it cannot be read ({error}). "
        "Connect to the network, or give a .txt or .jsonl file."
    )
