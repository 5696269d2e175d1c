"""Leave the channels that are not high-impact ones where they are: their product runs over all channels instead.

    Q(x[rest]) Q(W[:, rest])^T = Q(x * m) V^T,    m = 1 at rest, V[:, rest] = Q(W[:, rest]), both 0 elsewhere

It is the same number: an activation that is 0 adds nothing to the largest magnitude of its token, and a weight that
is 0 adds nothing to a sum. ONNX Runtime takes longer to gather the channels of many tokens than to multiply them, so
this leaves only the few high-impact ones to be gathered.
"""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from planish.passes.builder import Builder, dim
from planish.passes.segment_pairs import SegmentProduct, segment_pairs
from planish.plugins.packing import pack, packed_size, unpack

__all__ = ["SpreadRestSegmentPass"]


class SpreadRestSegmentPass(ir.passes.InPlacePass):
    """Replaces ``Gather(x, rest)`` by ``Mul(x, mask)``, or by x itself where only weights are quantised.

    Only where a weight has one scale per output channel: groups are of channels that are gathered side by side.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Spread the rest of every linear in two segments."""
        modified = False
        for high, rest in segment_pairs(model.graph):
            if rest.gather is not None and rest.group == rest.k:
                _spread(model.graph, rest, rest.gather, high.k + rest.k)
                modified = True
        return ir.passes.PassResult(model, modified)


def _spread(graph: ir.Graph, rest: SegmentProduct, gather: ir.Node, k: int) -> None:
    x, weight, channels = gather.inputs[0], rest.product.inputs[-2], rest.channels()
    assert x is not None
    assert weight is not None
    if not rest.weight_only:
        x = _masked(graph, gather, x, channels, k)
    _spread_weight(weight, rest.bits, channels, k)
    for attribute in ("k", "group"):
        rest.product.attributes[attribute] = ir.AttrInt64(attribute, k)
    rest.read(graph, x)


def _masked(graph: ir.Graph, gather: ir.Node, x: ir.Value, channels: npt.NDArray[np.int32], k: int) -> ir.Value:
    mask = np.zeros(k, np.float32)
    mask[channels] = 1
    build, name = Builder(), str(gather.name).removesuffix(".gathered")
    masked = build.op("Mul", [x, build.initializer(mask, f"{name}.mask")], f"{name}.masked")
    for value in build.initializers:
        graph.register_initializer(value)
    graph.insert_before(gather, build.nodes)
    return masked


def _spread_weight(weight: ir.Value, bits: int, channels: npt.NDArray[np.int32], k: int) -> None:
    stored, outputs = weight.const_value, dim(weight, 0)
    assert stored is not None

    def spread() -> ir.TensorProtocol:
        codes = np.full((outputs, k), 1 << bits - 1, np.uint8)
        codes[:, channels] = unpack(stored.numpy(), bits, len(channels))
        return ir.Tensor(pack(codes, bits))

    weight.shape = ir.Shape([outputs, packed_size(k, bits)])
    weight.const_value = ir.LazyTensor(spread, ir.DataType.UINT8, weight.shape, name=weight.name)
