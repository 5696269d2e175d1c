"""Spell out the ops of opsets 23 and 24 in older ones, for parsers of TensorRT that do not know them yet."""

from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir

from planish.passes.builder import Builder, dim, replace_nodes

__all__ = ["SPELLABLE", "SpellOutForTensorrtPass"]

#: Ops that can be spelled out, in the form in which the lowering to TensorRT leaves them.
SPELLABLE = frozenset({"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"})
#: What a score is where a query must not look: its weight is 0 in float32 and in float16, and no infinity is about.
_UNSEEN = float(np.finfo(np.float16).min)
#: Ops that keep the last axis of their inputs, broadcast.
_ELEMENTWISE = {"Add", "Cast", "Cos", "Mul", "Sin"}


class SpellOutForTensorrtPass(ir.passes.InPlacePass):
    """Replaces RMSNormalization, RotaryEmbedding, Attention and TensorScatter, those of them that are asked for.

    The bodies that ONNX's schemas give these ops work at any rank and with any attribute, at the price of loops and of
    shapes that only run time knows. These are for the forms that occur: sizes of heads are constants, and Attention
    and TensorScatter are those of LowerKvCacheToTensorrtPass. The graph must have no functions left.

    All TensorScatters that write at the same indices write as many rows; what depends on the indices, the mask or the
    angles alone is computed once.
    """

    def __init__(self, ops: Collection[str]) -> None:
        """Take what is to be replaced.

        Args:
            ops: some of `SPELLABLE`.
        """
        super().__init__()
        assert set(ops) <= SPELLABLE
        self._ops = frozenset(ops)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace every such node."""
        nodes = [node for node in model.graph if node.domain == "" and node.op_type in self._ops]
        shared: dict[tuple[object, ...], ir.Value] = {}
        for node in nodes:
            build = Builder()
            y = _SPELLED[node.op_type](build, node, shared)
            old = node.outputs[0]
            y.type, y.shape = old.type, old.shape
            replace_nodes(model.graph, [node], build, {old: y})
        return ir.passes.PassResult(model, modified=bool(nodes))


_Shared = dict[tuple[object, ...], ir.Value]


def _rms_norm(build: Builder, node: ir.Node, shared: _Shared) -> ir.Value:
    """Return x / sqrt(mean(x^2) + epsilon) * gain, over the last axis."""
    x, gain = node.inputs
    name = str(node.name)
    assert node.attributes.get_int("axis", -1) == -1
    epsilon = build.floats(node.attributes.get_float("epsilon", 1e-5), f"{name}.epsilon")
    square = build.op("Mul", [x, x], f"{name}.square")
    mean = build.op("ReduceMean", [square, build.ints([-1], f"{name}.last_axis")], f"{name}.mean")
    size = build.op("Sqrt", [build.op("Add", [mean, epsilon], f"{name}.variance")], f"{name}.size")
    return build.op("Mul", [build.op("Div", [x, size], f"{name}.normal"), gain], f"{name}.normed")


def _rotate(build: Builder, node: ir.Node, shared: _Shared) -> ir.Value:
    """Return (a cos - b sin, a sin + b cos) for the halves a and b of every head; x is [batch, sequence, channels]."""
    x, *angles = node.inputs
    name, heads = str(node.name), node.attributes.get_int("num_heads")
    assert not node.attributes.get_int("interleaved", 0)
    assert not node.attributes.get_int("rotary_embedding_dim", 0)
    half = _last_size(angles[0])
    assert half is not None
    cos, sin = (_of_heads(build, angle, name, shared) for angle in angles)
    split = build.op("Reshape", [x, build.ints([0, 0, heads, 2 * half], f"{name}.split_shape")], f"{name}.heads")
    a, b = build.ops("Split", [split, build.ints([half, half], f"{name}.halves")], f"{name}.half", 2, axis=-1)

    def turned(first: ir.Value, second: ir.Value, sum_or_difference: str, part: str) -> ir.Value:
        left = build.op("Mul", [a, first], f"{name}.{part}_left")
        right = build.op("Mul", [b, second], f"{name}.{part}_right")
        return build.op(sum_or_difference, [left, right], f"{name}.{part}")

    parts = [turned(cos, sin, "Sub", "low"), turned(sin, cos, "Add", "high")]
    joined = build.op("Concat", parts, f"{name}.turned", axis=-1)
    return build.op("Reshape", [joined, build.ints([0, 0, 2 * half * heads], f"{name}.shape")], f"{name}.rotated")


def _of_heads(build: Builder, angle: ir.Value | None, name: str, shared: _Shared) -> ir.Value:
    """Return cos or sin, [batch, sequence, half], as [batch, sequence, 1, half]."""
    assert angle is not None
    if (angle,) not in shared:
        axis = build.ints([2], f"{angle.name}.head_axis")
        shared[angle,] = build.op("Unsqueeze", [angle, axis], f"{angle.name}.of_heads")
    return shared[angle,]


def _attend(build: Builder, node: ir.Node, shared: _Shared) -> ir.Value:
    """Return softmax(q k^T / sqrt(head_dim)) v, 0 where the mask is false.

    Queries that share a KV head become rows of one product, so that keys and values are not repeated. Scaled before
    the product, scores stay within float16 if it runs in that; the softmax is no product, and Float16Pass leaves it
    in float32.
    """
    query, key, value, mask = node.inputs
    assert mask is not None
    assert set(node.attributes) == set()
    name, head_dim, heads, kv_heads = str(node.name), dim(key, 3), dim(query, 1), dim(key, 1)
    scaled = build.op("Mul", [query, build.floats(head_dim**-0.5, f"{name}.scale")], f"{name}.scaled")
    group = heads // kv_heads
    if group > 1:
        shape = build.ints([0, kv_heads, -1, head_dim], f"{name}.by_kv_head_shape")
        scaled = build.op("Reshape", [scaled, shape], f"{name}.by_kv_head")
        if (mask, group) not in shared:
            shared[mask, group] = build.op("Concat", [mask] * group, f"{mask.name}.of_{group}", axis=2)
        mask = shared[mask, group]
    turned = build.op("Transpose", [key], f"{name}.keys", perm=[0, 1, 3, 2])
    scores = build.op("MatMul", [scaled, turned], f"{name}.scores")
    seen = build.op("Where", [mask, scores, build.floats(_UNSEEN, f"{name}.unseen")], f"{name}.seen")
    weights = build.op("Softmax", [seen], f"{name}.weights", axis=-1)
    y = build.op("MatMul", [weights, value], f"{name}.attended")
    if group > 1:
        y = build.op("Reshape", [y, build.ints([0, heads, -1, head_dim], f"{name}.shape")], f"{name}.by_head")
    return y


def _scatter(build: Builder, node: ir.Node, shared: _Shared) -> ir.Value:
    """Return the cache, [batch, heads, slots, head_dim], with the new rows from write_indices on."""
    past, new, write_indices = node.inputs
    assert new is not None
    assert write_indices is not None
    assert node.attributes.get_int("axis", -2) in (2, -2)
    assert node.attributes.get_string("mode", "linear") == "linear"
    heads = dim(past, 1)
    if (write_indices, heads) not in shared:
        shared[write_indices, heads] = _places(build, new, write_indices, heads)
    return build.op("ScatterND", [past, shared[write_indices, heads], new], f"{node.name}.scattered")


def _places(build: Builder, new: ir.Value, write_indices: ir.Value, heads: int) -> ir.Value:
    """Return which sequence, head and slot each row of `new` goes to, int64 [batch, heads, sequence, 3]."""
    name = f"{write_indices.name}.of_{heads}"
    zero, one = build.ints(0, f"{name}.zero"), build.ints(1, f"{name}.one")

    def count(axis: int, part: str) -> ir.Value:
        size = build.op("Shape", [new], f"{name}.{part}_shape", start=axis, end=axis + 1)
        scalar = build.op("Squeeze", [size, build.ints([0], f"{name}.{part}_axis")], f"{name}.{part}")
        return build.op("Range", [zero, scalar, one], f"{name}.{part}_range")

    sequences = build.op("Unsqueeze", [count(0, "batch"), build.ints([1, 2], f"{name}.behind")], f"{name}.sequences")
    each_head = build.initializer(np.arange(heads)[None, :, None], f"{name}.heads")
    start = build.op("Unsqueeze", [write_indices, build.ints([1, 2], f"{name}.start_axes")], f"{name}.start")
    slots = build.op("Add", [start, count(2, "rows")], f"{name}.slots")
    shape = build.op("Shape", [new], f"{name}.shape", start=0, end=3)
    parts = []
    for part, value in (("sequence", sequences), ("head", each_head), ("slot", slots)):
        whole = build.op("Expand", [value, shape], f"{name}.{part}_of_row")
        column = build.op("Unsqueeze", [whole, build.ints([3], f"{name}.{part}_axis_of_row")], f"{name}.{part}_column")
        parts.append(column)
    return build.op("Concat", parts, name, axis=3)


def _last_size(value: ir.Value | None) -> int | None:
    """Return the length of the last axis, by the shape or, behind element-wise ops, by that of what it is made of."""
    if value is None:
        return None
    if value.shape is not None and isinstance(value.shape[-1], int):
        return value.shape[-1]
    producer = value.producer()
    if producer is None or producer.op_type not in _ELEMENTWISE:
        return None
    return max((size for size in map(_last_size, producer.inputs) if size is not None), default=None)


_SPELLED: dict[str, Callable[[Builder, ir.Node, _Shared], ir.Value]] = {
    "Attention": _attend,
    "RMSNormalization": _rms_norm,
    "RotaryEmbedding": _rotate,
    "TensorScatter": _scatter,
}
assert set(_SPELLED) == SPELLABLE
