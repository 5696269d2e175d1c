"""What is spelled out is what ONNX Runtime's own kernels of the ops compute."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.parser
import onnx_ir as ir
import pytest

from planish.passes.spell_out_for_tensorrt import SPELLABLE, SpellOutForTensorrtPass
from tests.fixed_cache import plain_session

Array = npt.NDArray[Any]
RNG = np.random.default_rng(0)


def floats(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def both(text: str, inputs: dict[str, Array]) -> tuple[Array, Array, list[str]]:
    """Return what a graph gives as it is and spelled out, and the ops of the latter."""
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 24]>\n{text}'))
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    (expected,) = plain_session(ir.to_proto(model)).run(None, inputs)
    assert SpellOutForTensorrtPass(SPELLABLE)(model).modified
    (found,) = plain_session(ir.to_proto(model)).run(None, inputs)
    assert not SpellOutForTensorrtPass(SPELLABLE)(model).modified
    return expected, found, [node.op_type for node in model.graph]


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_rms_norm(size: float) -> None:
    text = """g (float[B, S, 72] x, float[72] gain) => (float[B, S, 72] y) {
        y = RMSNormalization<axis = -1, epsilon = 1e-5>(x, gain)
    }"""
    x = floats(3, 5, 72) * np.float32(size)
    x[0, 0], x[1, 1, 3] = 0, 1000 * size
    expected, found, ops = both(text, {"x": x, "gain": floats(72)})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert set(ops) <= {"Mul", "ReduceMean", "Add", "Sqrt", "Div"}


@pytest.mark.parametrize(("heads", "half"), [(3, 32), (1, 6)])
def test_rotation(heads: int, half: int) -> None:
    width = 2 * half * heads
    text = f"""g (float[B, S, {width}] x, float[B, S, 1] at, float[1, 1, {half}] speed) => (float[B, S, {width}] y) {{
        angle = Mul(at, speed)
        cos = Cos(angle)
        sin = Sin(angle)
        a = RotaryEmbedding<num_heads = {heads}>(x, cos, sin)
        y = RotaryEmbedding<num_heads = {heads}>(a, cos, sin)
    }}"""
    inputs = {"x": floats(2, 5, width), "at": np.arange(10, dtype=np.float32).reshape(2, 5, 1),
              "speed": floats(1, 1, half)}  # fmt: skip
    expected, found, ops = both(text, inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    # Both rotations take the same angles.
    assert ops.count("Unsqueeze") == 2


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 1), (4, 4)])
def test_attention(heads: int, kv_heads: int) -> None:
    text = f"""g (float[B, {heads}, S, 24] q, float[B, {kv_heads}, 16, 24] k, float[B, {kv_heads}, 16, 24] v,
                  bool[B, 1, S, 16] mask) => (float[B, {heads}, S, 24] y) {{
        y = Attention(q, k, v, mask)
    }}"""
    mask = RNG.random((2, 1, 5, 16)) < 0.4
    mask[..., 3] = True
    k, v = floats(2, kv_heads, 16, 24), floats(2, kv_heads, 16, 24)
    # A slot that nobody sees holds what it likes.
    mask[..., 9], k[:, :, 9], v[:, :, 9] = False, 3e4, 3e4
    expected, found, _ = both(text, {"q": 5 * floats(2, heads, 5, 24), "k": k, "v": v, "mask": mask})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_write_to_the_cache() -> None:
    text = """g (float[B, 2, 16, 4] a, float[B, 2, 16, 4] b, float[B, 2, S, 4] new, int64[B] at)
              => (float[B, 2, 32, 4] y) {
        c = TensorScatter<axis = 2>(a, new, at)
        d = TensorScatter<axis = 2>(b, new, at)
        y = Concat<axis = 2>(c, d)
    }"""
    inputs = {"a": floats(3, 2, 16, 4), "b": floats(3, 2, 16, 4), "new": floats(3, 2, 5, 4), "at": np.array([0, 7, 11])}
    expected, found, ops = both(text, inputs)
    np.testing.assert_array_equal(found, expected)
    assert (ops.count("ScatterND"), ops.count("Range")) == (2, 2)


def test_only_what_is_asked_for() -> None:
    text = """<ir_version: 10, opset_import: ["": 24]>
    g (float[B, S, 8] x, float[8] gain, float[B, S, 4] cos, float[B, S, 4] sin) => (float[B, S, 8] y) {
        a = RMSNormalization(x, gain)
        y = RotaryEmbedding<num_heads = 1>(a, cos, sin)
    }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    SpellOutForTensorrtPass({"RMSNormalization"})(model)
    ops = {node.op_type for node in model.graph}
    assert "RotaryEmbedding" in ops
    assert "RMSNormalization" not in ops
