"""Lower low-bit linears to what TensorRT parses without a plugin: DequantizeLinear of INT4 or INT8 codes and MatMul.

Both sides of the product are brought into [-1, 1] by powers of two and scales, and the scales follow in float32:

    y[t, n] = scale[t] * column[n] * sum_k unit[t, k] * W[k, n]

    unit = (codes - 2^(a-1)) / 2^(a-1)              W = (w - 2^(bits-1)) / 2^(bits-1) * ratio
    scale = 2^(a-1) * activation scale              column = 2^(bits-1) * weight scale / ratio

With one weight scale per output channel `ratio` is 1, so every product of the MatMul is a float16 number and the
only rounding is that of the sum. With groups, `ratio` is the weight scale over the power of two above the channel's
largest, so the scales of weights need no more range than float16 has either way, and no sum over fewer than 65504
input channels can leave float16, whatever the outliers of a token are.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from planish.passes.builder import Builder, replace_nodes
from planish.plugins.ops import DOMAIN, matmul, quantize_activation, weight_only_matmul
from planish.plugins.ops.quantize_activation import SMALLEST_SCALE
from planish.plugins.packing import PACKED_BITS, unpack

__all__ = ["LowerLinearsToTensorrtPass"]

_PRODUCTS = {matmul(bits).name: bits for bits in PACKED_BITS}
_WEIGHT_ONLY = {weight_only_matmul(bits).name: bits for bits in PACKED_BITS}
#: The largest block of input channels that TensorRT's weight-only kernels give one scale.
_LARGEST_BLOCK = 128


class _Weight(NamedTuple):
    """A stored weight: its two tensors and what the node says of them."""

    codes: ir.TensorProtocol
    scale: ir.TensorProtocol
    bits: int
    k: int
    group: int

    @property
    def outputs(self) -> int:
        return _fixed(self.codes.shape[0])

    @property
    def zero(self) -> int:
        return 1 << self.bits - 1

    @property
    def grouped(self) -> bool:
        return _fixed(self.scale.shape[0]) > 1


class LowerLinearsToTensorrtPass(ir.passes.InPlacePass):
    """Replaces ``PlanishMatMul(PlanishQuantizeActivation(x), codes)`` by ``MatMul(unit(x), DequantizeLinear(codes))``.

    Activations are quantised at run time by Abs, ReduceMax, Div, Round and Clip, which TensorRT fuses. Codes of 2 and
    3 bits are held in INT4, those of 8 in INT8, unpacked when the model is saved. A group whose length does not
    divide the width is served by smaller blocks that repeat its scale. PlanishWeightOnlyMatMul divides each token by
    its largest magnitude and rounds nothing.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every low-bit linear."""
        nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type in {*_PRODUCTS, *_WEIGHT_ONLY}]
        for node in nodes:
            _lower(model.graph, node)
        return ir.passes.PassResult(model, modified=bool(nodes))


def _lower(graph: ir.Graph, node: ir.Node) -> None:
    weight_only = node.op_type in _WEIGHT_ONLY
    bits = _WEIGHT_ONLY[node.op_type] if weight_only else _PRODUCTS[node.op_type]
    codes, scales = node.inputs[-2:]
    assert codes is not None
    assert codes.const_value is not None
    assert scales is not None
    assert scales.const_value is not None
    attributes = node.attributes
    weight = _Weight(codes.const_value, scales.const_value, bits, attributes.get_int("k"), attributes.get_int("group"))
    name = str(node.name).removesuffix(".product")
    build, old = Builder(), [node]
    if weight_only:
        unit, token_scale = _normalize(build, node.inputs[0], name)
    else:
        quantize = node.inputs[0].producer() if node.inputs[0] is not None else None
        assert quantize is not None
        assert quantize.op_type == quantize_activation().name
        unit, token_scale = _quantize(build, quantize, name)
        old = [quantize, node]
    dequantized, column = _dequantize(graph, build, weight, name)
    product = build.op("MatMul", [unit, dequantized], f"{name}.units")
    by_channel = build.op("Mul", [product, column], f"{name}.by_channel")
    y = build.op("Mul", [by_channel, token_scale], f"{name}.product")
    y.type, y.shape = node.outputs[0].type, node.outputs[0].shape
    replace_nodes(graph, old, build, {node.outputs[0]: y})
    for value in (codes, scales):
        if not value.uses():
            del graph.initializers[str(value.name)]


def _largest(build: Builder, x: ir.Value | None, name: str) -> ir.Value:
    magnitude = build.op("Abs", [x], f"{name}.magnitude")
    return build.op("ReduceMax", [magnitude, build.ints([-1], f"{name}.last_axis")], f"{name}.largest")


def _normalize(build: Builder, x: ir.Value | None, name: str) -> tuple[ir.Value, ir.Value]:
    """Return x divided by each token's largest magnitude, and that magnitude [..., 1]."""
    largest = _largest(build, x, name)
    scale = build.op("Max", [largest, build.floats(SMALLEST_SCALE, f"{name}.smallest")], f"{name}.token_scale")
    return build.op("Div", [x, scale], f"{name}.unit"), scale


