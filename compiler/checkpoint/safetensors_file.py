"""One safetensors file: its header checked against its size, its tensors read one at a time.

The format is eight bytes of header length (little-endian), a JSON header with type, shape and byte range of
every tensor, then the data. Reading it with plain file reads instead of a memory map keeps the resident
memory at one tensor: pages of a map that were touched count as resident until the system takes them back.
"""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from planish.compiler.checkpoint.files import remedy_for
from planish.compiler.errors import CheckpointError, UnsupportedModelError

__all__ = ["SafetensorsFile", "StoredTensor"]

#: The format's own limit on the header, in bytes.
_MAX_HEADER = 100_000_000

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in a file and what it is; `offset` is in bytes from the file's start."""

    path: Path
    type_name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type.

        Raises:
            UnsupportedModelError: if it is not float32, float16 or bfloat16.
        """
        try:
            return _DTYPES[self.type_name]
        except KeyError:
            raise UnsupportedModelError(
                f"{self.path} holds weights of type {self.type_name}; planish reads {', '.join(_DTYPES)}. "
                "Give it a checkpoint in float32, float16 or bfloat16."
            ) from None

    def read(self, first: int = 0, rows: int | None = None) -> npt.NDArray[Any]:
        """Read the tensor, or `rows` of its first axis starting with row `first`."""
        shape = self.shape if rows is None else (min(rows, self.shape[0] - first), *self.shape[1:])
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        size = prod(shape) * self.dtype.itemsize
        data = np.fromfile(self.path, np.uint8, size, offset=self.offset + first * row_bytes)
        if data.size != size:
            raise CheckpointError(f"{self.path} became shorter while it was read. Start again when it is complete.")
        return data.view(self.dtype).reshape(shape)


class SafetensorsFile:
    """The header of one safetensors file.

    Attributes:
        tensors: what the file holds, by name.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header.

        Raises:
            CheckpointError: if the file is missing, truncated, or not a safetensors file.
        """
        header, start, size = _read_header(path)
        self.tensors: dict[str, StoredTensor] = {}
        data_end = start
        for name, entry in header.items():
            try:
                begin, end = map(int, entry["data_offsets"])
                tensor = StoredTensor(path, str(entry["dtype"]), tuple(map(int, entry["shape"])), start + begin)
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{path} is damaged: its entry for {name} is unreadable. Get it again."
                ) from error
            if tensor.type_name in _DTYPES and end - begin != prod(tensor.shape) * tensor.dtype.itemsize:
                raise CheckpointError(
                    f"{path} is damaged: {name} of shape {list(tensor.shape)} and type {tensor.type_name} "
                    f"has {end - begin} bytes. Download it again."
                )
            data_end = max(data_end, start + end)
            self.tensors[name] = tensor
        if data_end != size:
            state = "truncated" if data_end > size else "longer than its header says"
            raise CheckpointError(f"{path} is {state}: {size} bytes instead of {data_end}. Download it again.")


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header without its free-form metadata, the data's start, and the file's size (bytes)."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER
            if length >= _MAX_HEADER or 8 + length > size:
                raise CheckpointError(
                    f"{path} is truncated or not a safetensors file: its header does not fit into its "
                    f"{size} bytes. {remedy_for(path)}"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}). Check the path and its permissions."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header is no JSON. Download it again.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is no JSON object. Download it again.")
    header.pop("__metadata__", None)
    return header, 8 + length, size
