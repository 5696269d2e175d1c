"""Linears of float16 activations as the kernel computes them, emulated: close to float64 and to the op's body."""

import numpy as np
import pytest

from planish.plugins.ops import weight_only_matmul
from planish.plugins.packing import pack
from tests.kernel_emulation import Array, Segment, emulate_weight_only
from tests.onnx_run import run_op


def random_segment(rng: np.random.Generator, rows: int, k: int, bits: int) -> Segment:
    nothing = np.empty(0)
    codes = rng.integers(0, 1 << bits, (rows, k), np.uint8)
    return Segment(codes, rng.uniform(0.01, 1, rows).astype(np.float32), bits, nothing, nothing, 0)


def random_tokens(rng: np.random.Generator, tokens: int, k: int) -> Array:
    return rng.standard_normal((tokens, k)).astype(np.float16)


def expected(x: Array, segment: Segment) -> Array:
    """Return the outputs in float64."""
    weights = segment.weights.astype(np.float64) - (1 << segment.bits - 1)
    return np.asarray(x.astype(np.float64) @ weights.T * segment.weight_scale)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("k", [8, 64, 72, 256, 264, 576])
def test_edges(bits: int, k: int) -> None:
    rng = np.random.default_rng(k * 8 + bits)
    for tokens in (1, 3, 8, 9, 16, 17, 33):
        rows = int(rng.choice([1, 15, 16, 17, 33, 48]))
        x, segment = random_tokens(rng, tokens, k), random_segment(rng, rows, k, bits)
        y = emulate_weight_only(x, segment, warps=int(rng.integers(1, 9)))
        np.testing.assert_allclose(y, expected(x, segment), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_whole_numbers_are_exact(bits: int) -> None:
    """3,000 random products of each width whose every sum float32 holds: equal to int64, so every code is in place."""
    rng = np.random.default_rng(bits)
    for _ in range(3000):
        tokens, rows, k = int(rng.integers(1, 20)), int(rng.integers(1, 34)), 8 * int(rng.integers(1, 40))
        x, segment = rng.integers(-64, 65, (tokens, k)).astype(np.float16), random_segment(rng, rows, k, bits)
        segment.weight_scale[:] = 1
        np.testing.assert_array_equal(emulate_weight_only(x, segment, warps=3), expected(x, segment))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_function_body_gives_the_same(bits: int) -> None:
    rng = np.random.default_rng(bits)
    x, segment = random_tokens(rng, 5, 1536), random_segment(rng, 48, 1536, bits)
    feeds = {
        "x": x[None].astype(np.float32),
        "weight": pack(segment.weights, bits),
        "weight_scale": segment.weight_scale[None],
    }
    (y,) = run_op(weight_only_matmul(bits), feeds, k=1536, group=1536)
    np.testing.assert_allclose(emulate_weight_only(x, segment, warps=6), y[0], rtol=1e-3, atol=1e-3)


def test_gate_and_up() -> None:
    rng = np.random.default_rng(0)
    for tokens in (1, 12, 40):
        x, segment = random_tokens(rng, tokens, 128), random_segment(rng, 48, 128, 3)
        segment.weight_scale[:] /= 10
        gate, up = np.moveaxis(expected(x, segment).reshape(tokens, -1, 2, 8), 2, 0)
        wanted = (gate / (1 + np.exp(-gate)) * up).reshape(tokens, -1)
        np.testing.assert_allclose(emulate_weight_only(x, segment, gated=True), wanted, rtol=1e-4, atol=1e-4)
