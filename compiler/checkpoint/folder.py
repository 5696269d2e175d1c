"""A Hugging Face checkpoint folder: config.json, safetensors in one file or in shards, tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from planish.compiler.checkpoint.base import Checkpoint
from planish.compiler.checkpoint.files import fingerprint_files, read_json
from planish.compiler.checkpoint.safetensors_file import SafetensorsFile, StoredTensor
from planish.compiler.checkpoint.sidecars import check_tokenizer_files, copy_sidecars, sidecar_files
from planish.compiler.checkpoint.tensors import check_tensors
from planish.compiler.errors import CheckpointError, UnsupportedModelError

__all__ = ["FolderCheckpoint"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

#: Rows compared at a time where two stored tensors should be equal.
_ROWS = 4096


class FolderCheckpoint(Checkpoint):
    """A folder as transformers' save_pretrained writes it."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        """Open the folder: read the headers of all weight files and check them against config.json.

        Raises:
            CheckpointError: if a file is missing, damaged, or disagrees with config.json.
            UnsupportedModelError: if the model is not one planish compiles.
        """
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            raise UnsupportedModelError(
                f"{folder} holds an adapter. Merge it into its model, save that, and give that."
            )
        super().__init__(name or folder.resolve().name, read_json(folder / "config.json"))
        self._folder = folder
        self._files = _weight_files(folder)
        self._stored = _stored_tensors(folder, self._files)
        shapes = {name: tensor.shape for name, tensor in self._stored.items()}
        check_tensors(str(folder), self.config, shapes)
        for name in self._shapes:
            _ = self._stored[name].dtype
        self._check_tied_head()

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return the type the tensor is stored in."""
        self.shape(name)
        return self._stored[name].dtype

    def _read(self, name: str) -> npt.NDArray[Any]:
        self.shape(name)
        return self._stored[name].read()

    def fingerprint(self) -> str:
        """Return a sha256 over weights, configuration and tokenizer; see `fingerprint_files`."""
        starts: dict[Path, list[int]] = {}
        for tensor in self._stored.values():
            starts.setdefault(tensor.path, []).append(tensor.offset)
        return fingerprint_files([*self._files, *sidecar_files(self._folder)], starts)

    def check_tokenizer(self) -> None:
        """Check that the folder holds a tokenizer."""
        check_tokenizer_files(self._folder)

    def write_sidecars(self, folder: Path) -> None:
        """Copy configuration, tokenizer and chat template."""
        copy_sidecars(self._folder, folder)

    def _check_tied_head(self) -> None:
        """Refuse a tied lm_head that is stored and is something else than the embedding."""
        head = self._stored.get("lm_head.weight")
        if head is None or not self.config.tie_word_embeddings:
            return
        embedding = self._stored["model.embed_tokens.weight"]
        same = head.shape == embedding.shape and head.dtype == embedding.dtype
        for first in range(0, head.shape[0] if same else 0, _ROWS):
            same = same and np.array_equal(
                head.read(first, _ROWS).view(np.uint8), embedding.read(first, _ROWS).view(np.uint8)
            )
        if not same:
            raise CheckpointError(
                f"{self._folder}: config.json ties lm_head.weight to the embedding, but the "
                "stored lm_head.weight differs. Set tie_word_embeddings to false in config.json to use it."
            )


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder; one file wins over an index, as in transformers."""
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file():
        return [single]
    if index.is_file():
        files = [folder / name for name in sorted(set(_weight_map(index).values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise CheckpointError(
                f"{folder} lacks {', '.join(absent)}, which {_INDEX} names. Download the missing shards."
            )
        return files
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".safetensors"))
    if others:
        raise CheckpointError(
            f"{folder} holds {', '.join(others[:4])} but neither {_SINGLE} nor {_INDEX}. Load the model with "
            "transformers and save it with save_pretrained, which writes safetensors."
        )
    raise CheckpointError(f"{folder} holds no weights ({_SINGLE} or {_INDEX}). Download the checkpoint again.")


def _weight_map(index: Path) -> dict[str, str]:
    """Return tensor name -> shard name of a shard index."""
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(each, str) for each in weight_map.values())
    ):
        raise CheckpointError(f"{index} has no weight_map of file names. Download it again.")
    return weight_map


def _stored_tensors(folder: Path, files: list[Path]) -> dict[str, StoredTensor]:
    """Read all headers and return where each tensor is stored."""
    held = {file.relative_to(folder).as_posix(): SafetensorsFile(file).tensors for file in files}
    if files == [folder / _SINGLE]:
        return held[_SINGLE]
    stored = {}
    for name, shard in _weight_map(folder / _INDEX).items():
        if name not in held[Path(shard).as_posix()]:
            raise CheckpointError(f"{folder / shard} lacks {name}, which {_INDEX} says it holds. Download it again.")
        stored[name] = held[Path(shard).as_posix()][name]
    return stored
