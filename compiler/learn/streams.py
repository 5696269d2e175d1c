"""The two streams that run through the blocks: what the float model makes, and the model quantised so far."""

import dataclasses
from collections.abc import Iterator

from torch import Tensor

__all__ = ["Streams"]


@dataclasses.dataclass(frozen=True)
class Streams:
    """The inputs of one block, or its outputs.

    Attributes:
        target: float32 [sequences, seq, hidden], of the float model.
        seen: the same of the model quantised so far.
        held_out: how many of the last sequences nothing is fitted to.
    """

    target: Tensor
    seen: Tensor
    held_out: int

    def batches(self, *, held_out: bool = False, size: int = 4) -> Iterator[slice]:
        """Yield which sequences to take together, of those to fit to or of those held out."""
        border = len(self.target) - self.held_out
        first, last = (border, len(self.target)) if held_out else (0, border)
        yield from (slice(start, min(start + size, last)) for start in range(first, last, size))
