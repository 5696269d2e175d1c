"""Cut planish functions out of a portable model and put plugin nodes in, with onnx-graphsurgeon.

Weights stay on disk: tensors that are not touched keep their place in the model's data file, and repacked ones are
written to another, one at a time.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from planish.compiler.optional import require
from planish.plugins.ops import DOMAIN
from planish.plugins.tensorrt.contract import Contract

__all__ = ["LeftOut", "Surgery"]

Array = npt.NDArray[Any]

_DATA = "plugins.data"
#: Where a tensor begins in a data file: page-aligned, as `save_model` writes them.
_ALIGNMENT = 4096


class LeftOut(NamedTuple):
    """A node that no plugin takes the place of, and why."""

    node: str
    why: str


class Surgery:
    """A portable model as a graph of onnx-graphsurgeon.

    Attributes:
        graph: the graph.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        """Read a model.

        Args:
            model: the file of a portable model, its data beside it.
            folder: for repacked weights.

        Raises:
            MissingExtraError: if onnx-graphsurgeon is not installed.
        """
        self._gs: Any = require("onnx_graphsurgeon")
        self._base, self._folder = model.parent, folder
        proto = onnx.load(model, load_external_data=False)
        _drop_defaults(proto.graph)
        self._ir_version = proto.ir_version
        self._producer = proto.producer_name
        self.graph: Any = self._gs.import_onnx(proto)

    def producer(self, tensor: Any) -> Any:
        """Return the node that makes a tensor; None where none does."""
        return tensor.inputs[0] if tensor.inputs else None

    def array(self, tensor: Any) -> Array:
        """Return what a constant of the portable model holds, read from disk."""
        proto = tensor._values.tensor
        return onnx.numpy_helper.to_array(proto, str(self._base))

    def constant(self, name: str, array: Array) -> Any:
        """Return a new constant, written to disk; uint32 becomes int32, bit by bit."""
        stored = np.ascontiguousarray(array.view(np.int32) if array.dtype == np.uint32 else array)
        path = self._folder / _DATA
        with path.open("ab") as file:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            start = file.tell()
            stored.tofile(file)
        proto = onnx.TensorProto(
            name=name,
            data_type=onnx.helper.np_dtype_to_tensor_dtype(stored.dtype),
            dims=stored.shape,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, value in (("location", _DATA), ("offset", start), ("length", stored.nbytes)):
            proto.external_data.add(key=key, value=str(value))
        return self._gs.Constant(name, self._gs.ir.tensor.LazyValues(proto), data_location=onnx.TensorProto.EXTERNAL)

    def variable(self, name: str, dtype: type[np.generic], shape: Sequence[int | str]) -> Any:
        """Return a new tensor that is no constant."""
        return self._gs.Variable(name, dtype=dtype, shape=list(shape))

    def plug(
        self,
        contract: Contract,
        name: str,
        attributes: Mapping[str, float],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
    ) -> None:
        """Add the node of a plugin, whose attributes have no problem; `outputs` lose what made them before."""
        assert contract.problem(attributes) is None
        for output in outputs:
            output.inputs.clear()
        # TensorRT before 10.10 looks for a plugin by these two, and not by the domain of the node.
        found_by = {"plugin_namespace": DOMAIN, "plugin_version": contract.version}
        node = self._gs.Node(
            contract.name, name, {**attributes, **found_by}, list(inputs), list(outputs), domain=DOMAIN
        )
        self.graph.nodes.append(node)

    def finish(self) -> ir.Model:
        """Return the model without what nothing reads any more; it reads its tensors from where they lie."""
        self.graph.cleanup(remove_unused_graph_inputs=False).toposort()
        proto = self._gs.export_onnx(self.graph, ir_version=self._ir_version, producer_name=self._producer)
        model: ir.Model = ir.from_proto(proto)
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                repacked = str(value.const_value.location) == _DATA
                value.const_value.base_dir = self._folder if repacked else self._base
        return model


def _drop_defaults(graph: onnx.GraphProto) -> None:
    """Drop the default values of inputs: onnx-graphsurgeon would keep these and drop the inputs."""
    inputs = {value.name for value in graph.input}
    kept = [tensor for tensor in graph.initializer if tensor.name not in inputs]
    del graph.initializer[:]
    graph.initializer.extend(kept)
