"""Fold the order of the channels behind an FFN's activation into the two linears in front of it.

    silu(x G^T) * (x U^T), gathered by an order = silu(x G[order]^T) * (x U[order]^T)

Hidden units of an FFN can be exchanged: their rows of codes, scales and biases go into the order in which `down_proj`
wants its channels, and what was gathered lies side by side. Nothing is computed in another way, bit for bit.
"""

import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from planish.passes.builder import Builder
from planish.passes.merge_linears import MODULES
from planish.passes.segment_pairs import SegmentProduct, segment_pairs
from planish.plugins.ops import DOMAIN

__all__ = ["FoldChannelOrderPass"]

_HIDDEN = re.compile(r"(model\.layers\.\d+\.mlp)\.hidden")

Order = npt.NDArray[np.int64]


class FoldChannelOrderPass(ir.passes.InPlacePass):
    """Replaces the two Gathers in front of a `down_proj` by one ``Split``, where no online transform stands between.

    Before: a graph behind QuantizeLinearsPass. The rows of `gate_proj` and `up_proj` are permuted when they are read.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold the order of every FFN whose activation is gathered as it is."""
        modified = False
        for high, rest in segment_pairs(model.graph):
            if high.gather is None or rest.gather is None or high.gather.inputs[0] is None:
                continue
            hidden = high.gather.inputs[0]
            match = _HIDDEN.fullmatch(str(hidden.name))
            if match:
                order = np.concatenate([high.channels(), rest.channels()]).astype(np.int64)
                _order_rows(model.graph, match[1], order)
                _split(model.graph, hidden, high, rest)
                modified = True
        return ir.passes.PassResult(model, modified)


def _order_rows(graph: ir.Graph, mlp: str, order: Order) -> None:
    """Put the outputs of gate and up, merged or not, into `order`."""
    modules = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
    for node in graph:
        computed = node.metadata_props.get(MODULES, "").split(",")
        if node.domain == DOMAIN and set(computed) <= set(modules):
            rows = np.concatenate([order + i * len(order) for i in range(len(computed))])
            codes, scales = node.inputs[-2:]
            _rewrite(codes, lambda array, rows=rows: array[rows])
            _rewrite(scales, lambda array, rows=rows: array[:, rows])
    for module in modules:
        if f"{module}.bias" in graph.initializers:
            _rewrite(graph.initializers[f"{module}.bias"], lambda array: array[order])


def _rewrite(value: ir.Value | None, change: Callable[..., npt.NDArray[np.generic]]) -> None:
    assert value is not None
    assert value.const_value is not None
    stored = value.const_value

    def read() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(change(stored.numpy())))

    value.const_value = ir.LazyTensor(read, stored.dtype, ir.Shape(stored.shape.numpy()), name=value.name)


def _split(graph: ir.Graph, hidden: ir.Value, high: SegmentProduct, rest: SegmentProduct) -> None:
    assert high.gather is not None
    build = Builder()
    sizes = build.ints([high.k, rest.k], f"{hidden.name}.segment_sizes")
    parts = build.ops("Split", [hidden, sizes], f"{hidden.name}.segments", 2, axis=-1)
    for value in build.initializers:
        graph.register_initializer(value)
    graph.insert_before(high.gather, build.nodes)
    for segment, part in zip((high, rest), parts, strict=True):
        segment.read(graph, part)
