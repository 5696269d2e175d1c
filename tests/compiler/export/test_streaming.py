"""Tensors written slice by slice are what they are when written whole."""

import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.export import streaming
from planish.compiler.export.streaming import CheckpointTensor


class OneTensor(Checkpoint):
    """A checkpoint of one tensor, called w."""

    def __init__(self, stored: npt.NDArray[Any]) -> None:
        self._stored = stored
        self._shapes = {"w": stored.shape}

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._stored.dtype

    def _read(self, name: str) -> npt.NDArray[Any]:
        return self._stored

    def fingerprint(self) -> str:
        return ""

    def check_tokenizer(self) -> None: ...

    def write_sidecars(self, folder: Path) -> None: ...


def random_tensor(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    return np.random.default_rng(3).standard_normal(shape, np.float32).astype(dtype)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("written", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", [(70, 45), (1, 300), (300, 1), (33, 64), (2, 5000)], ids=str)
def test_matrices(
    stored: Any,
    written: ir.DataType,
    transpose: bool,
    shape: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A prime, so that slices end in the middle of everything.
    monkeypatch.setattr(streaming, "_CHUNK", 997)
    array = random_tensor(shape, stored)
    tensor = CheckpointTensor(OneTensor(array), "w", written, transpose=transpose)
    with (tmp_path / "w").open("wb") as file:
        file.write(b"before")
        tensor.tofile(file)
        file.write(b"after")
    expected = np.ascontiguousarray(array.T if transpose else array).astype(written.numpy())
    assert (tmp_path / "w").read_bytes() == b"before" + expected.tobytes() + b"after"
    # The same when it is asked for as a whole.
    assert tensor.shape.numpy() == expected.shape
    np.testing.assert_array_equal(tensor.numpy(), expected)


def test_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_CHUNK", 7)
    array = random_tensor((100,), ml_dtypes.bfloat16)
    with (tmp_path / "w").open("wb") as file:
        CheckpointTensor(OneTensor(array), "w").tofile(file)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "w", np.float32), array.astype(np.float32))


@pytest.mark.parametrize("transpose", [False, True])
def test_memory_holds_one_slice(transpose: bool, tmp_path: Path) -> None:
    tensor = CheckpointTensor(OneTensor(random_tensor((4096, 4096), np.float16)), "w", transpose=transpose)
    with (tmp_path / "w").open("wb") as file:
        tracemalloc.start()
        try:
            tensor.tofile(file)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    # The converted tensor is 64 MiB; a slice is 4 MiB, and once more while it is converted.
    assert peak < 12 << 20
