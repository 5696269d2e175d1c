"""Quantise the KV cache: Attention over a float cache becomes attention over packed codes."""

from collections.abc import Callable
from typing import NamedTuple

import onnx_ir as ir

from planish.passes.builder import Builder, dim, replace_nodes
from planish.passes.declare import declare
from planish.passes.scheme import Scheme, SchemeError
from planish.passes.transforms import Site
from planish.plugins.ops import DOMAIN, append_kv, attend
from planish.plugins.packing import packed_size

__all__ = ["QuantizeKvCachePass"]


class _Stored(NamedTuple):
    inputs: tuple[ir.Value, ir.Value]
    outputs: tuple[ir.Value, ir.Value]


class QuantizeKvCachePass(ir.passes.InPlacePass):
    """Replaces ``Attention(q, k, v, mask, past_k, past_v)`` by two PlanishAppendKv and one PlanishAttend.

    The cache inputs and outputs become packed bytes under their old names, and each gets a companion `..._scale`
    with the float16 scale and zero of every token and KV head.

    Args:
        scheme: gives the bits.
        clips: layer, and the site key or value -> the share of a head's range that the grid spans.
    """

    def __init__(self, scheme: Scheme, clips: Callable[[int, Site], float] = lambda layer, site: 1.0) -> None:
        super().__init__()
        self._scheme = scheme
        self._clips = clips

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Quantise the cache of every layer, unless the scheme leaves it in floating point."""
        if not self._scheme.quantizes_cache:
            return ir.passes.PassResult(model, modified=False)
        nodes = [node for node in model.graph if node.op_type == "Attention" and not node.domain]
        for layer, node in enumerate(nodes):
            self._quantize(model, node, (self._clips(layer, "key"), self._clips(layer, "value")))
        return ir.passes.PassResult(model, modified=bool(nodes))

    def _quantize(self, model: ir.Model, node: ir.Node, clips: tuple[float, float]) -> None:
        query, key, value, mask, past_key, past_value = node.inputs
        _, present_key, present_value = node.outputs
        head_dim = dim(past_key, 3)
        if head_dim % 8:
            raise SchemeError(
                f"A low-bit cache packs heads of a multiple of 8 channels, and this model's have {head_dim}. "
                "Leave the cache in floating point: drop the k and v parts of the scheme."
            )
        build = Builder()
        scheme, name = self._scheme, str(node.name).removesuffix(".attend")
        heads = node.attributes.get_int("q_num_heads")
        stored_key, stored_value = (
            self._store(model, build, x, past, present, f"{name}.{role}", bits, clip)
            for x, past, present, role, bits, clip in (
                (key, past_key, present_key, "key", scheme.key_bits, clips[0]),
                (value, past_value, present_value, "value", scheme.value_bits, clips[1]),
            )
        )
        op = attend(scheme.key_bits, scheme.value_bits)
        declare(model, op)
        attended = build.op(
            op.name,
            [query, *stored_key.outputs, *stored_value.outputs, mask],
            f"{name}.attended",
            domain=DOMAIN,
            heads=heads,
            head_dim=head_dim,
        )
        graph = model.graph
        for old, new in ((past_key, stored_key.inputs), (past_value, stored_value.inputs)):
            position = graph.inputs.index(old)
            graph.inputs[position : position + 1] = new
        for old_output, outputs in ((present_key, stored_key.outputs), (present_value, stored_value.outputs)):
            position = graph.outputs.index(old_output)
            graph.outputs[position : position + 1] = outputs
        replace_nodes(graph, [node], build, {node.outputs[0]: attended})

    @staticmethod
    def _store(
        model: ir.Model,
        build: Builder,
        x: ir.Value | None,
        past: ir.Value | None,
        present: ir.Value,
        name: str,
        bits: int,
        clip: float,
    ) -> _Stored:
        assert past is not None
        heads, head_dim = dim(past, 1), dim(past, 3)
        op = append_kv(bits)
        declare(model, op)
        by_head = build.op("Reshape", [x, build.ints([0, 0, heads, head_dim], f"{name}.shape")], f"{name}.by_head")
        heads_first = build.op("Transpose", [by_head], f"{name}.heads_first", perm=[0, 2, 1, 3])
        packed = packed_size(head_dim, bits)
        inputs = (
            _value(str(past.name), ir.DataType.UINT8, ["batch", heads, "past", packed]),
            _value(f"{past.name}_scale", ir.DataType.FLOAT16, ["batch", heads, "past", 2]),
        )
        codes, scale = build.ops(op.name, [heads_first, *inputs], f"{name}.append", 2, domain=DOMAIN, clip=clip)
        for made, like, output in ((codes, inputs[0], present.name), (scale, inputs[1], f"{present.name}_scale")):
            made.name, made.type = output, like.type
            made.shape = ir.Shape([*(list(like.shape or [])[:2]), "total", *(list(like.shape or [])[3:])])
        return _Stored(inputs, (codes, scale))


def _value(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
