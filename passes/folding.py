"""Fold linear maps into weights: composed in float64, cast once, when the weight is read.

A pass that folds does not touch a weight. It notes a map on it; the next pass notes another; and when the model is
saved (or the weight is quantised, or merged with others) the weight is read from the checkpoint, all maps are applied
in float64, and the result is cast to the type the graph stores. So several folds cost one rounding, and no more than
one weight is in memory at a time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from planish.passes.blocks import GraphError

__all__ = ["Fold", "FoldedTensor", "Map", "fold"]

Matrix = npt.NDArray[np.float64]
#: A linear map of rows, float64 [..., n] -> [..., n].
Map = Callable[[Matrix], Matrix]

#: Elements mapped at a time where all maps leave the rows apart: 64 MiB of float64.
_CHUNK = 1 << 23


@dataclasses.dataclass(frozen=True)
class Fold:
    """A map along one axis of a tensor.

    Attributes:
        axis: the axis that is mapped; of a linear stored [in, out], 0 maps the input side and 1 the output side.
        map: what is done to the vectors along that axis.
    """

    axis: int
    map: Map

    def __call__(self, array: Matrix) -> Matrix:
        """Return `array` mapped."""
        return np.moveaxis(self.map(np.ascontiguousarray(np.moveaxis(array, self.axis, -1))), -1, self.axis)


class FoldedTensor(ir.LazyTensor):
    """A tensor that is `source` under `folds`, the first one first; evaluated anew each time it is read.

    Attributes:
        source: the tensor as it is stored.
        folds: none is a plain copy, under a name of its own.
    """

    def __init__(self, source: ir.TensorProtocol, folds: tuple[Fold, ...], name: str) -> None:
        super().__init__(self._read, source.dtype, ir.Shape(source.shape.numpy()), name=name)
        self.source = source
        self.folds = folds

    def _read(self) -> ir.TensorProtocol:
        stored = self.source.numpy()
        axes = {fold.axis for fold in self.folds}
        if len(axes) > 1 or stored.ndim == 1:
            return self._cast(self._mapped(stored))
        if not axes:
            return self._cast(stored)
        result = np.empty(stored.shape, self.dtype.numpy())
        # Seen from the axis that is mapped, each vector goes alone.
        apart = 1 - axes.pop()
        step = max(1, _CHUNK // stored.shape[1 - apart])
        for start in range(0, stored.shape[apart], step):
            part = (slice(None),) * apart + (slice(start, start + step),)
            result[part] = self._mapped(stored[part])
        return self._cast(result)

    def _mapped(self, stored: npt.NDArray[Any]) -> Matrix:
        array: Matrix = stored.astype(np.float64)
        for fold in self.folds:
            array = fold(array)
        return array

    def _cast(self, array: npt.NDArray[Any]) -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(array, self.dtype.numpy()), dtype=self.dtype, name=self.name)


def fold(value: ir.Value, axis: int, along: Map) -> None:
    """Note that the initializer `value` is mapped by `along` on `axis`; its name, shape and type stay.

    Raises:
        GraphError: if it is no initializer, or if more than one node reads it, who would all get the mapped one.
    """
    tensor = value.const_value
    if tensor is None or not value.is_initializer():
        raise GraphError(f"'{value.name}' is not an initializer, so nothing can be folded into it.")
    readers = [str(use.node.name) for use in value.uses()]
    if len(readers) > 1:
        raise GraphError(
            f"'{value.name}' is read by {' and '.join(readers)}, so nothing can be folded into it for one of them. "
            "Give each its own weight first; for tied embeddings UntieEmbeddingsPass does that."
        )
    new = Fold(axis, along)
    if isinstance(tensor, FoldedTensor):
        value.const_value = FoldedTensor(tensor.source, (*tensor.folds, new), str(value.name))
    else:
        value.const_value = FoldedTensor(tensor, (new,), str(value.name))
