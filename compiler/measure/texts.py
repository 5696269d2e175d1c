"""The text that models are measured on: files, and the data sets of the papers by name, cut into windows."""

import dataclasses
import gzip
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from planish.compiler.calibrate.hub_text import hub_file, hub_rows, hub_text, is_hub_name
from planish.compiler.errors import CalibrationError, TextError
from planish.compiler.progress import Progress
from planish.compiler.runtime.tokenizer import Tokenizer

__all__ = ["DATASETS", "Text", "cut_windows", "dataset", "read_text", "text_file"]

#: Of a data set that no paper has a protocol for, this many characters are read.
_CHARACTERS = 1 << 20


@dataclasses.dataclass(frozen=True)
class Text:
    """A text, what to call it, and how it is cut into windows unless one is told otherwise.

    Attributes:
        name: the file, or the data set.
        content: the text.
        tokens: how many of its first tokens count; None is all.
        seqlen: tokens in a window.
        windows: how many windows; None is all that fit.
    """

    name: str
    content: str
    tokens: int | None = None
    seqlen: int = 512
    windows: int | None = 20

    def sizes(self, seqlen: int | None, windows: int | None, max_context: int) -> tuple[int, int | None]:
        """Return tokens in a window, and how many, for a model that sees `max_context`; None takes what is usual.

        Raises:
            TextError: if windows of `seqlen` tokens were asked for and the model does not see as many.
        """
        if seqlen is not None and seqlen > max_context:
            raise TextError(
                f"Windows of {seqlen} tokens are longer than the model's context of {max_context}. "
                f"Ask for {max_context} tokens or fewer (--seqlen)."
            )
        return seqlen or min(self.seqlen, max_context), windows or self.windows


def text_file(path: str | Path) -> Text:
    """Return the text of a file; see `read_text` for which files, and what is raised."""
    return Text(str(path), read_text(Path(path)))


def dataset(name: str, progress: Progress) -> Text:
    """Return the text of a data set on the Hub: one of `DATASETS`, by the papers' protocol, or any other.

    Args:
        name: a name in `DATASETS`, or owner/name[:config][:split].
        progress: is told what is downloaded.

    Raises:
        TextError: if the name is none of these, or the data set cannot be read.
        MissingExtraError: if pyarrow is needed and not installed.
    """
    protocol = DATASETS.get(name)
    if protocol is None and not is_hub_name(name):
        raise TextError(
            f"'{name}' is no data set: give {', '.join(DATASETS)}, or a name on the Hub (owner/name:config:split). "
            "A file is given by --text."
        )
    try:
        if protocol is None:
            return Text(name, hub_text(name, _CHARACTERS, progress), seqlen=2048, windows=None)
        return protocol(progress)
    except CalibrationError as error:
        raise TextError(str(error)) from error


def _wikitext2(progress: Progress) -> Text:
    """The raw test split, its rows as they are, joined by blank lines (GPTQ, arXiv 2210.17323)."""
    rows = [row for batch in hub_rows("Salesforce/wikitext:wikitext-2-raw-v1:test", progress) for row in batch]
    return Text("wikitext2", "\n\n".join(rows), seqlen=2048, windows=None)


def _c4(progress: Progress) -> Text:
    """Of the first validation shard 1100 documents, joined by blanks, and of them 256 windows of 2048 (FlatQuant)."""
    progress.say("text: allenai/c4, en, first shard of the validation split")
    path = hub_file("allenai/c4", "en/c4-validation.00000-of-00008.json.gz", "main")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line in islice(lines, 1100)]
    return Text("c4", " ".join(documents), tokens=256 * 2048, seqlen=2048, windows=None)


#: Name -> the text on which papers report perplexity.
DATASETS: dict[str, Callable[[Progress], Text]] = {"wikitext2": _wikitext2, "c4": _c4}


def cut_windows(tokenizer: Tokenizer, text: Text, seqlen: int, windows: int | None) -> npt.NDArray[np.int64]:
    """Return the first windows of a text, int64 [windows, seqlen].

    The text is encoded once, as a whole, with the special tokens that the tokenizer adds by itself and no others, and
    cut into windows that do not overlap; what is left at the end is dropped.

    Args:
        tokenizer: of the model.
        text: what to cut.
        seqlen: tokens in a window, 2 or more.
        windows: how many windows; None is all that fit.

    Raises:
        TextError: if fewer windows fit; the message says how many.
    """
    if seqlen < 2 or (windows is not None and windows < 1):
        raise TextError(f"{windows} windows of {seqlen} tokens predict nothing. Take 1 window of 2 tokens, or more.")
    ids = np.asarray(tokenizer.encode(text.content)[: text.tokens], np.int64)
    fit = len(ids) // seqlen
    if (windows or 1) > fit:
        remedy = f"Ask for at most {fit} (--windows)" if fit else "Ask for shorter ones (--seqlen)"
        raise TextError(
            f"{text.name} has {len(ids)} tokens: {fit} windows of {seqlen} fit, {windows or 1} were asked for. "
            f"{remedy}, or give more text."
        )
    wanted = fit if windows is None else windows
    return ids[: wanted * seqlen].reshape(wanted, seqlen)


def read_text(path: Path) -> str:
    """Return the text of a `.txt` file, or the `text` fields of a `.jsonl` file joined by blank lines.

    Raises:
        TextError: if the file is missing, empty, not UTF-8, or a line has no `text`.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} cannot be read ({error}). Give a UTF-8 text file or a .jsonl file.") from error
    if path.suffix == ".jsonl":
        content = "\n\n".join(
            _text_field(path, number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()
        )
    if not content.strip():
        raise TextError(f"{path} holds no text. Give another file.")
    return content


def _text_field(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise TextError(f"{path}, line {number}: not JSON ({error}).") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise TextError(f"{path}, line {number}: no field 'text' that holds a string.")
    return str(record["text"])
