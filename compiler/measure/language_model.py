"""What every model that is measured can do, whatever runs it."""

from collections.abc import Sequence
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

__all__ = ["LanguageModel", "ModelCache"]


class ModelCache(Protocol):
    """The keys and values of the tokens that a model has seen."""

    def take(self, rows: Sequence[int]) -> Self:
        """Return a copy that holds the sequences `rows` of the batch, in this order; any of them several times."""


class LanguageModel(Protocol):
    """A model that runs new tokens behind cached ones, as `planish.compiler.runtime.session.Session` does."""

    def run(
        self, input_ids: npt.ArrayLike, cache: Any = None, *, mask: npt.ArrayLike | None = None, logits_to_keep: int = 0
    ) -> tuple[npt.NDArray[np.float32], Any]:
        """Return logits, float32 [batch, kept, vocab], and the extended `ModelCache`; see `Session.run`."""
