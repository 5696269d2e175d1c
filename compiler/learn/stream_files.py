"""The hidden states between decoder blocks, kept on disk so that memory holds one batch and a killed run goes on."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from planish.compiler.learn.streams import Streams

__all__ = ["StreamFiles"]


class StreamFiles:
    """Two streams, of the float model and of the model quantised so far, in one file per block: its inputs.

    A file is float32 [2, sequences, seq, hidden], written whole or not at all; only the newest is kept.
    """

    def __init__(self, folder: Path, held_out: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._held_out = held_out

    def newest(self) -> int | None:
        """Return the block whose inputs are there, the number of blocks after the last one, or None."""
        layers = [int(path.stem.split("-")[1]) for path in self._folder.glob("inputs-*.npy")]
        return max(layers, default=None)

    def begin(self, token_ids: np.ndarray, embed: Callable[[Tensor], Tensor]) -> None:
        """Write the inputs of block 0 for `token_ids` [sequences, seq]."""
        hidden = embed(torch.from_numpy(token_ids)).numpy()
        self._write(0, hidden.shape, lambda streams: streams.__setitem__(slice(None), hidden))

    def open(self, layer: int) -> Streams:
        """Return the inputs of a block, read as they are used."""
        # Mapped copy-on-write: PyTorch does not know read-only tensors.
        target, seen = torch.from_numpy(np.load(self._path(layer), mmap_mode="c"))
        return Streams(target, seen, self._held_out)

    def advance(self, layer: int, outputs: Tensor, seen: Callable[[Tensor], Tensor]) -> None:
        """Write the inputs of the block after `layer`.

        Args:
            layer: the block that was computed.
            outputs: its float outputs.
            seen: its quantised outputs for its quantised inputs.
        """
        streams = self.open(layer)

        def fill(file: np.ndarray) -> None:
            file[0] = outputs.numpy()
            for held_out in (False, True):
                for part in streams.batches(held_out=held_out):
                    file[1, part] = seen(streams.seen[part]).numpy()

        self._write(layer + 1, tuple(outputs.shape), fill)
        self._path(layer).unlink()

    def _path(self, layer: int) -> Path:
        return self._folder / f"inputs-{layer}.npy"

    def _write(self, layer: int, shape: tuple[int, ...], fill: Callable[[np.ndarray], None]) -> None:
        unfinished = self._path(layer).with_suffix(".part")
        file = np.lib.format.open_memmap(unfinished, "w+", np.float32, (2, *shape))
        fill(file)
        file.flush()
        unfinished.rename(self._path(layer))
