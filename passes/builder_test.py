"""The Builder names what it makes; replace_nodes puts it into a graph and keeps the graph's own names."""

import numpy as np
import onnx_ir as ir
import pytest

from planish.passes.builder import Builder, replace_nodes
from tests.onnx_run import session


def test_names_and_attributes() -> None:
    build = Builder()
    x = ir.Value(name="x")
    first = build.op("Softmax", [x], "layer.soft", axis=-1)
    parts = build.ops("Split", [first, build.ints([1, 2], "layer.sizes")], "layer.parts", 2, axis=0)
    assert first.name == "layer.soft"
    assert [part.name for part in parts] == ["layer.parts", "layer.parts.1"]
    assert [node.name for node in build.nodes] == ["layer.soft", "layer.parts"]
    assert build.nodes[0].attributes.get_int("axis") == -1
    assert [value.name for value in build.initializers] == ["layer.sizes"]


def test_domain() -> None:
    build = Builder()
    build.op("Gelu", [ir.Value(name="x")], "g", domain="com.microsoft")
    assert build.nodes[0].domain == "com.microsoft"


def test_initializers() -> None:
    build = Builder()
    scalar, vector, floats = build.ints(3, "a"), build.ints([1, 2], "b"), build.floats([0.5], "c")
    assert (scalar.dtype, str(scalar.shape)) == (ir.DataType.INT64, "[]")
    assert (vector.dtype, str(vector.shape)) == (ir.DataType.INT64, "[2]")
    assert (floats.dtype, str(floats.shape)) == (ir.DataType.FLOAT, "[1]")
    assert floats.const_value is not None
    assert floats.const_value.numpy().tolist() == [0.5]


def test_lazy_initializers_are_not_evaluated() -> None:
    def read() -> ir.Tensor:
        raise AssertionError("read")

    value = Builder().initializer(ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape([2, 3]), name="w"), "w")
    assert (value.dtype, str(value.shape)) == (ir.DataType.FLOAT, "[2,3]")


@pytest.fixture
def model() -> ir.Model:
    """middle = x + 1, y = middle * 2, z = middle - 1."""
    build = Builder()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n"]))
    middle = build.op("Add", [x, build.floats(1.0, "one")], "middle")
    y = build.op("Mul", [middle, build.floats(2.0, "two")], "y")
    z = build.op("Sub", [middle, build.floats(1.0, "three")], "z")
    for value in (y, z):
        value.type, value.shape = x.type, x.shape
    graph = ir.Graph([x], [y, z], nodes=build.nodes, initializers=build.initializers, opset_imports={"": 24}, name="g")
    return ir.Model(graph, ir_version=11)


def run(model: ir.Model) -> list[list[float]]:
    loaded = session(ir.to_proto(model))
    assert [value.name for value in loaded.get_outputs()] == ["y", "z"]
    return [y.tolist() for y in loaded.run(None, {"x": np.array([3.0, 5.0], np.float32)})]


def node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def test_replacing_an_inner_node(model: ir.Model) -> None:
    assert run(model) == [[8, 12], [3, 5]]
    old = node(model, "middle")
    build = Builder()
    made = build.op("Mul", [old.inputs[0], build.floats(10.0, "ten")], "tenfold")
    replace_nodes(model.graph, [old], build, {old.outputs[0]: made})
    assert run(model) == [[60, 100], [29, 49]]
    assert [node.name for node in model.graph] == ["tenfold", "y", "z"]
    assert "ten" in model.graph.initializers


def test_replacing_a_graph_output_keeps_its_name(model: ir.Model) -> None:
    old = node(model, "y")
    build = Builder()
    made = build.op("Neg", [old.inputs[0]], "negated")
    made.type, made.shape = old.outputs[0].type, old.outputs[0].shape
    replace_nodes(model.graph, [old], build, {old.outputs[0]: made})
    assert run(model) == [[-4, -6], [3, 5]]
    assert made.name == "y"
    assert [node.name for node in model.graph] == ["middle", "negated", "z"]


def test_replacing_several_nodes_by_one(model: ir.Model) -> None:
    old = [node(model, "y"), node(model, "z")]
    build = Builder()
    made = build.op("Abs", [node(model, "middle").outputs[0]], "abs")
    made.type, made.shape = old[0].outputs[0].type, old[0].outputs[0].shape
    again = build.op("Identity", [made], "again")
    again.type, again.shape = made.type, made.shape
    outputs = dict(zip((value.outputs[0] for value in old), (made, again), strict=True))
    replace_nodes(model.graph, old, build, outputs)
    assert run(model) == [[4, 6], [4, 6]]


def test_a_node_still_in_use_is_not_removed(model: ir.Model) -> None:
    with pytest.raises(ValueError, match="still being used"):
        replace_nodes(model.graph, [node(model, "middle")], Builder(), {})
