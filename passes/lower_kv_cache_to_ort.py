"""Lower the packed KV cache to ONNX Runtime: append in few nodes, attend straight from packed bytes when decoding."""

import dataclasses

import numpy as np
import onnx_ir as ir

from planish.passes.attend_in_ort import (
    ORT_DOMAIN,
    Cache,
    Heads,
    QueryBlocks,
    decode_branch,
    prefill_branch,
    query_blocks,
)
from planish.passes.builder import Builder, dim, replace_nodes
from planish.passes.rotate_in_ort import HeadTables, rotate_heads
from planish.plugins.ops import DOMAIN
from planish.plugins.ops.append_kv import SMALLEST_KV_SCALE
from planish.plugins.ops.pack import pack

__all__ = ["LowerKvCacheToOrtPass"]


class LowerKvCacheToOrtPass(ir.passes.InPlacePass):
    """Replaces PlanishAppendKv* and PlanishAttend* by standard ops.

    Keys and values go through one quantiser. Their scales share one input and one output a layer, `....scale`,
    float16 [batch, 4 * kv_heads, 1, tokens]: key scales, value scales, key zeros, value zeros, so that they can be
    applied to the scores as they are. Attention has two forms, picked at run time; see
    `planish.passes.attend_in_ort`.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower the cache of every layer."""
        graph = model.graph
        nodes = [node for node in graph if node.domain == DOMAIN and node.op_type.startswith("PlanishAttend")]
        if not nodes:
            return ir.passes.PassResult(model, modified=False)
        build = Builder()
        input_ids = next(value for value in graph.inputs if value.name == "input_ids")
        mask = nodes[0].inputs[5]
        assert mask is not None
        blocks = query_blocks(build, input_ids, mask)
        after = mask.producer()
        assert after is not None
        for value in build.initializers:
            graph.register_initializer(value)
        graph.insert_after(after, build.nodes)
        tables: HeadTables = {}
        for node in nodes:
            _lower(graph, node, blocks, tables)
        graph.opset_imports[ORT_DOMAIN] = 1
        return ir.passes.PassResult(model, modified=True)


@dataclasses.dataclass(frozen=True)
class _Append:
    """One PlanishAppendKv: its node, bits and clip, and the three-dimensional keys or values it quantises."""

    node: ir.Node
    bits: int
    clip: np.float32
    x: ir.Value

    @classmethod
    def of(cls, codes: ir.Value | None) -> "_Append":
        assert codes is not None
        node = codes.producer()
        assert node is not None
        transpose = _producer(node.inputs[0])
        reshape = _producer(transpose.inputs[0])
        x = reshape.inputs[0]
        assert x is not None
        bits, clip = int(node.op_type.removeprefix("PlanishAppendKv")), np.float32(node.attributes.get_float("clip"))
        return cls(node, bits, clip, x)


def _lower(graph: ir.Graph, attend: ir.Node, blocks: QueryBlocks, tables: HeadTables) -> None:
    query, key_codes, _, value_codes, _, _ = attend.inputs
    assert query is not None
    key, value = _Append.of(key_codes), _Append.of(value_codes)
    name = str(attend.name).removesuffix(".attended")
    heads = Heads(attend.attributes.get_int("heads"), dim(key.node.inputs[1], 1), attend.attributes.get_int("head_dim"))
    build = Builder()
    parts, numbers = (query, key.x, value.x), (heads.heads, heads.kv_heads)
    rotated = rotate_heads(build, f"{name}.rotation", tables, parts, numbers, heads.head_dim)
    query, x = rotated or (query, _joined(build, f"{name}.kv", key, value, heads))
    cache = _append(build, f"{name}.kv", key, value, x, heads)
    attended = build.op(
        "If",
        [blocks.decoding],
        str(attend.name),
        then_branch=decode_branch(build, f"{name}.decode", query, blocks, cache, heads),
        else_branch=prefill_branch(build, f"{name}.prefill", query, blocks, cache, heads),
    )
    _replace_cache_io(graph, cache, key.node, value.node)
    replace_nodes(graph, [attend], build, {attend.outputs[0]: attended})
    graph.remove([key.node, value.node], safe=True)


def _joined(build: Builder, name: str, key: _Append, value: _Append, heads: Heads) -> ir.Value:
    joined = build.op("Concat", [key.x, value.x], f"{name}.joined", axis=-1)
    shape = build.ints([0, 0, 2 * heads.kv_heads, heads.head_dim], f"{name}.shape")
    return build.op("Reshape", [joined, shape], f"{name}.x")


