"""Rotating the heads of values by nothing, together with the others, gives the bits of rotating queries and keys."""

import numpy as np
import onnx_ir as ir
import pytest

from planish.passes.builder import Builder
from planish.passes.rotate_in_ort import HeadTables, rotate_heads
from planish.plugins.ops import OPSET
from tests.onnx_run import session

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16


def parts(build: Builder, x: list[ir.Value], bias: bool) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return query, key and value as MergeRotaryPass leaves them, or with something in between."""
    qkv, cos, sin = x
    rotated = (HEADS + KV_HEADS) * HEAD_DIM
    both, value = build.ops("Split", [qkv, build.ints([rotated, KV_HEADS * HEAD_DIM], "sizes")], "qk_v", 2, axis=-1)
    if bias:
        both = build.op("Add", [both, build.floats(0.5, "bias")], "biased")
    rope = build.op("RotaryEmbedding", [both, cos, sin], "rope", num_heads=HEADS + KV_HEADS)
    sizes = build.ints([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], "rotated_sizes")
    query, key = build.ops("Split", [rope, sizes], "q_k", 2, axis=-1)
    return query, key, value


def inputs() -> list[ir.Value]:
    widths = {"qkv": (HEADS + 2 * KV_HEADS) * HEAD_DIM, "cos": HEAD_DIM // 2, "sin": HEAD_DIM // 2}
    float32 = ir.TensorType(ir.DataType.FLOAT)
    return [ir.Value(name=n, type=float32, shape=ir.Shape(["batch", "sequence", w])) for n, w in widths.items()]


@pytest.mark.parametrize("sequence", [1, 5])
def test_same_bits(sequence: int) -> None:
    build, x, tables = Builder(), inputs(), HeadTables()
    old = parts(build, x, bias=False)
    new = rotate_heads(build, "new", tables, old, (HEADS, KV_HEADS), HEAD_DIM)
    assert new is not None
    for value in (*old, *new):
        value.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        x, [*old, *new], nodes=build.nodes, initializers=build.initializers, opset_imports={"": OPSET}, name="rotation"
    )
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 6, (3, sequence, HEAD_DIM // 2)).astype(np.float32)
    qkv = rng.standard_normal((3, sequence, (HEADS + 2 * KV_HEADS) * HEAD_DIM)).astype(np.float32)
    feeds = {"qkv": qkv, "cos": np.cos(angle), "sin": np.sin(angle)}
    query, key, value, queries, others = session(ir.to_proto(ir.Model(graph, ir_version=11))).run(None, feeds)
    np.testing.assert_array_equal(queries.reshape(query.shape), query)
    np.testing.assert_array_equal(others.reshape(3, sequence, -1), np.concatenate([key, value], axis=-1))
    assert len(tables) == 1


def test_leaves_alone_what_lies_apart() -> None:
    build = Builder()
    assert rotate_heads(build, "new", {}, parts(build, inputs(), bias=True), (HEADS, KV_HEADS), HEAD_DIM) is None
