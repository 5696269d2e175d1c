"""The two streams that run through the blocks: what the float model makes, and the model quantised so far."""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Sequences", "Streams"]


class Sequences(Protocol):
    """Hidden states, float32 [sequences, seq, hidden], of which slices are taken.

    A tensor is one; what lies on disk is another, and only the slice that is taken is then in memory.
    """

    @property
    def shape(self) -> torch.Size:
        """Number of sequences, tokens in each, channels."""

    @property
    def device(self) -> torch.device:
        """Where slices are."""

    def __len__(self) -> int:
        """Return the number of sequences."""

    def __getitem__(self, part: slice, /) -> Tensor:
        """Return some of the sequences, on `device`."""


@dataclasses.dataclass(frozen=True)
class Streams:
    """The inputs of one block, or its outputs.

    Attributes:
        target: float32 [sequences, seq, hidden], of the float model.
        seen: the same of the model quantised so far.
        held_out: how many of the last sequences nothing is fitted to.
    """

    target: Sequences
    seen: Sequences
    held_out: int

    def batches(self, *, held_out: bool = False, size: int = 4) -> Iterator[slice]:
        """Yield which sequences to take together, of those to fit to or of those held out."""
        border = len(self.target) - self.held_out
        first, last = (border, len(self.target)) if held_out else (0, border)
        yield from (slice(start, min(start + size, last)) for start in range(first, last, size))

    def all_batches(self) -> Iterator[slice]:
        """Yield which sequences to take together, of all in their order."""
        yield from self.batches()
        yield from self.batches(held_out=True)
