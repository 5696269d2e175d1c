"""Leave the channels that are not high-impact ones where they are: their product runs over all channels instead.

    Q(x[rest]) Q(W[:, rest])^T = Q(x * m) V^T,    m = 1 at rest, V[:, rest] = Q(W[:, rest]), both 0 elsewhere

It is the same number: an activation that is 0 adds nothing to the largest magnitude of its token, and a weight that
is 0 adds nothing to a sum. ONNX Runtime takes longer to gather the channels of many tokens than to multiply them, so
this leaves only the few high-impact ones to be gathered.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from planish.passes.builder import Builder, dim
from planish.passes.merge_linears import MODULES
from planish.plugins.ops import matmul, quantize_activation, weight_only_matmul
from planish.plugins.packing import PACKED_BITS, pack, packed_size, unpack

__all__ = ["SpreadRestSegmentPass"]

_BITS = {op(bits).name: bits for bits in PACKED_BITS for op in (matmul, weight_only_matmul)}


class SpreadRestSegmentPass(ir.passes.InPlacePass):
    """Replaces ``Gather(x, rest)`` by ``Mul(x, mask)``, or by x itself where only weights are quantised.

    Only where a weight has one scale per output channel: groups are of channels that are gathered side by side.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Spread the rest of every linear in two segments."""
        modified = False
        for high, rest in list(_pairs(model.graph)):
            if rest.attributes.get_int("group") == rest.attributes.get_int("k"):
                _spread(model.graph, rest, rest.attributes.get_int("k") + high.attributes.get_int("k"))
                modified = True
        return ir.passes.PassResult(model, modified)


def _pairs(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node]]:
    """Yield the products of the high and of the other channels of every linear in two segments."""
    for node in graph:
        if node.op_type == "Add":
            high, rest = (value.producer() if value is not None else None for value in node.inputs)
            if high and rest and MODULES in high.metadata_props and rest.op_type in _BITS:
                yield high, rest


def _spread(graph: ir.Graph, product: ir.Node, k: int) -> None:
    reader, weight = product, product.inputs[-2]
    assert weight is not None
    if product.inputs[0] is not None and (quantize := product.inputs[0].producer()) is not None:
        reader = quantize if quantize.op_type == quantize_activation().name else product
    gathered = reader.inputs[0]
    gather = gathered.producer() if gathered is not None else None
    assert gather is not None
    x, channels_value = gather.inputs
    assert channels_value is not None
    assert channels_value.const_value is not None
    channels = channels_value.const_value.numpy()
    if reader is not product:
        mask = np.zeros(k, np.float32)
        mask[channels] = 1
        build = Builder()
        name = str(gather.name).removesuffix(".gathered")
        x = build.op("Mul", [x, build.initializer(mask, f"{name}.mask")], f"{name}.masked")
        for value in build.initializers:
            graph.register_initializer(value)
        graph.insert_before(gather, build.nodes)
    reader.replace_input_with(0, x)
    graph.remove(gather, safe=True)
    del graph.initializers[str(channels_value.name)]
    _spread_weight(weight, _BITS[product.op_type], channels, k)
    for attribute in ("k", "group"):
        product.attributes[attribute] = ir.AttrInt64(attribute, k)


def _spread_weight(weight: ir.Value, bits: int, channels: npt.NDArray[np.int32], k: int) -> None:
    stored, outputs = weight.const_value, dim(weight, 0)
    assert stored is not None

    def spread() -> ir.TensorProtocol:
        codes = np.full((outputs, k), 1 << bits - 1, np.uint8)
        codes[:, channels] = unpack(stored.numpy(), bits, len(channels))
        return ir.Tensor(pack(codes, bits))

    weight.shape = ir.Shape([outputs, packed_size(k, bits)])
    weight.const_value = ir.LazyTensor(spread, ir.DataType.UINT8, weight.shape, name=weight.name)
