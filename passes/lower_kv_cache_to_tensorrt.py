"""Lower the KV cache to what TensorRT updates in place: a float cache of fixed length, written by TensorScatter."""

import dataclasses

import numpy as np
import onnx_ir as ir

from planish.passes.builder import Builder, replace_nodes
from planish.plugins.ops import DOMAIN, append_kv, attend
from planish.plugins.ops.append_kv import SMALLEST_KV_SCALE
from planish.plugins.packing import PACKED_BITS

__all__ = ["LowerKvCacheToTensorrtPass"]

_APPENDS = {append_kv(bits).name: bits for bits in PACKED_BITS}
_ATTENDS = {attend(key, value).name for key in PACKED_BITS for value in PACKED_BITS}


@dataclasses.dataclass(frozen=True)
class _Slots:
    """The two values every layer shares: where new rows go, int64 [batch], and the mask [batch, 1, seq, context]."""

    write_indices: ir.Value
    mask: ir.Value


@dataclasses.dataclass(frozen=True)
class _Side:
    """The keys, or the values, of one layer.

    Attributes:
        name: prefix of what is built for it.
        new: the rows to store, float [batch, kv_heads, sequence, head_dim].
        past: the cache input.
        present: the cache output.
        heads: KV heads.
        head_dim: width of a head.
        append: the PlanishAppendKv that makes the codes; None in a float model.
        past_scale: its input of scales.
        present_scale: its output of scales.
    """

    name: str
    new: ir.Value
    past: ir.Value
    present: ir.Value
    heads: int
    head_dim: int
    append: ir.Node | None = None
    past_scale: ir.Value | None = None
    present_scale: ir.Value | None = None


