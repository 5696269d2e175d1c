"""The tokens that a model is calibrated on."""

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from planish.compiler.calibrate.hub_text import hub_text
from planish.compiler.calibrate.self_text import write_text_by
from planish.compiler.calibrate.settings import SELF, CalibrationSettings
from planish.compiler.calibrate.vocabulary import fragments, prefix
from planish.compiler.checkpoint import Checkpoint
from planish.compiler.errors import CalibrationError, TextError, TokenizerError
from planish.compiler.measure.texts import read_text
from planish.compiler.progress import Progress, Silent
from planish.compiler.runtime.tokenizer import Tokenizer

__all__ = ["calibration_tokens"]

#: Shares of `fragments` among the tokens of a text above which it is refused as of a language that the tokenizer was
#: not made for, and above which the user is told. SmolLM2 has 0 in English, German and source code, 0.15 to 0.25 in
#: Russian, Greek and Arabic, and 0.45 to 0.95 in Vietnamese, Hindi, Chinese, Japanese and Korean. Tokens per character
#: say no more: there are many where characters are in pieces, and one per digit besides.
_MAX_FRAGMENTS, _TOLD_FRAGMENTS = 0.3, 0.1

#: Of a data set on the Hub, this many characters are read per token asked for: some four times what is needed.
_CHARACTERS_PER_TOKEN = 16


def calibration_tokens(
    source: str,
    checkpoint: Checkpoint,
    *,
    nsamples: int = 16,
    seqlen: int = 512,
    seed: int = 0,
    progress: Progress | None = None,
    device: torch.device | None = None,
    scratch: Path | None = None,
) -> npt.NDArray[np.int64]:
    """Return the tokens to calibrate `checkpoint` on, int64 [nsamples, seqlen].

    A text is encoded as a whole, as `evaluate` does, and cut into windows; `nsamples` of them are chosen at random,
    none twice, and stand in random order. If the tokenizer puts BOS before a text by itself, every window starts with
    it, and holds one token of the text less: the first token of a sequence has activations unlike all others, and at
    inference it is BOS then, and only then.

    Args:
        source: a text file, a `.jsonl` file, a data set on the Hub, or `self`; see `CalibrationSettings.dataset`.
        checkpoint: the model; its tokenizer encodes the text.
        nsamples: how many sequences.
        seqlen: tokens in a sequence, 16 or more.
        seed: of the choice of windows, or of what the model writes.
        progress: is told how far the run is.
        device: where the model writes, for `self`; None is the CPU.
        scratch: where its float export is meanwhile, for `self` on the CPU: a folder that the caller gives to no other
            run, so that what a killed one left there is removed; None is the folder for temporary files.

    Raises:
        CalibrationError: if the text is missing, unreadable, too short, or of a language that the tokenizer does not
            know; if seqlen is beyond the model's context; or as `CalibrationSettings` raises it.
        TokenizerError: if the checkpoint has no tokenizer, or one with more tokens than the model.
        MissingExtraError: if a data set on the Hub is asked for and pyarrow is not installed.
        DiskFullError: if `self` is asked for and there is no room for the model's float export.

    Example:
        >>> calibration_tokens("self", open_checkpoint("smollm2"), nsamples=2, seqlen=32).shape
        (2, 32)
    """
    settings = CalibrationSettings(dataset=source, nsamples=nsamples, seqlen=seqlen, seed=seed)
    told = progress or Silent()
    context = checkpoint.config.max_context
    if seqlen > context:
        raise CalibrationError(
            f"Calibration sequences of {seqlen} tokens are longer than the model's context of {context}. "
            f"Ask for {context} tokens or fewer."
        )
    tokenizer = _tokenizer(checkpoint)
    if source == SELF:
        return write_text_by(
            checkpoint,
            tokenizer,
            prefix(tokenizer),
            nsamples=nsamples,
            seqlen=seqlen,
            seed=seed,
            progress=told,
            device=device or torch.device("cpu"),
            scratch=scratch,
        )
    text = _text(settings, told)
    ids = np.asarray(tokenizer.encode(text, special=False), np.int64)
    _check_tokens(ids, text, source, tokenizer, checkpoint, told)
    return _windows(ids, prefix(tokenizer), settings)


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    with tempfile.TemporaryDirectory(prefix="planish-") as folder:
        checkpoint.write_sidecars(Path(folder))
        return Tokenizer(Path(folder))


def _text(settings: CalibrationSettings, told: Progress) -> str:
    path = Path(settings.dataset)
    if not path.is_file():
        return hub_text(settings.dataset, settings.nsamples * settings.seqlen * _CHARACTERS_PER_TOKEN, told)
    try:
        return read_text(path)
    except TextError as error:
        raise CalibrationError(f"Calibration text: {error}") from error


def _check_tokens(
    ids: npt.NDArray[np.int64], text: str, source: str, tokenizer: Tokenizer, checkpoint: Checkpoint, told: Progress
) -> None:
    """Check that `ids`, the tokens of `text`, stand for text that the model handles."""
    kinds, counts = np.unique(ids, return_counts=True)
    if len(ids) and kinds[-1] >= checkpoint.config.vocab_size:
        raise TokenizerError(
            f"The tokenizer gives token {kinds[-1]}, and the model has {checkpoint.config.vocab_size} tokens. "
            "Copy the model's own tokenizer files beside its weights."
        )
    found = fragments(tokenizer, kinds.tolist())
    share = counts[np.isin(kinds, list(found))].sum() / max(len(ids), 1)
    finding = (
        f"The calibration text {source} does not suit the tokenizer of {checkpoint.name}: it takes "
        f"{len(ids) / len(text):.2f} tokens per character (English: 0.25), and {share:.0%} of them are pieces of "
        "characters or unknown"
    )
    if share > _MAX_FRAGMENTS:
        raise CalibrationError(f"{finding}. Give text in a language that the model was trained on.")
    if share > _TOLD_FRAGMENTS:
        told.say(f"{finding}; it is used all the same")


def _windows(ids: npt.NDArray[np.int64], before: list[int], settings: CalibrationSettings) -> npt.NDArray[np.int64]:
    """Return windows of `ids` chosen at random, each behind the tokens `before`: int64 [nsamples, seqlen]."""
    nsamples, seqlen = settings.nsamples, settings.seqlen
    length = seqlen - len(before)
    fit = len(ids) // length
    if nsamples > fit:
        remedy = f"Ask for at most {fit} (--nsamples), or for shorter ones" if fit else "Ask for shorter ones"
        raise CalibrationError(
            f"The calibration text {settings.dataset} has {len(ids)} tokens: {fit} sequences of {seqlen} fit, "
            f"{nsamples} were asked for. {remedy} (--seqlen), or give more text."
        )
    chosen = np.random.default_rng(settings.seed).choice(fit, nsamples, replace=False)
    windows = ids[: fit * length].reshape(fit, length)[chosen]
    return np.concatenate([np.tile(np.asarray(before, np.int64), (nsamples, 1)), windows], axis=1)
