"""Text that the model writes itself, for calibration without any data (as in LLM-QAT, Liu et al. 2023)."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from planish.compiler.calibrate.device_session import DeviceSession
from planish.compiler.calibrate.vocabulary import fragments
from planish.compiler.checkpoint import Checkpoint
from planish.compiler.export.float_model import export_float
from planish.compiler.pipeline.work_folder import check_space, clear_errors
from planish.compiler.progress import Progress
from planish.compiler.runtime.session import Session
from planish.compiler.runtime.tokenizer import Tokenizer

__all__ = ["sample_tokens", "write_text_by"]

#: Tokens are drawn from the likeliest this many: the tail holds what is wrong more often than rare.
_TOP_K = 50

#: Sequences written at once, and the bytes that their cache may take: ONNX Runtime holds it twice at each step.
_BATCH, _CACHE_BYTES = 16, 1 << 30

_STAGE, _EXPORT = "write calibration text", "float"

_CacheT = TypeVar("_CacheT")


class _Model(Protocol[_CacheT]):
    """What a `Session` and a `DeviceSession` have in common."""

    @property
    def cache_bytes_per_token(self) -> int: ...

    def run(
        self, input_ids: npt.ArrayLike, cache: _CacheT | None = None, *, logits_to_keep: int = 0
    ) -> tuple[npt.NDArray[np.float32], _CacheT]: ...


def write_text_by(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    prefix: Sequence[int],
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    progress: Progress,
    device: torch.device,
    scratch: Path | None = None,
) -> npt.NDArray[np.int64]:
    """Return tokens, int64 [nsamples, seqlen], that `checkpoint` writes in floating point.

    On the CPU its float32 export is written into `scratch` for that, and removed; None is the folder for temporary
    files. A GPU holds the model itself, in the type in which it is stored.

    Raises:
        DiskFullError: if it does not fit there.
        PlanishError: if the checkpoint cannot be read, as in `export_float`.
    """
    random = [np.random.default_rng([seed, sample]) for sample in range(nsamples)]
    # A BOS token that the tokenizer does not add is one that the model may never have seen at the start of a text:
    # SmolLM2 is incoherent behind its BOS, and coherent behind any word.
    begun = [list(prefix) or [_ordinary(tokenizer, checkpoint.config.vocab_size, generator)] for generator in random]
    starts = np.asarray(begun, np.int64)
    if device.type != "cpu":
        return sample_tokens(DeviceSession(checkpoint, device), starts, seqlen, random, progress)
    with _export_folder(scratch) as folder, clear_errors(folder):
        check_space(folder, 4 * sum(prod(checkpoint.shape(tensor)) for tensor in checkpoint.names()))
        return sample_tokens(Session(export_float(checkpoint, folder)), starts, seqlen, random, progress)


@contextlib.contextmanager
def _export_folder(scratch: Path | None) -> Iterator[Path]:
    """Make a folder that is removed at the end; in `scratch` also what a killed run left of it."""
    if scratch is None:
        with tempfile.TemporaryDirectory(prefix="planish-") as name:
            yield Path(name)
        return
    folder = scratch / _EXPORT
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sample_tokens(
    session: _Model[_CacheT],
    starts: npt.NDArray[np.int64],
    seqlen: int,
    random: Sequence[np.random.Generator],
    progress: Progress,
) -> npt.NDArray[np.int64]:
    """Return tokens, int64 [samples, seqlen], that the model of `session` writes behind `starts`.

    Each is drawn from the 50 likeliest by the model's own probabilities (temperature 1). An end token does not end a
    sequence: another text follows it, as in training. The logits of different kinds of processors differ in their
    last bits, and so may the tokens; on one machine they repeat.

    Args:
        session: the model.
        starts: the first tokens of each sequence, int64 [samples, 1 or more].
        seqlen: tokens in a sequence, those of `starts` included.
        random: one generator per sequence, which draws its tokens.
        progress: is told how far the writing is.
    """
    given = starts.shape[1]
    tokens = np.zeros((len(starts), seqlen), np.int64)
    tokens[:, :given] = starts
    batch = max(1, min(_BATCH, _CACHE_BYTES // (session.cache_bytes_per_token * seqlen)))
    total = -(-len(tokens) // batch) * seqlen
    for start in range(0, len(tokens), batch):
        rows, generators = tokens[start : start + batch], random[start : start + batch]
        logits, cache = session.run(rows[:, :given], logits_to_keep=1)
        for position in range(given, seqlen):
            rows[:, position] = _draw(logits[:, -1], generators)
            if position + 1 < seqlen:
                logits, cache = session.run(rows[:, position : position + 1], cache, logits_to_keep=1)
            progress.step(_STAGE, start // batch * seqlen + position + 1, total)
    return tokens


def _ordinary(tokenizer: Tokenizer, vocab_size: int, random: np.random.Generator) -> int:
    """Return a random token that is text."""
    order = random.permutation(vocab_size)
    return next(int(token) for token in order if not fragments(tokenizer, [int(token)]))


def _draw(logits: npt.NDArray[np.float32], random: Sequence[np.random.Generator]) -> npt.NDArray[np.int64]:
    """Draw one token per row of `logits`, float32 [batch, vocab], with that row's generator.

    The largest of logits plus Gumbel noise is distributed as the softmax (Gumbel 1954; "the Gumbel-max trick").
    """
    count = min(_TOP_K, logits.shape[1])
    # In the order of their numbers, so that each token's noise is its own whatever order argpartition leaves.
    top = np.sort(np.argpartition(logits, -count, axis=1)[:, -count:], axis=1)
    noise = np.stack([generator.gumbel(size=count) for generator in random])
    chosen: npt.NDArray[np.int64] = (np.take_along_axis(logits, top, axis=1) + noise).argmax(axis=1)
    return np.take_along_axis(top, chosen[:, None], axis=1)[:, 0]
