"""Checkpoint tensors that are read, converted and written a slice at a time, when the model is saved."""

from typing import BinaryIO

import ml_dtypes  # noqa: F401  (gives numpy the bfloat16 that checkpoints hold)
import numpy as np
import onnx_ir as ir

from planish.compiler.checkpoint import Checkpoint

__all__ = ["CheckpointTensor"]

#: Elements converted at a time: 4 MiB of float32, still in the processor's cache when they are written.
_CHUNK = 1 << 20
#: Rows of the stored matrix transposed at a time: a cache line of what is written takes 16 of them.
_ROWS = 32


class CheckpointTensor(ir.LazyTensor):
    """A checkpoint tensor of shape [...] or, transposed, [in, out], converted to `dtype` on the way to disk.

    Saving holds the stored tensor and one slice of the converted one, never the whole converted tensor.
    """

    def __init__(
        self, checkpoint: Checkpoint, name: str, dtype: ir.DataType = ir.DataType.FLOAT, *, transpose: bool = False
    ) -> None:
        shape = checkpoint.shape(name)

        def read() -> ir.TensorProtocol:
            array = checkpoint.tensor(name)
            return ir.Tensor(np.ascontiguousarray(array.T if transpose else array, dtype.numpy()), dtype=dtype)

        super().__init__(read, dtype, ir.Shape(shape[::-1] if transpose else shape), name=name)
        self._checkpoint = checkpoint
        self._transpose = transpose

    def tofile(self, file: BinaryIO) -> None:
        """Write the converted tensor to `file`, slice by slice."""
        assert self.name is not None
        stored = self._checkpoint.tensor(self.name)
        matrix = stored.T if self._transpose else stored.reshape(len(stored), -1)
        length, width = matrix.shape
        rows = max(1, _CHUNK // width)
        buffer = np.empty((min(rows, length), width), self.dtype.numpy())
        for start in range(0, length, rows):
            part = matrix[start : start + rows]
            converted = buffer[: len(part)]
            # numpy alone would go through the whole stored matrix once per row written.
            step = _ROWS if self._transpose else width
            for column in range(0, width, step):
                block = part[:, column : column + step]
                converted[:, column : column + step] = block.astype(converted.dtype, order="K")
            converted.tofile(file)
