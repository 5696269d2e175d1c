"""What everything that runs a model can do, and how much it takes at once."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from planish.compiler.errors import TokenizerError

__all__ = ["UNLIMITED", "LanguageModel", "Limits", "ModelCache", "check_call"]

Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much a model takes.

    Attributes:
        sequences: of a batch, at most; None is any number.
        context: tokens of a sequence and its padding, cached ones included, at most; None is what the model was made
            for.
    """

    sequences: int | None = None
    context: int | None = None


#: As many sequences and tokens as there is memory for.
UNLIMITED = Limits()


class ModelCache(Protocol):
    """The keys and values of the tokens that a model has seen."""

    def take(self, rows: Sequence[int]) -> Self:
        """Return a copy that holds the sequences `rows` of the batch, in this order; any of them several times."""


class LanguageModel(Protocol):
    """A model that runs new tokens behind cached ones, as `planish.compiler.runtime.session.Session` does."""

    @property
    def limits(self) -> Limits:
        """How much the model takes at once."""

    @property
    def runs_on(self) -> str:
        """What runs the model, and where, in words."""

    def run(
        self, input_ids: npt.ArrayLike, cache: Any = None, *, mask: npt.ArrayLike | None = None, logits_to_keep: int = 0
    ) -> tuple[npt.NDArray[np.float32], Any]:
        """Return logits, float32 [batch, kept, vocab], and the extended `ModelCache`; see `Session.run`."""


def check_call(ids: Ints, cached: int | None, mask: Ints, logits_to_keep: int, vocabulary: int) -> None:
    """Check what `LanguageModel.run` is given, as arrays, and the number of sequences in the cache, if there is one.

    Raises:
        ValueError: if they do not fit together, or a token is negative, which ONNX would count from the end of the
            vocabulary.
        TokenizerError: if a token is beyond the `vocabulary` of the model, as another model's tokenizer gives them.
    """
    if ids.ndim != 2 or not ids.size:
        raise ValueError(f"input_ids must be [batch, sequence], with a token at least, and has the shape {ids.shape}")
    if ids.min() < 0:
        raise ValueError(f"input_ids holds {ids.min()}: tokens count from 0; padding is any token where mask is 0")
    if ids.max() >= vocabulary:
        raise TokenizerError(
            f"The tokenizer gives token {ids.max()}, and the model has {vocabulary} tokens. "
            "Compile the model with its own tokenizer files beside its weights."
        )
    if mask.shape != ids.shape:
        raise ValueError(f"mask has the shape {mask.shape}, and input_ids {ids.shape}")
    if cached is not None and cached != len(ids):
        raise ValueError(f"the cache is of {cached} sequences, and input_ids has {len(ids)}")
    if logits_to_keep < 0:
        raise ValueError(f"logits_to_keep must be 0, for all, or more, not {logits_to_keep}")
