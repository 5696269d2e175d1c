"""Replace low-bit linears by plugin nodes: tokens are quantised by one, multiplied by another.

What stands in front becomes part of the first: residual addition, norm, online transform and gather. silu(gate) * up
becomes part of the second.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from planish.compiler.backends.tensorrt.plugin_sources import Source, gated_result, sources_of
from planish.compiler.backends.tensorrt.surgery import LeftOut, Surgery
from planish.plugins.kernel_layout import gated_rows, pack_for_kernel
from planish.plugins.ops import matmul, quantize_activation
from planish.plugins.packing import PACKED_BITS
from planish.plugins.tensorrt.plugins import LAYOUT, LINEAR, QUANTIZE_TOKENS

__all__ = ["plug_linears"]

Array = npt.NDArray[Any]

_PRODUCTS = {matmul(bits).name: bits for bits in PACKED_BITS}
#: The bits that the kernels of two segments want for the high-impact channels.
_HIGH_BITS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class _Product:
    """A PlanishMatMul and the PlanishQuantizeActivation in front of it."""

    node: Any
    quantize: Any

    @property
    def bits(self) -> int:
        return _PRODUCTS[self.node.op]

    @property
    def k(self) -> int:
        return int(self.node.attrs["k"])

    @property
    def grid(self) -> tuple[int, float]:
        return int(self.quantize.attrs["bits"]), float(self.quantize.attrs["clip"])


@dataclasses.dataclass(frozen=True, eq=False)
class _Linear:
    """A linear of one segment, or of two: the high-impact channels and the rest.

    Attributes:
        rest: the product of all channels, or of those that are no high-impact ones.
        high: the product of the others.
        x: what is quantised, before channels are gathered.
        order: permutation of its channels; None leaves them as they lie.
        y: the result.
    """

    rest: _Product
    high: _Product | None
    x: Any
    order: Array | None
    y: Any

    @property
    def products(self) -> list[_Product]:
        """In the order of the plugin's inputs."""
        return [self.rest, *([] if self.high is None else [self.high])]

    def weights(self) -> dict[str, float]:
        """Return the attributes that both plugins have."""
        high = 0 if self.high is None else self.high.k
        return {"layout": LAYOUT, "bits": self.rest.bits, "channels": self.rest.k, "high_channels": high}


def plug_linears(surgery: Surgery) -> list[LeftOut]:
    """Put plugin nodes in the place of every PlanishMatMul that has a kernel; return the others."""
    left, tokens = [], _Tokens(surgery)
    linears = _linears(surgery)
    for linear in linears:
        why = _plug(surgery, linear, tokens)
        if why:
            left += [LeftOut(product.node.name, why) for product in linear.products]
    return left


def _linears(surgery: Surgery) -> list[_Linear]:
    products = {}
    for node in surgery.graph.nodes:
        if node.op in _PRODUCTS:
            quantize = surgery.producer(node.inputs[0])
            assert quantize.op == quantize_activation().name
            products[id(node)] = _Product(node, quantize)
    linears = []
    for node in list(surgery.graph.nodes):
        if node.op == "Add":
            makers = [surgery.producer(value) for value in node.inputs]
            pair = [products.get(id(maker)) for maker in makers]
            linear = _pair(surgery, node, pair[0], pair[1])
            if linear is not None:
                linears.append(linear)
                for maker in makers:
                    del products[id(maker)]
    return [
        *linears,
        *(_Linear(each, None, each.quantize.inputs[0], None, each.node.outputs[0]) for each in products.values()),
    ]


def _pair(surgery: Surgery, add: Any, high: _Product | None, rest: _Product | None) -> _Linear | None:
    """Return the linear of two segments that an Add sums up, if kernels take both in one."""
    if high is None or rest is None or high.bits != _HIGH_BITS or high.k % 64:
        return None
    makers = [surgery.producer(each.quantize.inputs[0]) for each in (high, rest)]
    if any(maker is None for maker in makers) or makers[0].inputs[0] is not makers[1].inputs[0]:
        return None
    x = makers[0].inputs[0]
    if makers[0] is makers[1] and makers[0].op == "Split":
        return _Linear(rest, high, x, None, add.outputs[0])
    if {maker.op for maker in makers} != {"Gather"}:
        return None
    order = np.concatenate([surgery.array(maker.inputs[1]) for maker in makers]).astype(np.int32)
    return _Linear(rest, high, x, order, add.outputs[0])