class LowerKvCacheToTensorrtPass(ir.passes.InPlacePass):
    """Replaces a growing cache by one of `context` slots, ``Attention(q, TensorScatter(past, new, at), ..., mask)``.

    New keys and values are rounded to the values of their codes before they are stored, by the arithmetic of
    PlanishAppendKv; what is stored are floats, because TensorScatter takes no integers in TensorRT. The mask is
    boolean and explicit: TensorRT 1.7 ignores `nonpad_kv_seqlen`, and would attend to empty slots.

    The inputs become: attention_mask [batch, context], 1 in every slot that holds a real token once this call's
    tokens are written; write_indices, int64 [batch], the slot of each row's first new token; and the caches, float
    [batch, kv_heads, context, head_dim], under their old names. position_ids stay the positions of the rotation.
    """

    def __init__(self, context: int) -> None:
        super().__init__()
        self._context = context

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower the attention of every layer."""
        graph = model.graph
        nodes = [node for node in graph if _is_attention(node)]
        if not nodes:
            return ir.passes.PassResult(model, modified=False)
        slots = _add_slots(graph, self._context)
        for node in nodes:
            _lower(graph, node, slots, self._context)
        return ir.passes.PassResult(model, modified=True)


def _is_attention(node: ir.Node) -> bool:
    if node.domain == DOMAIN:
        return node.op_type in _ATTENDS
    # With past keys and values: not the Attention that this pass leaves behind.
    return node.op_type == "Attention" and len(node.inputs) == 6


def _add_slots(graph: ir.Graph, context: int) -> _Slots:
    """Add the input write_indices and the boolean mask: [b, 0, j, s] is whether token j of row b sees slot s.

    A token sees the real tokens up to its own slot, and always itself.
    """
    inputs = {value.name: value for value in graph.inputs}
    attention_mask = inputs["attention_mask"]
    write_indices = ir.Value(name="write_indices", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch"]))
    graph.inputs.insert(graph.inputs.index(attention_mask) + 1, write_indices)
    attention_mask.shape = ir.Shape(["batch", context])

    build, name = Builder(), "model.slots"
    axis, second = build.ints([-1], f"{name}.last_axis"), build.ints([1], f"{name}.second_axis")
    zero, one = build.ints(0, f"{name}.zero"), build.ints(1, f"{name}.one")
    all_slots = build.initializer(np.arange(context, dtype=np.int64), f"{name}.all")
    length = build.op("Shape", [inputs["input_ids"]], f"{name}.shape", start=1, end=2)
    steps = build.op("Range", [zero, build.op("Squeeze", [length], f"{name}.sequence"), one], f"{name}.steps")
    start = build.op("Unsqueeze", [write_indices, axis], f"{name}.start")
    own = build.op("Add", [start, steps], f"{name}.of_tokens")
    own = build.op("Unsqueeze", [own, axis], f"{name}.own")
    real = build.op("Cast", [attention_mask], f"{name}.are_real", to=ir.DataType.BOOL)
    real = build.op("Unsqueeze", [real, second], f"{name}.real")
    causal = build.op("LessOrEqual", [all_slots, own], f"{name}.causal")
    itself = build.op("Equal", [all_slots, own], f"{name}.itself")
    seen = build.op("Or", [build.op("And", [causal, real], f"{name}.past_real"), itself], f"{name}.seen")
    mask = build.op("Unsqueeze", [seen, second], f"{name}.mask")
    for value in build.initializers:
        graph.register_initializer(value)
    graph.insert_before(graph.node(0), build.nodes)
    return _Slots(write_indices, mask)


def _lower(graph: ir.Graph, node: ir.Node, slots: _Slots, context: int) -> None:
    build = Builder()
    low_bit = node.domain == DOMAIN
    name = str(node.name).removesuffix(".attended" if low_bit else ".attend")
    sides = _low_bit_sides(build, node, name) if low_bit else _float_sides(build, node, name)
    heads = node.attributes.get_int("heads" if low_bit else "q_num_heads")
    caches = []
    for side in sides:
        cache_type = ir.TensorType(ir.DataType.FLOAT)
        cache_shape: list[int | str] = ["batch", side.heads, context, side.head_dim]
        side.past.type, side.past.shape = cache_type, ir.Shape(cache_shape)
        written = build.op("TensorScatter", [side.past, side.new, slots.write_indices], f"{side.name}.written", axis=2)
        written.type, written.shape = cache_type, ir.Shape(cache_shape)
        caches.append(written)
    query = _heads_first(build, node.inputs[0], heads, sides[0].head_dim, f"{name}.query")
    query.type = ir.TensorType(ir.DataType.FLOAT)
    query.shape = ir.Shape(["batch", heads, "sequence", sides[0].head_dim])
    y = build.op("Attention", [query, *caches, slots.mask], f"{name}.attention")
    y = build.op("Transpose", [y], f"{name}.by_token", perm=[0, 2, 1, 3])
    y = build.op("Reshape", [y, build.ints([0, 0, heads * sides[0].head_dim], f"{name}.merged")], f"{name}.attended")
    for side in sides:
        if side.present_scale is not None:
            graph.outputs.remove(side.present_scale)
    appends = [side.append for side in sides if side.append is not None]
    presents = {side.present: written for side, written in zip(sides, caches, strict=True)}
    # The attention comes first in the list because what is built takes the place of the first.
    replace_nodes(graph, [node, *appends], build, {node.outputs[0]: y, **presents})
    for side in sides:
        if side.past_scale is not None:
            graph.inputs.remove(side.past_scale)


def _float_sides(build: Builder, node: ir.Node, name: str) -> list[_Side]:
    sides = []
    for i, part in enumerate(("key", "value")):
        past = node.inputs[4 + i]
        assert past is not None
        assert past.shape is not None
        heads, head_dim = _fixed(past.shape[1]), _fixed(past.shape[3])
        new = _heads_first(build, node.inputs[1 + i], heads, head_dim, f"{name}.{part}")
        sides.append(_Side(f"{name}.{part}", new, past, node.outputs[1 + i], heads, head_dim))
    return sides


def _low_bit_sides(build: Builder, node: ir.Node, name: str) -> list[_Side]:
    sides = []
    for stored, part in ((node.inputs[1], "key"), (node.inputs[3], "value")):
        append = stored.producer() if stored is not None else None
        assert append is not None
        assert append.op_type in _APPENDS
        x, past, past_scale = append.inputs
        assert x is not None
        assert past is not None
        assert past.shape is not None
        bits = _APPENDS[append.op_type]
        new = _round_to_codes(build, x, bits, np.float32(append.attributes.get_float("clip")), f"{name}.{part}")
        heads, head_dim = _fixed(past.shape[1]), _fixed(past.shape[3]) * 8 // bits
        present, present_scale = append.outputs
        sides.append(_Side(f"{name}.{part}", new, past, present, heads, head_dim, append, past_scale, present_scale))
    return sides


def _round_to_codes(build: Builder, x: ir.Value, bits: int, clip: np.float32, name: str) -> ir.Value:
    """Return what PlanishAppendKv's codes of `x`, float [batch, kv_heads, sequence, head_dim], stand for."""
    last, highest = build.ints([-1], f"{name}.last_axis"), build.floats(2**bits - 1, f"{name}.highest")

    def as_stored(value: ir.Value, part: str) -> ir.Value:
        half = build.op("Cast", [value], f"{name}.{part}_stored", to=ir.DataType.FLOAT16)
        return build.op("Cast", [half], f"{name}.{part}", to=ir.DataType.FLOAT)

    maximum, minimum = (build.op(f"Reduce{end}", [x, last], f"{name}.{end.lower()}") for end in ("Max", "Min"))
    span = build.op("Sub", [maximum, minimum], f"{name}.span")
    levels, lowest = highest, minimum
    if clip < 1:
        levels = build.floats(float(np.float32(2**bits - 1) / clip), f"{name}.levels")
        margin = build.floats(float((1 - clip) / np.float32(2)), f"{name}.margin")
        left_out = build.op("Mul", [span, margin], f"{name}.left_out")
        lowest = build.op("Add", [minimum, left_out], f"{name}.lowest_number")
    step = build.op("Div", [span, levels], f"{name}.step")
    bounded = build.op("Max", [step, build.floats(SMALLEST_KV_SCALE, f"{name}.smallest")], f"{name}.bounded_step")
    scale, zero = as_stored(bounded, "scale"), as_stored(lowest, "zero")
    steps = build.op("Div", [build.op("Sub", [x, zero], f"{name}.offset"), scale], f"{name}.steps")
    rounded = build.op("Round", [steps], f"{name}.rounded")
    codes = build.op("Clip", [rounded, build.floats(0.0, f"{name}.lowest"), highest], f"{name}.codes")
    return build.op("Add", [build.op("Mul", [codes, scale], f"{name}.scaled"), zero], f"{name}.new")


def _heads_first(build: Builder, x: ir.Value | None, heads: int, head_dim: int, name: str) -> ir.Value:
    """Return x, [batch, sequence, heads * head_dim], as [batch, heads, sequence, head_dim]."""
    shape = build.ints([0, 0, heads, head_dim], f"{name}.split_shape")
    by_head = build.op("Reshape", [x, shape], f"{name}.split")
    return build.op("Transpose", [by_head], f"{name}.split_heads_first", perm=[0, 2, 1, 3])


def _fixed(dim: object) -> int:
    assert isinstance(dim, int)
    return dim
