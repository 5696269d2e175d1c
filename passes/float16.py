"""Run matrix products, attention and the cache in float16, and leave everything else in float32."""

import numpy as np
import onnx_ir as ir

from planish.passes.builder import Builder
from planish.plugins.errors import PlanishError
from planish.plugins.ops import DOMAIN

__all__ = ["Float16Pass", "Float16RangeError"]

#: Ops that compute in float16 -> which of their inputs are floats.
_HALF_INPUTS = {
    "Attention": (0, 1, 2),
    "DequantizeLinear": (1,),
    "MatMul": (0, 1),
    "ScatterND": (0, 2),
    "TensorScatter": (0, 1),
}
#: Ops that write the cache.
_WRITES = {"ScatterND", "TensorScatter"}
#: Ops that only move elements: they keep the type of their first input.
_MOVES = {"Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}


#: The largest float16 number.
_LARGEST = float(np.finfo(np.float16).max)
_HALF = ir.TensorType(ir.DataType.FLOAT16)


class Float16RangeError(PlanishError):
    """A weight is too large for float16."""

    exit_code = 23


class Float16Pass(ir.passes.InPlacePass):
    """Inserts ``Cast`` around matrix products, DequantizeLinear and writes to the cache: they run in float16.

    Norms, rotation, quantisers and the residual stream stay in float32: they are element-wise work that is fused, and
    the massive activations of a few tokens stay exact and far from float16's largest number. Float weights and
    embedding tables are stored in float16; caches become float16 inputs and outputs; logits stay float32. Plugins and
    their caches stay as they are. The graph must have no functions left.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Convert the graph, node by node in topological order."""
        converter = _Converter(model.graph)
        for node in list(model.graph):
            converter.convert(node)
        modified = converter.convert_outputs()
        return ir.passes.PassResult(model, modified or converter.modified)


class _Converter:
    """Gives nodes inputs of the type they compute in; the type of a value says whether it is float16 by now."""

    def __init__(self, graph: ir.Graph) -> None:
        self.modified = False
        self._graph = graph
        self._casts: dict[ir.Value, ir.Value] = {}

    def convert(self, node: ir.Node) -> None:
        """Convert one node, whose producers have been converted."""
        if node.op_type == "Cast":
            if node.attributes.get_int("to") == ir.DataType.FLOAT16:
                node.outputs[0].type = _HALF
        elif node.op_type in _HALF_INPUTS:
            for i in _HALF_INPUTS[node.op_type]:
                self._set_input(node, i, self._to_half(node, _given(node.inputs[i])))
            node.outputs[0].type = _HALF
        elif node.op_type in _MOVES:
            self._convert_move(node)
        else:
            for i, value in enumerate(node.inputs):
                if value is not None and value.type == _HALF and not _is_of_plugin(node, value):
                    self._set_input(node, i, self._cast(node, value, ir.DataType.FLOAT))

    def convert_outputs(self) -> bool:
        """Cast outputs other than caches back to float32, under their old names; return whether there were any."""
        modified = False
        for i, value in enumerate(self._graph.outputs):
            producer = value.producer()
            if value.type != _HALF or producer is None or producer.op_type in _WRITES or producer.domain == DOMAIN:
                continue
            name, value.name = value.name, f"{value.name}.float16"
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{name}.cast")
            output = cast.outputs[0]
            output.name, output.type, output.shape = name, ir.TensorType(ir.DataType.FLOAT), value.shape
            self._graph.append(cast)
            self._graph.outputs[i] = output
            modified = True
        return modified

    def _convert_move(self, node: ir.Node) -> None:
        source = _given(node.inputs[0])
        producer = source.producer()
        if producer is not None and producer.op_type == "Cast" and _given(producer.inputs[0]).type == _HALF:
            # Moving the float16 numbers and casting afterwards gives the same, and keeps weights in float16.
            self._set_input(node, 0, _given(producer.inputs[0]))
        elif source.is_initializer() and source.dtype == ir.DataType.FLOAT:
            self._set_input(node, 0, self._to_half(node, source))
        if _given(node.inputs[0]).type == _HALF:
            for output in node.outputs:
                output.type = _HALF

    def _to_half(self, node: ir.Node, value: ir.Value) -> ir.Value:
        if value.type == _HALF:
            return value
        if value.is_initializer():
            return self._half_initializer(value)
        if value.is_graph_input():
            value.type, self.modified = _HALF, True
            return value
        return self._cast(node, value, ir.DataType.FLOAT16)

    def _half_initializer(self, value: ir.Value) -> ir.Value:
        if value not in self._casts:
            tensor = value.const_value
            assert tensor is not None
            build = Builder()
            self._casts[value] = build.initializer(_half_tensor(tensor), f"{value.name}.float16")
            self._graph.register_initializer(self._casts[value])
        return self._casts[value]

    def _cast(self, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return `value` cast to `dtype`; the first node that asks gets the Cast put in front of it."""
        if value not in self._casts:
            build = Builder()
            cast = build.op("Cast", [value], f"{value.name}.{dtype.name.lower()}", to=dtype)
            cast.type, cast.shape = ir.TensorType(dtype), value.shape
            self._graph.insert_before(node, build.nodes)
            self._casts[value] = cast
        return self._casts[value]

    def _set_input(self, node: ir.Node, i: int, value: ir.Value) -> None:
        old = node.inputs[i]
        if old is value:
            return
        node.replace_input_with(i, value)
        self.modified = True
        if old is not None and old.is_initializer() and not old.uses():
            del self._graph.initializers[str(old.name)]


def _is_of_plugin(node: ir.Node, value: ir.Value) -> bool:
    """Return whether a plugin reads its cache, which is float16 whatever else it computes in."""
    producer = value.producer()
    return node.domain == DOMAIN and (value.is_graph_input() or (producer is not None and producer.domain == DOMAIN))


def _given(value: ir.Value | None) -> ir.Value:
    """Return an input that this graph always gives."""
    assert value is not None
    return value


def _half_tensor(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def convert() -> ir.TensorProtocol:
        array = tensor.numpy()
        largest = float(np.abs(array).max(initial=0))
        if largest > _LARGEST:
            raise Float16RangeError(
                f"The weight '{tensor.name}' holds {largest:.6g}, more than float16 can ({_LARGEST:.0f}). Give it low "
                "bits, by the scheme or lm_head's own format: low-bit weights carry their scales in float32."
            )
        return ir.Tensor(array.astype(np.float16))

    return ir.LazyTensor(convert, ir.DataType.FLOAT16, ir.Shape(tensor.numpy().shape), name=f"{tensor.name}.float16")
