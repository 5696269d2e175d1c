"""Lower the packed KV cache to ONNX Runtime: append in few nodes, attend straight from packed bytes when decoding."""

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from planish.passes.builder import Builder, replace_nodes
from planish.plugins.fields import FIELD_MULTIPLIERS, field_matrix
from planish.plugins.ops import DOMAIN
from planish.plugins.ops.append_kv import SMALLEST_KV_SCALE
from planish.plugins.ops.pack import pack

__all__ = ["LowerKvCacheToOrtPass"]



@dataclasses.dataclass(frozen=True)
class _Part:
    """One half of a layer's cache: keys or values."""

    bits: int
    new: ir.Value  # float32 [batch, kv_heads, sequence, head_dim]: what the stored codes of the new tokens stand for
    past: ir.Value
    past_scale: ir.Value
    present: ir.Value
    present_scale: ir.Value


class LowerKvCacheToOrtPass(ir.passes.InPlacePass):
    """Replaces PlanishAppendKv* and PlanishAttend* by standard ops in two forms, picked at run time by an If.

    - One new token (decoding): every cached token is read once, so the cost is unpacking. The fields of the packed
      bytes (see `planish.plugins.fields`) take the place of the codes; scale and zero act on the scores and the
      probabilities, which are 1 / head_dim of the size.
    - Several (prefill): the scores are large and the cache is small, so keys and values are dequantised first. Those
      of the new tokens never were packed, and the cached ones are usually none. Queries are taken in blocks that
      see the keys up to their own end, which skips most of the masked half.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower the cache of every layer."""
        nodes = [n for n in model.graph if n.domain == DOMAIN and n.op_type.startswith("PlanishAttend")]
        if not nodes:
            return ir.passes.PassResult(model, modified=False)
        decoding = _decoding(model.graph)
        for node in nodes:
            _lower(model, node, decoding)
        return ir.passes.PassResult(model, modified=True)


def _decoding(graph: ir.Graph) -> ir.Value:
    """Return a bool scalar: is there exactly one new token?"""
    build = Builder()
    input_ids = next(value for value in graph.inputs if value.name == "input_ids")
    sequence = build.op("Shape", [input_ids], "cache.sequence_dim", start=1, end=2)
    scalar = build.op("Squeeze", [sequence], "cache.sequence")
    decoding = build.op("Equal", [scalar, build.ints(1, "cache.one")], "cache.decoding")
    for value in build.initializers:
        graph.register_initializer(value)
    graph.insert_before(graph[0], build.nodes)
    return decoding


def _lower(model: ir.Model, attend: ir.Node, decoding: ir.Value) -> None:
    query, key, _, value, _, mask = attend.inputs
    assert key is not None
    assert value is not None
    assert query is not None
    assert mask is not None
    appends = [key.producer(), value.producer()]
    build = Builder()
    name = str(attend.name).removesuffix(".attended")
    parts = []
    for append in appends:
        assert append is not None
        parts.append(_append(build, append, str(append.name).removesuffix(".append")))
    heads, head_dim = attend.attributes.get_int("heads"), attend.attributes.get_int("head_dim")
    shape = _Shape(heads, int(_dim(parts[0].past, 1)), head_dim)
    branches = {
        "then_branch": _decode_branch(build, f"{name}.decode", query, mask, parts, shape),
        "else_branch": _prefill_branch(build, f"{name}.prefill", query, mask, parts, shape),
    }
    attended = build.op("If", [decoding], str(attend.name), **branches)
    outputs = {attend.outputs[0]: attended}
    for append, part in zip(appends, parts, strict=True):
        assert append is not None
        outputs |= {append.outputs[0]: part.present, append.outputs[1]: part.present_scale}
        for new, old in ((part.present, append.outputs[0]), (part.present_scale, append.outputs[1])):
            new.type, new.shape = old.type, old.shape
    replace_nodes(model.graph, [attend, *(append for append in appends if append is not None)], build, outputs)


@dataclasses.dataclass(frozen=True)
class _Shape:
    heads: int
    kv_heads: int
    head_dim: int