def _append(build: Builder, name: str, key: _Append, value: _Append, x: ir.Value, heads: Heads) -> Cache:
    """Quantise `x`, [batch, sequence, key and value heads, head_dim], and append it as PlanishAppendKv does.

    QuantizeLinear's saturation at 0 is the lower clamp.
    """
    kv, bits, clips = heads.kv_heads, (key.bits, value.bits), (key.clip, value.clip)
    past_key, past_value = key.node.inputs[1], value.node.inputs[1]

    def per_side(values: tuple[float, float], dtype: type[np.generic], suffix: str) -> ir.Value:
        array = np.repeat(np.asarray(values, dtype), kv).reshape(1, 1, 2 * kv, 1)
        return build.initializer(array if values[0] != values[1] else array[:, :, :1], f"{name}.{suffix}")

    largest = (2 ** bits[0] - 1, 2 ** bits[1] - 1)
    levels = (float(np.float32(largest[0]) / clips[0]), float(np.float32(largest[1]) / clips[1]))
    axis = build.ints([-1], f"{name}.axis")
    maximum, minimum = (build.op(f"Reduce{kind}", [x, axis], f"{name}.{kind.lower()}") for kind in ("Max", "Min"))
    span = build.op("Sub", [maximum, minimum], f"{name}.span")
    step = build.op("Div", [span, per_side(levels, np.float32, "levels")], f"{name}.step")
    bounded = build.op("Max", [step, build.floats(SMALLEST_KV_SCALE, f"{name}.smallest")], f"{name}.bounded")
    lowest = minimum
    if min(clips) < 1:
        margins = (float((1 - clips[0]) / np.float32(2)), float((1 - clips[1]) / np.float32(2)))
        left_out = build.op("Mul", [span, per_side(margins, np.float32, "margins")], f"{name}.left_out")
        lowest = build.op("Add", [minimum, left_out], f"{name}.lowest")
    pair = build.op("Concat", [bounded, lowest], f"{name}.pair", axis=2)
    stored = build.op("Cast", [pair], f"{name}.stored", to=ir.DataType.FLOAT16)
    restored = build.op("Cast", [stored], f"{name}.restored", to=ir.DataType.FLOAT)
    scale, zero = build.ops("Split", [restored], f"{name}.new_scale", 2, axis=2, num_outputs=2)
    offset = build.op("Sub", [x, zero], f"{name}.offset")
    clamps = min(bits) < 8
    codes = build.op(
        "QuantizeLinear",
        [offset, scale],
        f"{name}.unclamped" if clamps else f"{name}.codes",
        axis=-1,
        block_size=heads.head_dim,
        output_dtype=ir.DataType.UINT8,
    )
    if clamps:
        codes = build.op("Min", [codes, per_side(largest, np.uint8, "top")], f"{name}.codes")
    if bits[0] == bits[1]:
        packed = _heads_first(build, _pack(build, codes, bits[0], f"{name}.packed"), f"{name}.heads_first")
        new = build.ops("Split", [packed], f"{name}.packed_part", 2, axis=1, num_outputs=2)
    else:
        parts = build.ops("Split", [codes], f"{name}.part", 2, axis=2, num_outputs=2)
        packed_parts = [_pack(build, part, b, f"{name}.packed_{b}") for part, b in zip(parts, bits, strict=True)]
        new = [_heads_first(build, part, f"{part.name}.heads_first") for part in packed_parts]
    present_key = build.op("Concat", [past_key, new[0]], f"{name}.present_key", axis=2)
    present_value = build.op("Concat", [past_value, new[1]], f"{name}.present_value", axis=2)

    new_scale = build.op("Transpose", [stored], f"{name}.scale_rows", perm=[0, 2, 3, 1])
    assert past_key is not None
    assert past_value is not None
    past_scale = ir.Value(
        name=f"{str(past_key.name).removesuffix('.key')}.scale",
        type=ir.TensorType(ir.DataType.FLOAT16),
        shape=ir.Shape(["batch", 4 * kv, 1, "past"]),
    )
    present_scale = build.op("Concat", [past_scale, new_scale], f"{name}.present_scale", axis=3)
    return Cache(
        bits, codes, scale, zero, (past_key, past_value), past_scale, (present_key, present_value), present_scale
    )


def _pack(build: Builder, codes: ir.Value, bits: int, name: str) -> ir.Value:
    return codes if bits == 8 else build.op(pack(bits).name, [codes], name, domain=DOMAIN)


def _heads_first(build: Builder, x: ir.Value, name: str) -> ir.Value:
    # Not before quantising: ONNX Runtime's transpose optimiser moves a Transpose through a blocked QuantizeLinear
    # without moving the block axis of its scale.
    return build.op("Transpose", [x], name, perm=[0, 2, 1, 3])


def _replace_cache_io(graph: ir.Graph, cache: Cache, key: ir.Node, value: ir.Node) -> None:
    """Put the cache's values where those of the two appends stood in the inputs and outputs of the graph."""
    key_scale, value_scale = key.inputs[2], value.inputs[2]
    assert key_scale is not None
    assert value_scale is not None
    graph.inputs[graph.inputs.index(key_scale)] = cache.past_scale
    graph.inputs.remove(value_scale)
    for old, new in zip((key.outputs[0], value.outputs[0]), cache.present, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        graph.outputs[graph.outputs.index(old)] = new
        old.name = f"{old.name}.replaced"
    old_scale = key.outputs[1]
    cache.present_scale.name = str(old_scale.name).removesuffix(".key_scale") + ".scale"
    cache.present_scale.type = cache.past_scale.type
    cache.present_scale.shape = ir.Shape([*(cache.past_scale.shape or [])[:3], "total"])
    graph.outputs[graph.outputs.index(old_scale)] = cache.present_scale
    graph.outputs.remove(value.outputs[1])


def _producer(value: ir.Value | None) -> ir.Node:
    assert value is not None
    node = value.producer()
    assert node is not None
    return node