class _Tokens:
    """The nodes that quantise tokens; linears that ask for the same codes share one."""

    def __init__(self, surgery: Surgery) -> None:
        self._surgery = surgery
        self._made: dict[tuple[Any, ...], list[Any]] = {}

    def codes(self, linear: _Linear) -> list[Any] | str:
        """Return codes, scales and sums as `linear` wants them, or why no kernel makes them."""
        key = (*(id(each.quantize) for each in linear.products), linear.rest.bits)
        if key in self._made:
            return self._made[key]
        bits, clip = linear.rest.grid
        high_bits, high_clip = linear.rest.grid if linear.high is None else linear.high.grid
        grids = {"activation_bits": bits, "clip": clip, "high_activation_bits": high_bits, "high_clip": high_clip}
        base = {**linear.weights(), **grids, "permuted": int(linear.order is not None)}
        width = int(base["channels"] + base["high_channels"])
        for source in sources_of(self._surgery, linear.x):
            attributes = {**base, **_shape_of(source.factors, width), **source.attributes}
            why = QUANTIZE_TOKENS.problem(attributes)
            if why is None:
                self._made[key] = self._add(linear, source, attributes)
                return self._made[key]
        assert why is not None
        return why

    def _add(self, linear: _Linear, source: Source, attributes: dict[str, float]) -> list[Any]:
        """Add the node, and return codes, scales and sums; what is added to tokens is an output of it as well."""
        name, factors = linear.rest.quantize.name, source.factors
        extra = [
            self._surgery.constant(f"{name}.{part}", factors[part]) for part in ("right", "left") if part in factors
        ]
        if linear.order is not None:
            extra.append(self._surgery.constant(f"{name}.order", linear.order))
        outputs = [
            self._surgery.variable(f"{name}.{each.name}", np.float32 if each.name == "scales" else np.int32, [])
            for each in QUANTIZE_TOKENS.outputs[:3]
        ]
        for output in outputs:
            output.shape = None
        total = [] if source.total is None else [source.total]
        self._surgery.plug(
            QUANTIZE_TOKENS, f"{name}.quantized", attributes, [*source.inputs, *extra], [*outputs, *total]
        )
        return outputs


def _shape_of(factors: Mapping[str, Array], channels: int) -> dict[str, int]:
    right, left = factors.get("right"), factors.get("left")
    k = right.shape[-1] if right is not None else channels // len(left) if left is not None else channels
    return {
        "m": channels // k,
        "k": k,
        "right_count": 0 if right is None else len(right),
        "has_left": int(left is not None),
    }


def _plug(surgery: Surgery, linear: _Linear, tokens: _Tokens) -> str | None:
    """Put the plugins in the place of a linear, or return why they cannot be."""
    rows = int(linear.rest.node.inputs[2].shape[0])
    code_bits = max(product.grid[0] for product in linear.products)
    attributes = {**linear.weights(), "rows": rows, "code_bits": code_bits, "type": 0, "gated": 0}
    hidden = gated_result(surgery, linear.y)
    if hidden is not None and LINEAR.problem({**attributes, "gated": 1}) is None:
        attributes["gated"] = 1
    order = gated_rows(rows) if attributes["gated"] else np.arange(rows)
    why = LINEAR.problem(attributes)
    if why:
        return why
    for product in linear.products:
        groups = int(product.node.inputs[3].shape[0])
        if groups != 1:
            return f"{LINEAR.name}: {groups} weight scales to an output channel have no kernel; one has"
    codes = tokens.codes(linear)
    if isinstance(codes, str):
        return codes
    inputs = list(codes)
    for product in linear.products:
        weight, scale = product.node.inputs[2:4]
        packed = pack_for_kernel(surgery.array(weight)[order], product.k, product.bits)
        inputs += [
            surgery.constant(f"{weight.name}.words", packed.words),
            surgery.constant(f"{scale.name}.rows", surgery.array(scale)[0, order].astype(np.float32)),
            surgery.constant(f"{weight.name}.sums", packed.row_sums),
        ]
    surgery.plug(LINEAR, linear.rest.node.name, attributes, inputs, [hidden if attributes["gated"] else linear.y])
    return None