def _quantize(build: Builder, quantize: ir.Node, name: str) -> tuple[ir.Value, ir.Value]:
    """Return the codes of PlanishQuantizeActivation over 2^(a-1), float [..., K], and scale times 2^(a-1)."""
    x = quantize.inputs[0]
    zero = 1 << quantize.attributes.get_int("bits") - 1
    factor = np.float32(quantize.attributes.get_float("clip")) / np.float32(zero - 1)
    largest = _largest(build, x, name)
    spanned = build.op("Mul", [largest, build.floats(float(factor), f"{name}.factor")], f"{name}.spanned")
    step = build.op("Max", [spanned, build.floats(SMALLEST_SCALE, f"{name}.smallest")], f"{name}.step")
    rounded = build.op("Round", [build.op("Div", [x, step], f"{name}.scaled")], f"{name}.rounded")
    bounds = build.floats(-zero, f"{name}.lowest"), build.floats(zero - 1, f"{name}.highest")
    clamped = build.op("Clip", [rounded, *bounds], f"{name}.clamped")
    unit = build.op("Mul", [clamped, build.floats(1 / zero, f"{name}.per_zero")], f"{name}.unit")
    return unit, build.op("Mul", [step, build.floats(zero, f"{name}.zero")], f"{name}.token_scale")


def _dequantize(graph: ir.Graph, build: Builder, weight: _Weight, name: str) -> tuple[ir.Value, ir.Value]:
    """Return W, float [K, N] in [-1, 1], and `column`, float [N]."""
    dtype = ir.DataType.INT8 if weight.bits == 8 else ir.DataType.INT4

    def signed() -> ir.TensorProtocol:
        codes = unpack(weight.codes.numpy(), weight.bits, weight.k).T.astype(np.int16) - weight.zero
        return ir.Tensor(codes.astype(dtype.numpy(), order="C"), dtype=dtype)

    def column() -> ir.TensorProtocol:
        return ir.Tensor(_column(weight) * np.float32(weight.zero))

    def step() -> ir.TensorProtocol:
        ratio = weight.scale.numpy().astype(np.float32) / _column(weight) / np.float32(weight.zero)
        return ir.Tensor(np.repeat(ratio, -(-weight.group // block), axis=0)[: weight.k // block])

    codes = _lazy(build, signed, dtype, [weight.k, weight.outputs], f"{name}.signed_codes")
    factor = _lazy(build, column, ir.DataType.FLOAT, [weight.outputs], f"{name}.column")
    block = math.gcd(weight.k, weight.group, _LARGEST_BLOCK)
    if weight.grouped:
        steps = _lazy(build, step, ir.DataType.FLOAT, [weight.k // block, weight.outputs], f"{name}.steps")
    else:
        steps = _equal_steps(graph, build, weight, block)
    by_block: dict[str, Any] = {"axis": 0, "block_size": block} if len(steps.shape or []) == 2 else {"axis": 1}
    return build.op("DequantizeLinear", [codes, steps], f"{name}.weight", **by_block), factor


def _equal_steps(graph: ir.Graph, build: Builder, weight: _Weight, block: int) -> ir.Value:
    """Return steps of 1 / 2^(bits-1), shared by all weights of this shape.

    INT4 wants them for blocks of input channels: that is the layout of TensorRT's 4-bit weight-only kernels. The
    8-bit kernels want them for output channels.
    """
    shape = [weight.outputs] if weight.bits == 8 else [weight.k // block, weight.outputs]
    name = f"equal_steps.{weight.bits}." + "x".join(map(str, shape))
    if name in graph.initializers:
        return graph.initializers[name]
    return build.initializer(np.full(shape, 1 / weight.zero, np.float32), name)


def _column(weight: _Weight) -> npt.NDArray[np.float32]:
    """Return the scale of each output channel, or with groups the power of two above its largest, float32 [N]."""
    scale: npt.NDArray[np.float32] = weight.scale.numpy().astype(np.float32)
    if not weight.grouped:
        return scale.reshape(-1)
    exponents = np.frexp(scale.max(axis=0))[1]
    return np.ldexp(np.ones_like(exponents, np.float32), exponents)


def _lazy(
    build: Builder, make: Callable[[], ir.TensorProtocol], dtype: ir.DataType, shape: list[int], name: str
) -> ir.Value:
    return build.initializer(ir.LazyTensor(make, dtype, ir.Shape(shape), name=name), name)


def _fixed(dim: object) -> int:
    assert isinstance(dim, int)
    return dim
