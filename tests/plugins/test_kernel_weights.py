"""Linears of a portable model come out in kernel layout, one at a time; what has no kernel is named."""

from pathlib import Path

import numpy as np
import onnx_ir as ir

from planish.plugins.kernel_layout import unpack_from_kernel
from planish.plugins.kernel_weights import kernel_linears
from planish.plugins.ops import matmul
from planish.plugins.packing import pack
from tests.onnx_run import op_model

K, ROWS = 96, 40


def save(path: Path, bits: int, codes: np.ndarray, scale: np.ndarray) -> None:
    """Write a model of one PlanishMatMul whose weight is an initializer in an external file."""
    group = -(-K // len(scale))
    inputs = {"codes": codes[None, :1], "scale": np.ones((1, 1, 1), np.float32)}
    weights = {"weight": pack(codes, bits), "weight_scale": scale}
    model = op_model(matmul(bits), {**inputs, **weights}, k=K, group=group, activation_bits=3)
    for value in list(model.graph.inputs)[2:]:
        value.const_value = ir.Tensor(weights[str(value.name)], name=value.name)
        value.shape = value.const_value.shape
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    ir.save(model, path, external_data=f"{path.name}.data")


def test_codes_and_scales_are_those_of_the_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(0, 8, (ROWS, K), np.uint8), rng.random((1, ROWS), np.float32)
    save(tmp_path / "model.onnx", 3, codes, scale)
    (linear,) = kernel_linears(tmp_path / "model.onnx")
    assert linear.name == "weight"
    assert linear.activation_bits == 3
    assert linear.weight is not None
    np.testing.assert_array_equal(unpack_from_kernel(linear.weight), codes)
    np.testing.assert_array_equal(linear.scale, scale[0])


def test_weights_without_a_kernel_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, (ROWS, K), np.uint8)
    save(tmp_path / "wide.onnx", 8, codes, rng.random((1, ROWS), np.float32))
    save(tmp_path / "grouped.onnx", 3, codes, rng.random((2, ROWS)).astype(np.float16))
    for name in ("wide", "grouped"):
        (linear,) = kernel_linears(tmp_path / f"{name}.onnx")
        assert (linear.name, linear.weight, linear.scale) == ("weight", None, None)
