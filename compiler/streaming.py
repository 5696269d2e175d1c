"""Checkpoint tensors that are read, converted and written a slice at a time, when the model is saved."""

from typing import BinaryIO

import ml_dtypes  # noqa: F401  (gives numpy the bfloat16 that checkpoints hold)
import numpy as np
import onnx_ir as ir

from planish.compiler.checkpoint import Checkpoint

__all__ = ["CheckpointTensor"]

#: Elements converted at a time: 64 MiB of float32.
_CHUNK = 1 << 24


class CheckpointTensor(ir.LazyTensor):
    """A checkpoint tensor of shape [...] or, transposed, [in, out], converted to `dtype` on the way to disk.

    Saving holds the stored tensor and one slice of the converted one, never the whole converted tensor.
    """

    def __init__(
        self, checkpoint: Checkpoint, name: str, dtype: ir.DataType = ir.DataType.FLOAT, *, transpose: bool = False
    ) -> None:
        shape = checkpoint.shape(name)

        def read() -> ir.Tensor:
            array = checkpoint.tensor(name)
            return ir.Tensor(np.ascontiguousarray(array.T if transpose else array, dtype.numpy()), dtype=dtype)

        super().__init__(read, dtype, ir.Shape(shape[::-1] if transpose else shape), name=name)
        self._checkpoint = checkpoint
        self._transpose = transpose

    def tofile(self, file: BinaryIO) -> None:
        """Write the converted tensor to `file`, slice by slice."""
        assert self.name is not None
        array = self._checkpoint.tensor(self.name)
        if self._transpose:
            array = array.T
        rows = max(1, _CHUNK // max(1, array[:1].size))
        for start in range(0, array.shape[0], rows):
            np.ascontiguousarray(array[start : start + rows], self.dtype.numpy()).tofile(file)
