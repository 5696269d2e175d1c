"""Build named ONNX nodes: what the exporter and every rewriting pass use to add to a graph."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = ["Builder", "dim", "replace_nodes"]


class Builder:
    """Collects nodes and initializers under readable names until they are put into a graph.

    The first output of a node is named like the node, the others get `.1`, `.2`, ...; so names must be unique in
    the graph, and a value can be found by the name of the layer that made it.
    """

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Add a node with one output and return that output."""
        return self.ops(op_type, inputs, name, 1, domain=domain, **attributes)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        outputs: int,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Add a node with several outputs and return them."""
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = f"{name}.{i}" if i else name
        self.nodes.append(node)
        return node.outputs

    def initializer(self, tensor: ir.TensorProtocol | npt.NDArray[Any], name: str) -> ir.Value:
        """Add an initializer called `name` and return its value."""
        if isinstance(tensor, np.ndarray):
            tensor = ir.tensor(tensor, name=name)
        value = ir.Value(
            name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy())
        )
        self.initializers.append(value)
        return value

    def ints(self, values: Sequence[int] | int, name: str) -> ir.Value:
        """Add an int64 initializer (a scalar for an int)."""
        return self.initializer(np.asarray(values, np.int64), name)

    def floats(self, values: Sequence[float] | float, name: str) -> ir.Value:
        """Add a float32 initializer (a scalar for a float)."""
        return self.initializer(np.asarray(values, np.float32), name)


def dim(value: ir.Value | None, axis: int) -> int:
    """Return the size of `value` along `axis`, which must be known when the graph is built."""
    assert value is not None
    assert value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int), f"{value.name} has no fixed size along axis {axis}"
    return size


def replace_nodes(graph: ir.Graph, old: Sequence[ir.Node], builder: Builder, outputs: dict[ir.Value, ir.Value]) -> None:
    """Put the builder's nodes where `old` stood, and let `outputs` (old value -> new value) take over its uses.

    New values keep their own names, except that one which replaces a graph output takes the name of that output.
    Initializers that only `old` used stay for a later clean-up pass.
    """
    for value in builder.initializers:
        graph.register_initializer(value)
    names = {value: value.name for value in outputs if value.is_graph_output()}
    graph.insert_before(old[0], builder.nodes)
    ir.convenience.replace_all_uses_with(list(outputs), list(outputs.values()), replace_graph_outputs=True)
    graph.remove(old, safe=True)
    for value, name in names.items():
        outputs[value].name = name
