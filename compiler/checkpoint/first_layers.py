"""The first few decoder blocks of a checkpoint, as a checkpoint: for quick tries of a large model."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.checkpoint.files import write_json

__all__ = ["FirstLayers", "open_first_layers"]


def open_first_layers(source: str | Path, layers: int | None) -> Checkpoint:
    """Open a checkpoint, cut to its first `layers` decoder blocks; None keeps all. See `open_checkpoint` for errors."""
    checkpoint = open_checkpoint(source)
    return checkpoint if layers is None else FirstLayers(checkpoint, layers)


class FirstLayers(Checkpoint):
    """Another checkpoint without its later decoder blocks; embeddings, final norm and lm_head stay."""

    def __init__(self, whole: Checkpoint, layers: int) -> None:
        """Keep the first `layers` blocks of `whole`.

        Raises:
            UnsupportedModelError: if it does not have that many.
        """
        whole.config.with_num_layers(layers)
        super().__init__(whole.name, {**whole.raw_config, "num_hidden_layers": layers})
        self._whole = whole

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return the type of the tensor in the whole checkpoint."""
        self.shape(name)
        return self._whole.dtype(name)

    def _read(self, name: str) -> npt.NDArray[Any]:
        self.shape(name)
        # The caller checks what it gets, so `tensor` of the whole would check twice.
        return self._whole._read(name)

    def fingerprint(self) -> str:
        """Return the fingerprint of the whole checkpoint, and how much of it is kept."""
        return f"{self._whole.fingerprint()}-{self.config.num_hidden_layers}"

    def check_tokenizer(self) -> None:
        """Check the tokenizer of the whole checkpoint."""
        self._whole.check_tokenizer()

    def write_sidecars(self, folder: Path) -> None:
        """Write the sidecars of the whole checkpoint, with the number of layers changed in config.json."""
        self._whole.write_sidecars(folder)
        write_json(folder / "config.json", self.raw_config)
