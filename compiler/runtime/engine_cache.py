"""The keys and values of an engine: on the GPU, at full length from the start, extended where they lie."""

import dataclasses
from collections.abc import Sequence
from math import prod

import numpy as np
import numpy.typing as npt

from planish.compiler.backends.tensorrt.engine_json import EngineRecord
from planish.compiler.backends.tensorrt.gpu import DeviceMemory, Gpu

__all__ = ["CacheTensor", "EngineCache", "Store", "cache_tensors"]

Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class CacheTensor:
    """One cache tensor of an engine.

    Attributes:
        past: the input.
        present: the output that extends it.
        shape: of one sequence, [kv_heads, context, numbers].
        nbytes: of one sequence.
        in_place: whether the output has the memory of the input; if not, each step writes it to other memory.
    """

    past: str
    present: str
    shape: tuple[int, ...]
    nbytes: int
    in_place: bool


def cache_tensors(record: EngineRecord, in_place: dict[str, bool]) -> tuple[CacheTensor, ...]:
    """Return the cache tensors of an engine in the order of its inputs.

    Args:
        record: its engine.json.
        in_place: name of the output -> whether it has the memory of its input.
    """
    found = []
    for past, given in record.inputs.items():
        if past.startswith("past_key_values."):
            present = past.replace("past_key_values", "present", 1)
            size = prod(given.max[1:]) * np.dtype(given.dtype).itemsize
            found.append(CacheTensor(past, present, given.max[1:], size, in_place[present]))
    return tuple(found)


class Store:
    """Memory of the cache tensors for some sequences.

    Attributes:
        batch: sequences.
        length: tokens that it holds of each, padding included; whatever lies behind them means nothing.
        current: name of the input -> where the keys or values are.
        other: name of the input -> where the next step writes them; the same memory where it writes in place.
    """

    def __init__(self, gpu: Gpu, tensors: Sequence[CacheTensor], batch: int, length: int = 0) -> None:
        """Allocate zeros: an engine multiplies what it must not see by 0, and of NaN nothing makes a 0.

        Raises:
            DeviceError: if the GPU's memory is too small.
        """
        self._gpu, self._tensors = gpu, tuple(tensors)
        self.batch, self.length = batch, length
        self.current = {each.past: gpu.allocate(batch * each.nbytes) for each in tensors}
        self.other: dict[str, DeviceMemory] = {
            each.past: self.current[each.past] if each.in_place else gpu.allocate(batch * each.nbytes)
            for each in tensors
        }

    def turn(self, tokens: int) -> None:
        """Count the tokens of a step, which now are where it has written them."""
        self.current, self.other = self.other, self.current
        self.length += tokens

    def take(self, rows: Sequence[int], length: int) -> "Store":
        """Return a copy that holds the first `length` tokens of the sequences `rows`, in this order."""
        taken = Store(self._gpu, self._tensors, len(rows), length)
        for each in self._tensors:
            to, source = taken.current[each.past], self.current[each.past]
            for place, row in enumerate(rows):
                self._gpu.copy(to, place * each.nbytes, source, row * each.nbytes, each.nbytes)
        return taken


@dataclasses.dataclass(frozen=True)
class EngineCache:
    """The keys and values of the tokens that an engine has seen.

    Caches of one history share a store: an older one is the first part of it.

    Attributes:
        store: where they are.
        mask: int64 [batch, tokens], 1 for real tokens, 0 for padding.
    """

    store: Store
    mask: Ints

    def __len__(self) -> int:
        """Return the number of cached tokens, padding included."""
        return int(self.mask.shape[1])

    def take(self, rows: Sequence[int]) -> "EngineCache":
        """Return a copy that holds the sequences `rows` of the batch, in this order; any of them several times.

        Raises:
            DeviceError: if the GPU's memory is too small.
        """
        return EngineCache(self.store.take(rows, len(self)), self.mask[list(rows)])

    def own(self) -> Store:
        """Return a store that may be extended behind this cache: a copy, if a later cache has extended this one's."""
        if self.store.length == len(self):
            return self.store
        return self.store.take(range(self.store.batch), len(self))
