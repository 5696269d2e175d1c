"""Perplexity on a text, by the protocol that papers use, and divergence from a reference on the same tokens."""

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from planish.compiler.measure.texts import cut_windows, text_file
from planish.compiler.progress import Progress, Silent
from planish.compiler.runtime.language_model import LanguageModel
from planish.compiler.runtime.tokenizer import Tokenizer

__all__ = ["Evaluation", "evaluate", "evaluate_windows"]

#: Positions whose logits are held at a time, and rows turned into float64 at a time.
_POSITIONS, _ROWS = 512, 32

Logits = npt.NDArray[np.float32]
Rows = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        perplexity: exp of the mean negative log-likelihood (natural log) over all predicted tokens.
        tokens: how many tokens were predicted: seqlen - 1 per window.
        windows: how many windows were read.
        seqlen: tokens in a window.
        seconds: how long the model took.
        kl: mean over the predicted tokens of KL(reference || model) between the distributions of that token, in nats;
            None without a reference.
        agreement: the share of predicted tokens of which model and reference find the same one likeliest; None without
            a reference.
    """

    perplexity: float
    tokens: int
    windows: int
    seqlen: int
    seconds: float
    kl: float | None = None
    agreement: float | None = None


def evaluate(
    session: LanguageModel,
    tokenizer: Tokenizer,
    text: str | Path,
    *,
    seqlen: int = 512,
    windows: int | None = 20,
    reference: LanguageModel | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Return the perplexity of `session` on the first `windows` windows of a text file.

    Each window starts with an empty cache and its first token is given, so seqlen - 1 tokens are predicted; how the
    text is cut is said at `cut_windows`.

    Args:
        session: the model.
        tokenizer: its tokenizer.
        text: a text file, or a `.jsonl` file whose lines have a field `text` (joined by blank lines).
        seqlen: tokens in a window, 2 or more.
        windows: how many windows; None is all that fit.
        reference: a model with the same tokenizer to measure the divergence from.
        progress: is told of every window.

    Raises:
        TextError: if the file cannot be read or holds fewer windows; the message says how many fit.

    Example:
        >>> evaluate(bundle.session(), bundle.tokenizer, text, seqlen=32, windows=2).tokens
        62
    """
    cut = cut_windows(tokenizer, text_file(text), seqlen, windows)
    (found,) = evaluate_windows([session], cut, reference, progress)
    return found


def evaluate_windows(
    models: Sequence[LanguageModel],
    windows: npt.NDArray[np.int64],
    reference: LanguageModel | None = None,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """Evaluate several models side by side, window after window; the reference, which may be one of them, runs once.

    Args:
        models: what to measure.
        windows: int64 [windows, seqlen], tokens that mean the same to all models.
        reference: a model to measure the divergence from.
        progress: is told of every window.

    Returns:
        An evaluation for each model.
    """
    told = progress or Silent()
    sums = {model: _Sums() for model in (*models, *([reference] if reference else []))}
    for number, window in enumerate(windows, 1):
        _add_window(sums, reference, window)
        told.step("evaluate", number, len(windows))
    count, seqlen = windows.shape
    return [sums[model].evaluation(count, seqlen, reference is not None) for model in models]


@dataclasses.dataclass
class _Sums:
    """What is added up over the predicted tokens of one model, and the cache of the window it is in."""

    negative_log_likelihood: float = 0.0
    kl: float = 0.0
    agreeing: int = 0
    seconds: float = 0.0
    cache: Any = None

    def run(self, model: LanguageModel, tokens: npt.NDArray[np.int64]) -> Logits:
        """Return the logits of some tokens behind those before them, float32 [tokens, vocab]."""
        started = time.perf_counter()
        logits, self.cache = model.run(tokens[None], self.cache)
        self.seconds += time.perf_counter() - started
        of_window: Logits = logits[0]
        return of_window

    def add(self, rows: Rows, targets: npt.NDArray[np.int64], expected: Rows | None) -> None:
        """Count log-probabilities, float64 [tokens, vocab], of tokens whose reference gives `expected`."""
        self.negative_log_likelihood -= float(rows[np.arange(len(targets)), targets].sum())
        if expected is not None:
            self.kl += float((np.exp(expected) * (expected - rows)).sum())
            self.agreeing += int((expected.argmax(1) == rows.argmax(1)).sum())

    def evaluation(self, windows: int, seqlen: int, has_reference: bool) -> Evaluation:
        predicted = windows * (seqlen - 1)
        mean = self.negative_log_likelihood / predicted
        found = Evaluation(math.exp(mean) if mean < 700 else math.inf, predicted, windows, seqlen, self.seconds)
        if not has_reference:
            return found
        return dataclasses.replace(found, kl=self.kl / predicted, agreement=self.agreeing / predicted)


def _add_window(
    sums: dict[LanguageModel, _Sums], reference: LanguageModel | None, window: npt.NDArray[np.int64]
) -> None:
    """Add the tokens of one window, except the first, to the sums of all models."""
    for each in sums.values():
        each.cache = None
    for start in range(0, len(window) - 1, _POSITIONS):
        tokens = window[start : start + _POSITIONS]
        targets = window[start + 1 : start + 1 + _POSITIONS]
        logits = {model: each.run(model, tokens) for model, each in sums.items()}
        for row in range(0, len(targets), _ROWS):
            wanted = targets[row : row + _ROWS]
            part = slice(row, row + len(wanted))
            rows = {model: _log_softmax(of_model[part]) for model, of_model in logits.items()}
            for model, each in sums.items():
                each.add(rows[model], wanted, rows[reference] if reference else None)


def _log_softmax(logits: Logits) -> Rows:
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return rows