def _append(build: Builder, node: ir.Node, name: str) -> _Part:
    """Quantise and append as PlanishAppendKv does; QuantizeLinear's saturation at 0 is the lower clamp."""
    x, past, past_scale = node.inputs
    assert past is not None
    assert past_scale is not None
    bits = int(node.op_type.removeprefix("PlanishAppendKv"))
    axis = build.ints([-1], f"{name}.axis")
    highest = float(2**bits - 1)
    maximum = build.op("ReduceMax", [x, axis], f"{name}.maximum")
    minimum = build.op("ReduceMin", [x, axis], f"{name}.minimum")
    span = build.op("Sub", [maximum, minimum], f"{name}.span")
    step = build.op("Div", [span, build.floats(highest, f"{name}.highest")], f"{name}.step")
    bounded = build.op("Max", [step, build.floats(SMALLEST_KV_SCALE, f"{name}.smallest")], f"{name}.bounded")
    both = build.op("Concat", [bounded, minimum], f"{name}.both", axis=-1)
    new_scale = build.op("Cast", [both], f"{name}.new_scale", to=ir.DataType.FLOAT16)
    stored = build.op("Cast", [new_scale], f"{name}.stored", to=ir.DataType.FLOAT)
    scale, zero = build.ops("Split", [stored], f"{name}.scale", 2, axis=-1, num_outputs=2)
    offset = build.op("Sub", [x, zero], f"{name}.offset")
    rounded = build.op(
        "QuantizeLinear",
        [offset, scale],
        f"{name}.rounded",
        axis=-1,
        block_size=int(_dim(past, 3)) * 8 // bits,
        output_dtype=ir.DataType.UINT8,
    )
    top = build.initializer(np.asarray(2**bits - 1, np.uint8), f"{name}.top")
    codes = build.op("Min", [rounded, top], f"{name}.codes") if bits < 8 else rounded
    packed = _pack(build, codes, bits, name)
    present = build.op("Concat", [past, packed], f"{name}.present", axis=2)
    present_scale = build.op("Concat", [past_scale, new_scale], f"{name}.present_scale", axis=2)
    codes_float = build.op("Cast", [codes], f"{name}.codes_float", to=ir.DataType.FLOAT)
    scaled = build.op("Mul", [codes_float, scale], f"{name}.codes_scaled")
    new = build.op("Add", [scaled, zero], f"{name}.new")
    return _Part(bits, new, past, past_scale, present, present_scale)


def _pack(build: Builder, codes: ir.Value, bits: int, name: str) -> ir.Value:
    return build.op(pack(bits).name, [codes], f"{name}.packed", domain=DOMAIN) if bits < 8 else codes


def _decode_branch(
    build: Builder, name: str, query: ir.Value, mask: ir.Value, parts: list[_Part], shape: _Shape
) -> ir.Graph:
    key, value = parts
    groups = shape.heads // shape.kv_heads
    inner = Builder()
    by_group = inner.op(
        "Reshape", [query, build.ints([0, shape.kv_heads, groups, shape.head_dim], f"{name}.by_group")], f"{name}.query"
    )
    # One product with [field matrix | ones], softmax scale included, gives the query of the fields and its sum.
    matrix = field_matrix(key.bits, shape.head_dim)
    columns = np.concatenate([matrix.T, np.ones((shape.head_dim, 1))], axis=1) / math.sqrt(shape.head_dim)
    both = inner.op(
        "MatMul", [by_group, build.initializer(columns.astype(np.float32), f"{name}.key_matrix")], f"{name}.query_fields"
    )
    sizes = build.ints([matrix.shape[0], 1], f"{name}.query_sizes")
    fields_query, query_sum = inner.ops("Split", [both, sizes], f"{name}.query_parts", 2, axis=-1)

    transposed = inner.op("Transpose", [_fields(build, inner, key, f"{name}.key")], f"{name}.key_t", perm=[0, 1, 3, 2])
    products = inner.op("MatMul", [fields_query, transposed], f"{name}.products")
    key_scale, key_zero = _scale_rows(inner, key, f"{name}.key")
    scaled = inner.op("Mul", [products, key_scale], f"{name}.products_scaled")
    shift = inner.op("Mul", [query_sum, key_zero], f"{name}.shift")
    shifted = inner.op("Add", [scaled, shift], f"{name}.shifted")
    scores = inner.op("Add", [shifted, mask], f"{name}.scores")
    shares = inner.op("Softmax", [scores], f"{name}.shares", axis=-1)

    value_scale, value_zero = _scale_rows(inner, value, f"{name}.value")
    weighted = inner.op("Mul", [shares, value_scale], f"{name}.weighted")
    fields_sum = inner.op("MatMul", [weighted, _fields(build, inner, value, f"{name}.value")], f"{name}.fields_sum")
    value_matrix = field_matrix(value.bits, shape.head_dim).astype(np.float32)
    summed = inner.op(
        "MatMul", [fields_sum, build.initializer(value_matrix, f"{name}.value_matrix")], f"{name}.summed"
    )
    zeros = inner.op("Mul", [shares, value_zero], f"{name}.zeros")
    zero_sum = inner.op("ReduceSum", [zeros, build.ints([-1], f"{name}.last")], f"{name}.zero_sum")
    by_head = inner.op("Add", [summed, zero_sum], f"{name}.by_head")
    flat = build.ints([0, 1, shape.heads * shape.head_dim], f"{name}.flat")
    y = inner.op("Reshape", [by_head, flat], f"{name}.y")
    return _branch(inner, y, name)


