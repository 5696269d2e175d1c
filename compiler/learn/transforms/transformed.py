"""A checkpoint with transforms folded into its weights: what the oracle and the quantiser read."""

from typing import Any

import numpy as np
import numpy.typing as npt

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.learn.block import read_block
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.learn.transforms.fold import fold_block
from planish.passes.transforms import SITES, Transforms

__all__ = ["TransformedCheckpoint"]

_EMBEDDINGS, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class TransformedCheckpoint(Checkpoint):
    """Another checkpoint folded with `transforms`, float32, one block in memory at a time; a scaled lm_head is untied.

    What runs online is left to whoever computes with it. It shares no code with the graph passes that do the same.
    """

    def __init__(self, original: Checkpoint, transforms: Transforms) -> None:
        untied = {} if transforms.head is None else {"tie_word_embeddings": False}
        super().__init__(original.name, original.raw_config | untied)
        self.transforms = transforms
        self._original = original
        self._folded: tuple[int, dict[str, npt.NDArray[Any]]] = (-1, {})

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return float32 for what is in a block or scaled, and the original's type for the rest."""
        folded = name.startswith("model.layers.") or (self.transforms.head is not None and name in (_NORM, _HEAD))
        return np.dtype(np.float32) if folded else self._original.dtype(name)

    def _read(self, name: str) -> npt.NDArray[Any]:
        scale = self.transforms.head
        if scale is not None and name == _NORM:
            return (self._original._read(name) * scale.astype(np.float64)).astype(np.float32)
        if scale is not None and name == _HEAD:
            tied = self._original.config.tie_word_embeddings
            return (self._original._read(_EMBEDDINGS if tied else _HEAD) / scale.astype(np.float64)).astype(np.float32)
        if not name.startswith("model.layers."):
            return self._original._read(name)
        layer, rest = int(name.split(".")[2]), ".".join(name.split(".")[3:])
        if self._folded[0] != layer:
            factors = {site: Factors.of(self.transforms.layers[layer][site]) for site in SITES}
            folded = fold_block(read_block(self._original, layer), factors)
            self._folded = layer, {each: tensor.numpy() for each, tensor in folded.tensors.items()}
        return self._folded[1][rest]

    def fingerprint(self) -> str:
        """Return the fingerprint of the original."""
        return self._original.fingerprint()

    def check_tokenizer(self) -> None:
        """Check the tokenizer of the original."""
        self._original.check_tokenizer()

    def write_sidecars(self, folder: Any) -> None:
        """Write the sidecars of the original."""
        self._original.write_sidecars(folder)
