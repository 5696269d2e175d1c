"""Replace the growing packed cache by plugin nodes that write one of fixed length in place and read it."""

from typing import Any, NamedTuple

import numpy as np

from planish.compiler.backends.tensorrt.surgery import LeftOut, Surgery
from planish.plugins.ops import append_kv, attend
from planish.plugins.packing import PACKED_BITS
from planish.plugins.tensorrt.plugins import KV_APPEND, KV_ATTEND, LAYOUT

__all__ = ["NEW_LENGTHS", "PAST_LENGTHS", "plug_cache"]

_APPENDS = {append_kv(bits).name: bits for bits in PACKED_BITS}
_ATTENDS = {attend(key, value).name for key in PACKED_BITS for value in PACKED_BITS}

#: The inputs that say how many tokens of each sequence the cache has, and how many come: int32 [batch].
PAST_LENGTHS, NEW_LENGTHS = "past_lengths", "new_lengths"


class _Side(NamedTuple):
    """The keys, or the values, of one layer: the node that appends them, and its bits."""

    append: Any
    bits: int

    @property
    def new(self) -> Any:
        """The new rows, [batch, tokens, kv_heads * head_dim]: before the Reshape and Transpose that put heads first."""
        transpose = self.append.inputs[0].inputs[0]
        reshape = transpose.inputs[0].inputs[0]
        assert (reshape.op, transpose.op) == ("Reshape", "Transpose")
        return reshape.inputs[0]

    @property
    def past(self) -> list[Any]:
        return list(self.append.inputs[1:3])

    @property
    def present(self) -> list[Any]:
        return list(self.append.outputs)


def plug_cache(surgery: Surgery, context: int) -> list[LeftOut]:
    """Put plugin nodes in the place of every PlanishAppendKv and PlanishAttend, or of none.

    The caches become int32 [batch, kv_heads, context, words], four bytes of packed codes to a number, with float16
    [batch, kv_heads, context, 2] beside them, under their old names. Sequences are padded behind their tokens, and
    `PAST_LENGTHS` and `NEW_LENGTHS` take the place of attention_mask.

    Returns:
        Why not, for every layer, if a kernel is lacking; the graph is then as it was.
    """
    attends = [node for node in surgery.graph.nodes if node.op in _ATTENDS]
    layers = [(node, _side(surgery, node.inputs[1]), _side(surgery, node.inputs[3])) for node in attends]
    attributes = [_attributes(*layer, context) for layer in layers]
    left = [
        LeftOut(node.name, why)
        for (node, _, _), (append, read) in zip(layers, attributes, strict=True)
        if (why := KV_APPEND.problem(append) or KV_ATTEND.problem(read))
    ]
    if left or not layers:
        return left
    lengths = [surgery.variable(name, np.int32, ["batch"]) for name in (PAST_LENGTHS, NEW_LENGTHS)]
    graph = surgery.graph
    place = [each.name for each in graph.inputs].index("attention_mask")
    graph.inputs[place : place + 1] = lengths
    for layer, (append, read) in zip(layers, attributes, strict=True):
        _plug(surgery, layer, append, read, lengths)
    return []


def _side(surgery: Surgery, stored: Any) -> _Side:
    append = surgery.producer(stored)
    assert append is not None
    return _Side(append, _APPENDS[append.op])


def _attributes(node: Any, key: _Side, value: _Side, context: int) -> tuple[dict[str, float], dict[str, float]]:
    cache = {
        "layout": LAYOUT,
        "kv_heads": int(key.past[0].shape[1]),
        "head_dim": int(node.attrs["head_dim"]),
        "context": context,
        "key_bits": key.bits,
        "value_bits": value.bits,
    }
    clips = {"key_clip": float(key.append.attrs["clip"]), "value_clip": float(value.append.attrs["clip"])}
    return {**cache, **clips}, {**cache, "heads": int(node.attrs["heads"])}


def _plug(
    surgery: Surgery,
    layer: tuple[Any, _Side, _Side],
    append: dict[str, float],
    read: dict[str, float],
    lengths: list[Any],
) -> None:
    node, key, value = layer
    query, y, name = node.inputs[0], node.outputs[0], node.name.removesuffix(".attended")
    past, present = [*key.past, *value.past], [*key.present, *value.present]
    new = [key.new, value.new]
    for tensors in (past, present):
        for tensor, bits in zip(tensors[::2], (key.bits, value.bits), strict=True):
            words = int(read["head_dim"]) * bits // 32
            tensor.dtype, tensor.shape = np.dtype(np.int32), [*tensor.shape[:2], int(read["context"]), words]
        for tensor in tensors[1::2]:
            tensor.shape = [*tensor.shape[:2], int(read["context"]), 2]
    surgery.plug(KV_APPEND, f"{name}.append", append, [*new, *lengths, *past], present)
    surgery.plug(KV_ATTEND, f"{name}.attend", read, [query, *lengths, *present], [y])