def _fields(build: Builder, inner: Builder, part: _Part, name: str) -> ir.Value:
    """Return the fields of the packed cache, float32 [batch, kv_heads, total, fields]."""
    fields = [
        inner.op(
            "Mul",
            [part.present, build.initializer(np.asarray(multiplier, np.uint8), f"{name}.times_{multiplier}")],
            f"{name}.field_{multiplier}",
        )
        if multiplier > 1
        else part.present
        for multiplier in FIELD_MULTIPLIERS[part.bits]
    ]
    joined = inner.op("Concat", fields, f"{name}.fields_u8", axis=-1) if len(fields) > 1 else fields[0]
    return inner.op("Cast", [joined], f"{name}.fields", to=ir.DataType.FLOAT)


def _scale_rows(inner: Builder, part: _Part, name: str) -> tuple[ir.Value, ir.Value]:
    """Return scale and zero of the cached tokens, float32 [batch, kv_heads, 1, total] each."""
    stored = inner.op("Cast", [part.present_scale], f"{name}.stored", to=ir.DataType.FLOAT)
    rows = inner.op("Transpose", [stored], f"{name}.rows", perm=[0, 1, 3, 2])
    scale, zero = inner.ops("Split", [rows], f"{name}.row", 2, axis=2, num_outputs=2)
    return scale, zero


def _prefill_branch(
    build: Builder, name: str, query: ir.Value, mask: ir.Value, parts: list[_Part], shape: _Shape
) -> ir.Graph:
    inner = Builder()
    by_head = build.ints([0, 0, shape.heads, shape.head_dim], f"{name}.by_head")
    heads_first = inner.op(
        "Transpose", [inner.op("Reshape", [query, by_head], f"{name}.query")], f"{name}.query_t", perm=[0, 2, 1, 3]
    )
    keys, values = (_dequantized(inner, part, f"{name}.{role}") for part, role in zip(parts, ("key", "value"), strict=True))
    attended = inner.op("Attention", [heads_first, keys, values, mask], f"{name}.attention")
    by_token = inner.op("Transpose", [attended], f"{name}.by_token", perm=[0, 2, 1, 3])
    y = inner.op("Reshape", [by_token, build.ints([0, 0, shape.heads * shape.head_dim], f"{name}.flat")], f"{name}.y")
    return _branch(inner, y, name)


def _dequantized(inner: Builder, part: _Part, name: str) -> ir.Value:
    codes = inner.op(f"PlanishUnpack{part.bits}", [part.past], f"{name}.past_codes", domain=DOMAIN)
    codes_float = inner.op("Cast", [codes], f"{name}.past_float", to=ir.DataType.FLOAT)
    stored = inner.op("Cast", [part.past_scale], f"{name}.past_stored", to=ir.DataType.FLOAT)
    scale, zero = inner.ops("Split", [stored], f"{name}.past_scale", 2, axis=-1, num_outputs=2)
    scaled = inner.op("Mul", [codes_float, scale], f"{name}.past_scaled")
    past = inner.op("Add", [scaled, zero], f"{name}.past")
    return inner.op("Concat", [past, part.new], f"{name}.all", axis=2)


def _branch(inner: Builder, y: ir.Value, name: str) -> ir.Graph:
    assert not inner.initializers, "constants of a branch belong to the outer graph"
    y.type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph([], [y], nodes=inner.nodes, name=name)


def _dim(value: ir.Value, axis: int) -> int:
    assert value.shape is not None
    dim = value.shape[axis]
    assert isinstance(dim, int)
    return dim
