"""Perplexity on a text, by the protocol that papers use."""

import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from planish.compiler.errors import TextError
from planish.compiler.runtime.session import Session
from planish.compiler.runtime.tokenizer import Tokenizer

__all__ = ["Evaluation", "evaluate", "read_text"]

#: Positions whose logits are held at a time, and rows turned into float64 at a time.
_POSITIONS, _ROWS = 512, 32


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        perplexity: exp of the mean negative log-likelihood (natural log) over all predicted tokens.
        tokens: how many tokens were predicted: seqlen - 1 per window.
        windows: how many windows were read.
        seqlen: tokens in a window.
        seconds: how long the model took.
    """

    perplexity: float
    tokens: int
    windows: int
    seqlen: int
    seconds: float


def evaluate(
    session: Session, tokenizer: Tokenizer, text: str | Path, *, seqlen: int = 512, windows: int = 20
) -> Evaluation:
    """Return the perplexity of `session` on the first `windows` windows of a text file.

    The text is encoded once, as a whole, with the special tokens that the tokenizer adds by itself and no others, and
    cut into non-overlapping windows of `seqlen` tokens. Each window starts with an empty cache and its first token is
    given, so seqlen - 1 tokens are predicted.

    Args:
        session: the model.
        tokenizer: its tokenizer.
        text: a text file, or a `.jsonl` file whose lines have a field `text` (joined by blank lines).
        seqlen: tokens in a window, 2 or more.
        windows: how many windows.

    Raises:
        TextError: if the file cannot be read or holds fewer windows; the message says how many fit.

    Example:
        >>> evaluate(bundle.session(), bundle.tokenizer, text, seqlen=32, windows=2).tokens
        62
    """
    if seqlen < 2 or windows < 1:
        raise TextError(f"{windows} windows of {seqlen} tokens predict nothing. Take 1 window of 2 tokens, or more.")
    ids = np.asarray(tokenizer.encode(read_text(Path(text))), np.int64)
    fit = len(ids) // seqlen
    if windows > fit:
        raise TextError(
            f"{text} has {len(ids)} tokens: {fit} windows of {seqlen} fit, {windows} were asked for. "
            f"Ask for at most {fit} windows, or give more text."
        )
    started, total = time.perf_counter(), 0.0
    for window in ids[: windows * seqlen].reshape(windows, seqlen):
        total += _negative_log_likelihood(session, window)
    predicted = windows * (seqlen - 1)
    seconds = time.perf_counter() - started
    mean = total / predicted
    return Evaluation(math.exp(mean) if mean < 700 else math.inf, predicted, windows, seqlen, seconds)


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
        raise TextError(f"{path} holds no text.")
    return content


def _text_field(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise TextError(f"{path}, line {number}: not JSON ({error}).") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise TextError(f"{path}, line {number}: no field 'text' that holds a string.")
    return str(record["text"])


def _negative_log_likelihood(session: Session, window: npt.NDArray[np.int64]) -> float:
    """Return the sum over the window's tokens, except the first, of -log p(token | those before it)."""
    total, cache = 0.0, None
    for start in range(0, len(window) - 1, _POSITIONS):
        tokens = window[start : start + _POSITIONS]
        targets = window[start + 1 : start + 1 + _POSITIONS]
        logits, cache = session.run(tokens[None], cache)
        for row in range(0, len(targets), _ROWS):
            wanted = targets[row : row + _ROWS]
            part = logits[0, row : row + len(wanted)].astype(np.float64)
            part -= part.max(axis=1, keepdims=True)
            total += float(np.log(np.exp(part).sum(axis=1)).sum() - part[np.arange(len(wanted)), wanted].sum())
    return total
