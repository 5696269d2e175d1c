"""The hidden states between decoder blocks, kept on disk so that memory holds one batch and a killed run goes on."""

import dataclasses
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from planish.compiler.learn.streams import Streams

__all__ = ["StoredSequences", "StreamFiles"]

_BYTES = np.dtype(np.float32).itemsize


@dataclasses.dataclass(frozen=True)
class StoredSequences:
    """One of the two streams of a file, read with plain file reads: pages of a memory map would stay resident.

    Attributes:
        path: the file.
        shape: [sequences, seq, hidden].
        offset: of its first byte in the file.
        device: where slices are brought to.
    """

    path: Path
    shape: torch.Size
    offset: int
    device: torch.device

    def __len__(self) -> int:
        """Return the number of sequences."""
        return self.shape[0]

    def __getitem__(self, part: slice, /) -> Tensor:
        """Read some of the sequences, float32 [number, seq, hidden] on `device`."""
        start, stop, _ = part.indices(len(self))
        size = prod(self.shape[1:])
        values = np.fromfile(self.path, np.float32, (stop - start) * size, offset=self.offset + _BYTES * start * size)
        return torch.from_numpy(values.reshape(stop - start, *self.shape[1:])).to(self.device)


class StreamFiles:
    """Two streams, of the float model and of the model quantised so far, in one file per block: its inputs.

    A file is a float32 array [2, sequences, seq, hidden] in numpy's format, written whole or not at all; only the
    newest is kept. The float model's half of the next file is written first, as the outputs that a block is fitted to.
    """

    def __init__(self, folder: Path, held_out: int, device: torch.device | None = None) -> None:
        """Keep the files in `folder`, which is made if need be; bring what is read to `device`, None for the CPU."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._held_out = held_out
        self._device = device or torch.device("cpu")

    def newest(self) -> int | None:
        """Return the block whose inputs are there, the number of blocks after the last one, or None."""
        layers = [int(path.stem.split("-")[1]) for path in self._folder.glob("inputs-*.npy")]
        return max(layers, default=None)

    def begin(self, token_ids: npt.NDArray[np.int64], embed: Callable[[npt.NDArray[np.int64]], Tensor]) -> None:
        """Write the inputs of block 0 for `token_ids` [sequences, seq]; `embed` is called with some rows at a time."""
        width = embed(token_ids[:1]).shape[-1]
        unfinished = self._unfinished(0)
        with unfinished.open("wb") as file:
            _write_header(file, (2, *token_ids.shape, width))
            for _ in range(2):
                for row in range(len(token_ids)):
                    embed(token_ids[row : row + 1]).numpy().tofile(file)
        unfinished.rename(self._path(0))

    def open(self, layer: int) -> Streams:
        """Return the inputs of a block, read as they are used."""
        target, seen = self._halves(self._path(layer))
        return Streams(target, seen, self._held_out)

    def write_outputs(self, layer: int, run: Callable[[Tensor], Tensor]) -> StoredSequences:
        """Write and return what `run`, the float block `layer`, makes of the float stream; `advance` goes on there."""
        streams, unfinished = self.open(layer), self._unfinished(layer + 1)
        with unfinished.open("wb") as file:
            _write_header(file, (2, *streams.target.shape))
            for part in streams.all_batches():
                run(streams.target[part]).cpu().numpy().tofile(file)
        return self._halves(unfinished)[0]

    def open_float(self, layer: int) -> Streams:
        """Return the inputs of a block behind float blocks: both streams are the float model's."""
        target, _ = self._halves(self._path(layer))
        return Streams(target, target, self._held_out)

    def advance(self, layer: int, run: Callable[[Tensor], Tensor] | None = None) -> None:
        """Write the inputs of the block after `layer`, behind its outputs that `write_outputs` wrote.

        Args:
            layer: the block that was computed.
            run: the quantised block; None is none, and `open_float` reads what is there.
        """
        streams, unfinished = self.open(layer), self._unfinished(layer + 1)
        if run:
            with unfinished.open("r+b") as file:
                file.seek(self._halves(unfinished)[1].offset)
                for part in streams.all_batches():
                    run(streams.seen[part]).cpu().numpy().tofile(file)
        unfinished.rename(self._path(layer + 1))
        self._path(layer).unlink()

    def _halves(self, path: Path) -> tuple[StoredSequences, StoredSequences]:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            (_, *shape), _, _ = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
        first, second = (
            StoredSequences(path, torch.Size(shape), start + half * _BYTES * prod(shape), self._device)
            for half in range(2)
        )
        return first, second

    def _path(self, layer: int) -> Path:
        return self._folder / f"inputs-{layer}.npy"

    def _unfinished(self, layer: int) -> Path:
        return self._path(layer).with_suffix(".part")


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
