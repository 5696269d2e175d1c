"""The one face of every checkpoint, whatever files it is stored in."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.checkpoint.tensors import check_finite, expected_tensors

__all__ = ["Checkpoint"]


class Checkpoint(ABC):
    """A LLaMA checkpoint whose weights are read one tensor at a time, when they are asked for.

    Tensors have the names, shapes and channel order of transformers' LlamaForCausalLM. Nothing read is kept,
    so memory holds what the caller holds. Opening checks that all tensors are there with the right shapes.

    Attributes:
        name: what to call the model: the folder's or file's name, or the Hub id.
        config: the parsed and checked configuration.
        raw_config: the content of config.json.
    """

    def __init__(self, name: str, raw_config: dict[str, Any]) -> None:
        """Parse `raw_config`; see `LlamaConfig.from_dict` for what it raises."""
        self.name = name
        self.raw_config = raw_config
        self.config = LlamaConfig.from_dict(raw_config)
        self._shapes = expected_tensors(self.config)

    def names(self) -> list[str]:
        """Return the names of all tensors, in the order of the forward pass; a tied lm_head is not one."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; matrices are [out, in].

        Raises:
            KeyError: if the model has no such tensor.
        """
        return self._shapes[name]

    @abstractmethod
    def dtype(self, name: str) -> np.dtype[Any]:
        """Return the type `tensor(name)` has: float32, float16 or ml_dtypes.bfloat16."""

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """Read one tensor from disk.

        Raises:
            KeyError: if the model has no such tensor.
            NonFiniteWeightError: if it holds NaN or infinity.
        """
        weights = self._read(name)
        check_finite(name, weights)
        return weights

    @abstractmethod
    def _read(self, name: str) -> npt.NDArray[Any]:
        """Read one tensor from disk, unchecked."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a sha256 (hex) that differs when the checkpoint's content does; see `fingerprint_files`."""

    @abstractmethod
    def check_tokenizer(self) -> None:
        """Check that the checkpoint brings a tokenizer that can be read.

        Raises:
            TokenizerError: if it does not.
        """

    @abstractmethod
    def write_sidecars(self, folder: Path) -> None:
        """Write config.json, generation_config.json, the tokenizer and the chat template into `folder`.

        Files are taken over as they came, where they came as files.

        Raises:
            TokenizerError: if there is no tokenizer, or it cannot be read.
        """
