"""The ONNX Runtime form of a linear gives the codes and products of the planish functions."""

import numpy as np
import onnx_ir as ir
import pytest

from planish.passes.builder import Builder
from planish.passes.declare import declare
from planish.passes.lower_linears_to_ort import LowerLinearsToOrtPass
from planish.plugins.ops import DOMAIN, OPSET, matmul, quantize_activation, weight_only_matmul
from planish.plugins.packing import pack
from tests.onnx_run import session

N = 24


def linear(bits: int, activation_bits: int, k: int, group: int, clip: float) -> ir.Model:
    """Return a model of one quantised linear, outputs y and, where activations are quantised, their codes."""
    rng, build = np.random.default_rng(bits), Builder()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "sequence", k]))
    weight = build.initializer(pack(rng.integers(0, 1 << bits, (N, k)).astype(np.uint8), bits), "w.codes")
    groups = -(-k // group)
    scale = rng.uniform(0.01, 0.1, (groups, N)).astype(np.float32 if groups == 1 else np.float16)
    weight_scale = build.initializer(scale, "w.scale")
    if activation_bits == 16:
        ops = [weight_only_matmul(bits)]
        outputs = [build.op(ops[0].name, [x, weight, weight_scale], "y", domain=DOMAIN, k=k, group=group)]
    else:
        ops = [quantize_activation(), matmul(bits)]
        codes = build.ops(ops[0].name, [x], "codes", 2, domain=DOMAIN, bits=activation_bits, clip=clip)
        settings = {"k": k, "group": group, "activation_bits": activation_bits}
        outputs = [build.op(ops[1].name, [*codes, weight, weight_scale], "y", domain=DOMAIN, **settings), codes[0]]
    for value, dtype in zip(outputs, (ir.DataType.FLOAT, ir.DataType.UINT8), strict=False):
        value.type = ir.TensorType(dtype)
    graph = ir.Graph(
        [x], outputs, nodes=build.nodes, initializers=build.initializers, opset_imports={"": OPSET}, name="linear"
    )
    model = ir.Model(graph, ir_version=11)
    for op in ops:
        declare(model, op)
    return model


def run(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    return session(ir.to_proto(model)).run(None, {"x": x})


@pytest.mark.parametrize("clip", [1.0, 0.55])
@pytest.mark.parametrize(("k", "group"), [(64, 64), (40, 40), (72, 32), (96, 32)])
@pytest.mark.parametrize(("bits", "activation_bits"), [(2, 2), (3, 3), (4, 5), (4, 8), (8, 8)])
def test_products(bits: int, activation_bits: int, k: int, group: int, clip: float) -> None:
    model = linear(bits, activation_bits, k, group, clip)
    x = np.random.default_rng(1).standard_normal((2, 7, k)).astype(np.float32)
    x[0, 0] = 0
    x[1, 3, 5] = 1000
    y, codes = run(model, x)
    assert LowerLinearsToOrtPass()(model).modified
    assert {node.domain for node in model.graph} == {"", "com.microsoft"}
    lowered_y, lowered_codes = run(model, x)
    np.testing.assert_array_equal(lowered_codes, codes)
    np.testing.assert_allclose(lowered_y, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())
    assert not LowerLinearsToOrtPass()(model).modified


@pytest.mark.parametrize(("k", "group"), [(64, 64), (40, 40), (72, 32), (160, 64)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_only(bits: int, k: int, group: int) -> None:
    model = linear(bits, 16, k, group, 1.0)
    x = np.random.default_rng(1).standard_normal((2, 7, k)).astype(np.float32)
    (y,) = run(model, x)
    assert LowerLinearsToOrtPass()(model).modified
    assert [node.op_type for node in model.graph] == ["MatMulNBits"]
    np.testing.assert_allclose(run(model, x)[0], y, rtol=1e-4, atol=1e-5 * np.abs(y).max())
