"""Lower planish products to ONNX Runtime's integer kernels; weights become int8, or MatMulNBits blocks."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from planish.passes.builder import Builder, dim, replace_nodes
from planish.plugins.ops import DOMAIN
from planish.plugins.ops.quantize_activation import SMALLEST_SCALE
from planish.plugins.packing import unpack

__all__ = ["LowerLinearsToOrtPass"]

#: ONNX Runtime's own operators.
_ORT = "com.microsoft"
#: Block of MatMulNBits for weights with one scale per output channel: its scale is repeated.
_WHOLE_CHANNEL_BLOCK = 128


class LowerLinearsToOrtPass(ir.passes.InPlacePass):
    """Replaces PlanishQuantizeActivation, PlanishMatMul* and PlanishWeightOnlyMatMul* by what ONNX Runtime has.

    - Activations: QuantizeLinear over blocks of one token, with the run-time scale; its saturation is the lower clamp.
    - Products: MatMulIntegerToFloat, which is MatMulInteger (uint8 codes times int8 codes, exact in int32) with the
      weight scale applied as the sums leave the kernel; one per group of input channels, added up.
    - Weight-only: MatMulNBits; 2- and 3-bit codes travel in its 4-bit container.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every planish linear of the graph."""
        graph = model.graph
        zeros: dict[tuple[int, bool], ir.Value] = {}
        modified = False
        for node in list(graph):
            if node.domain != DOMAIN:
                continue
            if node.op_type == "PlanishQuantizeActivation":
                _lower_quantize(graph, node, zeros)
            elif node.op_type.startswith("PlanishMatMul"):
                _lower_product(graph, node)
            elif node.op_type.startswith("PlanishWeightOnlyMatMul"):
                _lower_weight_only(graph, node)
            else:
                continue
            modified = True
        if modified:
            graph.opset_imports[_ORT] = 1
        return ir.passes.PassResult(model, modified)


def _lower_quantize(graph: ir.Graph, node: ir.Node, zeros: dict[tuple[int, bool], ir.Value]) -> None:
    (x,) = node.inputs
    assert x is not None
    bits, clip = node.attributes.get_int("bits"), node.attributes.get_float("clip")
    name = str(node.outputs[0].name)
    highest = (1 << bits - 1) - 1
    build = Builder()
    magnitude = build.op("Abs", [x], f"{name}.magnitude")
    largest = build.op("ReduceMax", [magnitude, build.ints([-1], f"{name}.axis")], f"{name}.largest")
    factor = np.float32(clip) / np.float32(highest)
    spanned = build.op("Mul", [largest, build.floats(float(factor), f"{name}.factor")], f"{name}.spanned")
    scale = build.op("Max", [spanned, build.floats(SMALLEST_SCALE, f"{name}.smallest")], f"{name}.scale")
    # Every linear of the blocks sees the same tokens, so they share one tensor of zero points; lm_head may see fewer.
    key = (bits, name.startswith("lm_head"))
    if key not in zeros:
        zero = build.initializer(np.full((1, 1, 1), 1 << bits - 1, np.uint8), f"{name}.zero")
        zeros[key] = build.op("Expand", [zero, build.op("Shape", [scale], f"{name}.tokens")], f"{name}.zeros")
    k = _k_of_reader(node)
    # Below, uint8 saturates at code 0; above, only a clipped scale can leave the grid.
    clamps = bits < 8 and clip < 1.0
    rounded = f"{name}.unclamped" if clamps else name
    codes = build.op("QuantizeLinear", [x, scale, zeros[key]], rounded, axis=-1, block_size=k)
    if clamps:
        top = build.initializer(np.asarray(2 * highest + 1, np.uint8), f"{name}.top")
        codes = build.op("Min", [codes, top], name)
    replace_nodes(graph, [node], build, {node.outputs[0]: codes, node.outputs[1]: scale})


def _k_of_reader(node: ir.Node) -> int:
    reader = next(iter(node.outputs[0].uses())).node
    return reader.attributes.get_int("k")


def _lower_product(graph: ir.Graph, node: ir.Node) -> None:
    codes, scale, weight, weight_scale = node.inputs
    assert weight is not None
    assert weight_scale is not None
    bits = int(node.op_type.removeprefix("PlanishMatMul"))
    k, group = node.attributes.get_int("k"), node.attributes.get_int("group")
    name = str(node.outputs[0].name)
    module = str(weight.name).removesuffix(".codes")
    build = Builder()
    zero = build.initializer(
        np.asarray(1 << node.attributes.get_int("activation_bits") - 1, np.uint8), f"{name}.activation_zero"
    )
    one = build.floats(1.0, f"{name}.one")
    outputs = dim(weight, 0)
    sizes = [min(group, k - start) for start in range(0, k, group)]
    parts = [codes]
    if len(sizes) > 1:
        # A node: as an initializer, those of many groups would be external data, where ONNX Runtime reads no shapes.
        of_groups = build.op("Constant", [], f"{name}.sizes", value_ints=sizes)
        parts = list(build.ops("Split", [codes, of_groups], f"{name}.groups", len(sizes), axis=-1))
    products = []
    for g, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        suffix = f".{g}" if len(sizes) > 1 else ""
        signed = _signed_codes(weight, bits, slice(g * group, g * group + size), f"{module}.int8{suffix}", outputs)
        row = _scale_row(weight_scale, g, f"{module}.scale_row{suffix}", outputs)
        inputs = [part, build.initializer(signed, str(signed.name)), one, build.initializer(row, str(row.name)), zero]
        products.append(build.op("MatMulIntegerToFloat", inputs, f"{name}.integer{suffix}", domain=_ORT))
    total = products[0] if len(products) == 1 else build.op("Sum", products, f"{name}.summed")
    y = build.op("Mul", [total, scale], name)
    _replace(graph, node, build, y)


def _lower_weight_only(graph: ir.Graph, node: ir.Node) -> None:
    x, weight, weight_scale = node.inputs
    assert weight is not None
    assert weight_scale is not None
    bits = int(node.op_type.removeprefix("PlanishWeightOnlyMatMul"))
    k, group = node.attributes.get_int("k"), node.attributes.get_int("group")
    outputs = dim(weight, 0)
    # Of the widths up to 4 bits ONNX Runtime multiplies only 4 by floats without unpacking the whole matrix first.
    container = max(bits, 4)
    block = group if group < k else _WHOLE_CHANNEL_BLOCK
    blocks = -(-k // block)
    module = str(weight.name).removesuffix(".codes")

    def stored() -> ir.TensorProtocol:
        codes = unpack(_array(weight), bits, k) + np.uint8((1 << container - 1) - (1 << bits - 1))
        padded = np.full((outputs, blocks * block), 1 << container - 1, np.uint8)
        padded[:, :k] = codes
        per_byte = 8 // container
        lanes = padded.reshape(outputs, blocks, block // per_byte, per_byte)
        packed = np.zeros(lanes.shape[:-1], np.uint8)
        for lane in range(per_byte):
            packed |= lanes[..., lane] << np.uint8(lane * container)
        return ir.Tensor(packed)

    def scales() -> ir.TensorProtocol:
        by_output = _array(weight_scale).astype(np.float32).T
        return ir.Tensor(np.ascontiguousarray(np.broadcast_to(by_output, (outputs, blocks))))

    build = Builder()
    blocked_shape = ir.Shape([outputs, blocks, block * container // 8])
    blocked = ir.LazyTensor(stored, ir.DataType.UINT8, blocked_shape, name=f"{module}.blocks")
    row = ir.LazyTensor(scales, ir.DataType.FLOAT, ir.Shape([outputs, blocks]), name=f"{module}.block_scales")
    y = build.op(
        "MatMulNBits",
        [x, build.initializer(blocked, str(blocked.name)), build.initializer(row, str(row.name))],
        str(node.outputs[0].name),
        domain=_ORT,
        K=k,
        N=outputs,
        bits=container,
        block_size=block,
        accuracy_level=1,  # multiply in float32: level 4 would quantise the activations
    )
    _replace(graph, node, build, y)


def _replace(graph: ir.Graph, node: ir.Node, build: Builder, y: ir.Value) -> None:
    y.type, y.shape = node.outputs[0].type, node.outputs[0].shape
    build.nodes[-1].metadata_props.update(node.metadata_props)
    old = [value for value in node.inputs if value is not None and value.is_initializer()]
    replace_nodes(graph, [node], build, {node.outputs[0]: y})
    for value in old:
        del graph.initializers[str(value.name)]


def _signed_codes(weight: ir.Value, bits: int, channels: slice, name: str, outputs: int) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        codes = unpack(_array(weight), bits, channels.stop)[:, channels]
        signed = codes.astype(np.int16) - (1 << bits - 1)
        return ir.Tensor(np.ascontiguousarray(signed.astype(np.int8).T))

    return ir.LazyTensor(read, ir.DataType.INT8, ir.Shape([channels.stop - channels.start, outputs]), name=name)


def _scale_row(weight_scale: ir.Value, g: int, name: str, outputs: int) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        return ir.Tensor(_array(weight_scale)[g].astype(np.float32))

    return ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape([outputs]), name=name)


def _array(value: ir.Value) -> npt.NDArray[Any]:
    assert value.const_value is not None
    return value.const_value.numpy()
