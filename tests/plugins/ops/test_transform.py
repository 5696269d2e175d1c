"""The online transforms, run by ONNX Runtime and by onnx's evaluator, against numpy in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

from planish.plugins.ops import DOMAIN, OPSET, transform
from planish.plugins.ops.transform import Right
from tests.onnx_run import op_model, run_op, session

Array = npt.NDArray[Any]

M, K = 6, 10
FORMS: list[tuple[Right, bool]] = [("Right", False), ("Rows", False), ("", True), ("Right", True), ("Rows", True)]
forms = pytest.mark.parametrize(("right", "left"), FORMS)


def inputs_of(
    right: Right, left: bool, tokens: int = 3, dtype: type[np.floating[Any]] = np.float32
) -> dict[str, Array]:
    rng = np.random.default_rng(3)
    inputs = {"x": rng.standard_normal((2, tokens, M * K))}
    if right:
        inputs["right"] = rng.standard_normal((K, K) if right == "Right" else (M, K, K))
    if left:
        inputs["left"] = rng.standard_normal((M, M))
    return {name: array.astype(dtype) for name, array in inputs.items()}


def dense(inputs: dict[str, Array]) -> Array:
    """Return P as one float64 matrix, by Kronecker products and blocks."""
    P = np.eye(M * K)
    if "right" in inputs:
        right = np.broadcast_to(inputs["right"].astype(np.float64), (M, K, K))
        for i in range(M):
            P[i * K : i * K + K, i * K : i * K + K] = right[i]
    if "left" in inputs:
        P = P @ np.kron(inputs["left"].astype(np.float64), np.eye(K))
    return P


@forms
@pytest.mark.parametrize("tokens", [1, 5])
def test_equals_the_dense_matrix(right: Right, left: bool, tokens: int) -> None:
    inputs = inputs_of(right, left, tokens)
    (y,) = run_op(transform(right, left), inputs)
    expected = inputs["x"].astype(np.float64) @ dense(inputs)
    assert y.shape == inputs["x"].shape
    assert np.abs(y - expected).max() < 2e-6 * np.abs(expected).max()


@forms
def test_float64_equals_the_dense_matrix(right: Right, left: bool) -> None:
    inputs = inputs_of(right, left, dtype=np.float64)
    model = ReferenceEvaluator(ir.to_proto(op_model(transform(right, left), inputs)))
    (y,) = model.run(None, inputs)
    np.testing.assert_allclose(y, inputs["x"] @ dense(inputs), rtol=1e-12, atol=1e-12)


@forms
def test_is_still_there_after_optimisation(right: Right, left: bool, tmp_path: Path) -> None:
    """The factors are initializers, so ONNX Runtime could fold what depends on them alone, but not the product."""
    inputs = inputs_of(right, left)
    op, x = transform(right, left), ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    x.shape = ir.Shape(["batch", "sequence", M * K])
    factors = [ir.Value(name=name, const_value=ir.tensor(inputs[name], name=name)) for name in list(inputs)[1:]]
    node = ir.node(op.name, [x, *factors], domain=DOMAIN)
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", x.type, x.shape
    graph = ir.Graph([x], [y], nodes=[node], initializers=factors, opset_imports={"": OPSET, DOMAIN: 1}, name="g")
    model = ir.Model(graph, ir_version=11, functions=op.functions())
    common.InlinePass()(model)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    ops = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert sum("MatMul" in op_type or op_type == "Gemm" for op_type in ops) == bool(right) + left
    loaded = session(ir.to_proto(model))
    first, second = (loaded.run(None, {"x": factor * inputs["x"]})[0] for factor in (np.float32(1), np.float32(-2)))
    assert np.abs(first).max() > 0.1
    np.testing.assert_allclose(second, -2 * first, rtol=1e-6)


def test_names_are_unique_and_nothing_is_no_op() -> None:
    names = {transform(right, left).name for right, left in FORMS}
    assert names == {f"PlanishTransform{form}" for form in ("Right", "Rows", "Left", "RightLeft", "RowsLeft")}
    with pytest.raises(ValueError, match="without factors"):
        transform("", False)
