"""The TensorRT form of a low-bit linear computes what the planish ops compute, in float32 and then in float16."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from planish.passes.float16 import Float16Pass
from planish.passes.lower_linears_to_tensorrt import LowerLinearsToTensorrtPass
from planish.plugins.ops import DOMAIN, OPSET, matmul, quantize_activation, weight_only_matmul
from planish.plugins.packing import pack
from tests.fixed_cache import plain_session
from tests.onnx_run import session

Array = npt.NDArray[Any]
TOKENS, OUTPUTS = 7, 24


class Linear(NamedTuple):
    bits: int
    activation_bits: int
    k: int
    group: int | None
    scales: tuple[float, float] = (0.01, 0.02)

    def weight(self) -> tuple[Array, Array]:
        """Return signed codes [N, K] and scales [groups, N]."""
        rng = np.random.default_rng(self.k)
        zero = 1 << self.bits - 1
        codes = rng.integers(-zero, zero, (OUTPUTS, self.k))
        groups = -(-self.k // self.group) if self.group else 1
        scale = np.exp(rng.uniform(*np.log(self.scales), (groups, OUTPUTS)))
        return codes, scale.astype(np.float16 if self.group else np.float32)

    def model(self) -> ir.Model:
        codes, scale = self.weight()
        group = self.group or self.k
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "sequence", self.k]))
        packed = pack((codes + (1 << self.bits - 1)).astype(np.uint8), self.bits)
        stored = [
            ir.Value(name=name, const_value=ir.tensor(array, name=name), type=ir.TensorType(dtype))
            for name, array, dtype in (
                ("w.codes", packed, ir.DataType.UINT8),
                ("w.scale", scale, ir.DataType.FLOAT16 if self.group else ir.DataType.FLOAT),
            )
        ]
        sizes = {"k": self.k, "group": group}
        if self.activation_bits == 16:
            op = weight_only_matmul(self.bits)
            nodes = [ir.node(op.name, [x, *stored], sizes, domain=DOMAIN, name="w.product")]
        else:
            op, quantize = matmul(self.bits), quantize_activation()
            attributes = {"bits": self.activation_bits, "clip": 0.9}
            first = ir.node(quantize.name, [x], attributes, domain=DOMAIN, num_outputs=2, name="w.input")
            sizes["activation_bits"] = self.activation_bits
            nodes = [first, ir.node(op.name, [*first.outputs, *stored], sizes, domain=DOMAIN, name="w.product")]
        y = nodes[-1].outputs[0]
        y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "sequence", OUTPUTS])
        functions = [*op.functions(), quantize_activation().function()]
        graph = ir.Graph(
            [x], [y], nodes=nodes, initializers=stored, opset_imports={"": OPSET, DOMAIN: 1}, name="linear"
        )
        return ir.Model(graph, ir_version=11, functions=functions)


LINEARS = [
    Linear(4, 8, 72, None),
    Linear(3, 3, 160, None),
    Linear(2, 4, 64, None),
    Linear(8, 8, 160, None),
    Linear(4, 4, 576, 128),  # a last group of 64
    Linear(3, 8, 160, 64),  # a last group of 32
    Linear(8, 8, 72, 16),  # a last group of 8
    Linear(2, 16, 160, 64),
    Linear(4, 16, 72, None),
    Linear(8, 16, 96, None),
]


def activations(k: int) -> Array:
    """Return tokens of very different size, one of zeros, and one outlier a thousand times the rest."""
    x = np.random.default_rng(1).standard_normal((1, TOKENS, k)).astype(np.float32)
    x *= np.array([1, 1e-6, 1e3, 0, 1, 1, 3e4], np.float32)[:, None]
    x[0, 4, 5] = 3000
    return x


def exact(linear: Linear, x: Array) -> Array:
    """Return the product in float64, from the definition."""
    codes, scale = linear.weight()
    weight = codes * np.repeat(scale.astype(np.float64), linear.group or linear.k, axis=0)[: linear.k].T
    if linear.activation_bits == 16:
        return x.astype(np.float64) @ weight.T
    zero = 1 << linear.activation_bits - 1
    factor = np.float32(0.9) / np.float32(zero - 1)
    step = np.maximum(np.abs(x).max(-1, keepdims=True) * factor, np.float32(1e-10))
    return (np.clip(np.round(x / step), -zero, zero - 1) * step.astype(np.float64)) @ weight.T


def relative_to_token(found: Array, expected: Array) -> float:
    """Return the largest error of a token as a share of its largest output."""
    size = np.abs(expected).max(-1, keepdims=True)
    return float((np.abs(found - expected) / np.where(size > 0, size, 1)).max())


def run_in_float16(linear: Linear, x: Array) -> Array:
    """Return the product by numpy, which rounds every float16 result; ONNX Runtime skips some."""
    model = Float16Pass()(LowerLinearsToTensorrtPass()(linear.model()).model).model
    model.functions.clear()
    found: Array = ReferenceEvaluator(ir.to_proto(model)).run(["y"], {"x": x})[0]
    return found


@pytest.mark.parametrize("linear", LINEARS, ids=str)
def test_lowered_linear_equals_the_planish_op(linear: Linear) -> None:
    x = activations(linear.k)
    (reference,) = session(ir.to_proto(linear.model())).run(None, {"x": x})
    lowered = LowerLinearsToTensorrtPass()(linear.model()).model
    assert {node.domain for node in lowered.graph} == {""}
    (found,) = plain_session(ir.to_proto(lowered)).run(None, {"x": x})
    assert relative_to_token(found, reference) < 1e-6
    assert relative_to_token(found, exact(linear, x)) < 1e-6


@pytest.mark.parametrize("linear", LINEARS, ids=str)
def test_float16_rounds_once(linear: Linear) -> None:
    x = activations(linear.k)
    found = run_in_float16(linear, x)
    # Codes are exact in float16; float activations are rounded first, and add up in the square.
    bound = 2**-10 if linear.activation_bits == 16 else 2**-11 + 1e-6
    assert relative_to_token(found, exact(linear, x)) < bound


# With groups every weight, code times ratio, is rounded as well, and a channel's largest output may be a difference.
@pytest.mark.parametrize(("group", "bound"), [(None, 2**-10), (64, 2**-8)])
def test_weight_scales_beyond_float16_do_not_matter(group: int | None, bound: float) -> None:
    # Scales of groups are stored in float16, these all subnormal; those of channels in float32.
    scales = (1e-6, 5e-5) if group else (1e-12, 1e8)
    linear = Linear(4, 8, 160, group, scales)
    x = activations(160)
    found = run_in_float16(linear, x)
    expected = exact(linear, x)
    size = np.abs(expected).max((0, 1))
    assert (np.abs(found - expected).max((0, 1)) <= bound * size).all()


@pytest.mark.parametrize(("bits", "dtype"), [(2, ir.DataType.INT4), (3, ir.DataType.INT4), (8, ir.DataType.INT8)])
def test_codes_lie_in_the_narrowest_type_that_tensorrt_reads(bits: int, dtype: ir.DataType) -> None:
    linear = Linear(bits, 8, 160, None)
    model = LowerLinearsToTensorrtPass()(linear.model()).model
    stored = model.graph.initializers["w.signed_codes"].const_value
    assert stored is not None
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored.numpy().astype(np.int64), linear.weight()[0].T)
    assert "w.codes" not in model.graph.initializers


def test_equal_steps_are_stored_once_for_a_shape() -> None:
    linear = Linear(4, 8, 64, None)
    model = linear.model()
    LowerLinearsToTensorrtPass()(model)
    assert [name for name in model.graph.initializers if name.startswith("equal_steps")] == ["equal_steps.4.1x24"]


def test_a_float_graph_is_left_alone() -> None:
    linear = Linear(4, 8, 64, None)
    lowered = LowerLinearsToTensorrtPass()(linear.model()).model
    assert not LowerLinearsToTensorrtPass()(lowered).modified
