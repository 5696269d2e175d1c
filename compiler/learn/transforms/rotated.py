"""A checkpoint whose residual stream is rotated: the base that the transforms of the blocks may stand on."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.learn.transforms.hadamard import hadamard_transform
from planish.passes.transforms import Array, orthogonal

__all__ = ["RotatedCheckpoint"]

_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
#: Linear -> the norm that it reads.
_NORM_OF = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "input_layernorm"),
    **dict.fromkeys(("gate_proj", "up_proj"), "post_attention_layernorm"),
}


class RotatedCheckpoint(Checkpoint):
    """Another checkpoint in the basis x -> x R, with all norm gains folded away and lm_head untied.

    R is a randomised Hadamard rotation: R1 of QuaRot (arXiv 2404.00456). It computes what the original does. It shares
    no code with the graph passes that do the same, and rounds embeddings to float16 before and after, as they do.

    Attributes:
        original: the checkpoint.
        rotation: R, float32 [hidden, hidden].
    """

    def __init__(self, original: Checkpoint, seed: int) -> None:
        super().__init__(original.name, {**original.raw_config, "tie_word_embeddings": False})
        matrix = hadamard_transform(self.config.hidden_size, seed).matrix()
        self.rotation: Array = np.ascontiguousarray(matrix, np.float32)
        self._exact = orthogonal(self.rotation)
        self.original = original

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return float16 for the embeddings, and float32 for the rest."""
        self.shape(name)
        return np.dtype(np.float16 if name == _EMBEDDINGS else np.float32)

    def _read(self, name: str) -> npt.NDArray[Any]:
        if name == _EMBEDDINGS:
            table = self.original._read(name).astype(np.float16).astype(np.float64)
            return np.asarray(table @ self._exact).astype(np.float16)
        if name == _HEAD:
            tied = self.original.config.tie_word_embeddings
            head = self._double(_EMBEDDINGS if tied else _HEAD) * self._double("model.norm.weight")
            return np.asarray(head @ self._exact).astype(np.float32)
        *path, module, kind = name.split(".")
        tensor = self._double(name)
        if module in _NORM_OF:
            if kind == "weight":
                norm = ".".join([*path[:3], _NORM_OF[module], "weight"])
                tensor = (tensor * self._double(norm)) @ self._exact
        elif module in ("o_proj", "down_proj"):
            # Both a weight's rows and a bias are what is added to the stream.
            tensor = (tensor.T @ self._exact).T
        else:
            tensor = np.ones_like(tensor)
        return tensor.astype(np.float32)

    def _double(self, name: str) -> npt.NDArray[np.float64]:
        return self.original._read(name).astype(np.float64)

    def fingerprint(self) -> str:
        """Return the fingerprint of the original."""
        return self.original.fingerprint()

    def check_tokenizer(self) -> None:
        """Check the tokenizer of the original."""
        self.original.check_tokenizer()

    def write_sidecars(self, folder: Path) -> None:
        """Write the sidecars of the original."""
        self.original.write_sidecars(folder)
