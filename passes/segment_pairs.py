"""Find the linears that QuantizeLinearsPass made of two segments: their products, and what gathers their channels."""

import dataclasses
from collections.abc import Iterator
from typing import TypeGuard

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from planish.passes.merge_linears import MODULES
from planish.plugins.ops import matmul, quantize_activation, weight_only_matmul
from planish.plugins.packing import PACKED_BITS

__all__ = ["SegmentProduct", "segment_pairs"]

_BITS = {op(bits).name: bits for bits in PACKED_BITS for op in (matmul, weight_only_matmul)}


@dataclasses.dataclass(frozen=True, eq=False)
class SegmentProduct:
    """The product of one segment.

    Attributes:
        product: its node.
        reader: the node that reads the activations: what quantises them, or the product itself.
        gather: the Gather of its channels in front of that; None where they lie side by side.
    """

    product: ir.Node
    reader: ir.Node
    gather: ir.Node | None

    @property
    def bits(self) -> int:
        """Bits of a weight code."""
        return _BITS[self.product.op_type]

    @property
    def k(self) -> int:
        """Input channels of the segment."""
        return self.product.attributes.get_int("k")

    @property
    def group(self) -> int:
        """Input channels to a weight scale."""
        return self.product.attributes.get_int("group")

    @property
    def weight_only(self) -> bool:
        """Whether activations stay in floating point."""
        return self.reader is self.product

    def channels(self) -> npt.NDArray[np.int32]:
        """Return which channels the Gather takes."""
        assert self.gather is not None
        assert self.gather.inputs[1] is not None
        assert self.gather.inputs[1].const_value is not None
        channels: npt.NDArray[np.int32] = self.gather.inputs[1].const_value.numpy()
        return channels

    def read(self, graph: ir.Graph, x: ir.Value) -> None:
        """Let the segment read its channels from `x`, without the Gather."""
        assert self.gather is not None
        assert self.gather.inputs[1] is not None
        self.reader.replace_input_with(0, x)
        channels = str(self.gather.inputs[1].name)
        graph.remove(self.gather, safe=True)
        del graph.initializers[channels]


def segment_pairs(graph: ir.Graph) -> Iterator[tuple[SegmentProduct, SegmentProduct]]:
    """Yield the products of the high-impact and of the other channels of every linear in two segments."""
    for node in list(graph):
        if node.op_type == "Add":
            high, rest = (value.producer() if value is not None else None for value in node.inputs)
            if _is_product(high) and _is_product(rest):
                yield _segment(high), _segment(rest)


def _is_product(node: ir.Node | None) -> TypeGuard[ir.Node]:
    return node is not None and node.op_type in _BITS and MODULES in node.metadata_props


def _segment(product: ir.Node) -> SegmentProduct:
    quantize = _producer(product)
    reader = quantize if quantize is not None and quantize.op_type == quantize_activation().name else product
    gather = _producer(reader)
    return SegmentProduct(product, reader, gather if gather is not None and gather.op_type == "Gather" else None)


def _producer(node: ir.Node) -> ir.Node | None:
    return node.inputs[0].producer() if node.inputs[0] is not None else None
