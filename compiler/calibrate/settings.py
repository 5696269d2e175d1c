"""Which text a model is calibrated on, and how much of it."""

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, field_validator

from planish.compiler.calibrate.hub_text import is_hub_name
from planish.compiler.checkpoint.files import fingerprint_files
from planish.compiler.errors import CalibrationError

__all__ = ["SELF", "CalibrationSettings"]

#: The data set that the model writes itself.
SELF = "self"

#: Shorter sequences hold little besides their first tokens, whose activations are unlike all others.
_MIN_SEQLEN = 16


class CalibrationSettings(BaseModel):
    """Which text a model is calibrated on, and how much of it; checked when made.

    Attributes:
        dataset: a text file, a `.jsonl` file whose lines have a field `text`, a data set on the Hugging Face Hub
            (`owner/name[:config][:split]`), or `self`: text that the model writes. A file wins over a name.
        nsamples: how many sequences.
        seqlen: tokens in a sequence.
        seed: of the choice of sequences, or of the writing.

    Raises:
        CalibrationError: if there is nothing called `dataset`, or a number is out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str = SELF
    nsamples: int = 16
    seqlen: int = 512
    seed: int = 0

    # CalibrationError is no ValueError, so it leaves pydantic as it is, with its own words and exit code.
    @field_validator("dataset")
    @classmethod
    def _check_dataset(cls, dataset: str) -> str:
        path = Path(dataset)
        if dataset == SELF or path.is_file():
            return dataset
        if path.suffix in (".txt", ".jsonl") or not is_hub_name(dataset):
            raise CalibrationError(
                f"The calibration text '{dataset}' does not exist. Give a .txt file, a .jsonl file, a data set on the "
                f"Hub (owner/name, owner/name:config or owner/name:config:split), or '{SELF}'."
            )
        return dataset

    @field_validator("nsamples")
    @classmethod
    def _check_nsamples(cls, nsamples: int) -> int:
        if nsamples < 1:
            raise CalibrationError(f"{nsamples} calibration sequences hold nothing. Ask for 1 or more.")
        return nsamples

    @field_validator("seqlen")
    @classmethod
    def _check_seqlen(cls, seqlen: int) -> int:
        if seqlen < _MIN_SEQLEN:
            raise CalibrationError(
                f"Calibration sequences of {seqlen} tokens are too short to stand for text. "
                f"Ask for {_MIN_SEQLEN} tokens or more."
            )
        return seqlen

    @field_validator("seed")
    @classmethod
    def _check_seed(cls, seed: int) -> int:
        if seed < 0:
            raise CalibrationError(f"The calibration seed {seed} is negative. Give 0 or more.")
        return seed

    def fingerprint(self) -> str:
        """Return a sha256 (hex) that differs when the settings or the content of a text file do.

        The folder of a file does not count. What `self` and the tokenizer make of it depends on the checkpoint too,
        which has a fingerprint of its own; a data set on the Hub counts by its name.

        Example:
            >>> CalibrationSettings(seed=1).fingerprint() == CalibrationSettings(seed=2).fingerprint()
            False
        """
        path = Path(self.dataset)
        dataset = fingerprint_files([path]) if self.dataset != SELF and path.is_file() else self.dataset
        settings = self.model_copy(update={"dataset": dataset})
        return hashlib.sha256(settings.model_dump_json().encode()).hexdigest()
