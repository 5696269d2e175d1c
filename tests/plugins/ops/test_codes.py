"""The ops that make and move codes, run by ONNX Runtime: packing, activations, the cache."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from planish.compiler.quantize import arithmetic
from planish.plugins import packing
from planish.plugins.ops import append_kv, quantize_activation, unpack
from planish.plugins.ops.pack import pack
from tests.onnx_run import run_op

Floats = npt.NDArray[np.float32]


@pytest.mark.parametrize("bits", packing.PACKED_BITS)
@pytest.mark.parametrize("shape", [(8,), (3, 24), (2, 3, 5, 64), (1, 2, 0, 16)], ids=str)
def test_pack_and_unpack_equal_numpy(bits: int, shape: tuple[int, ...]) -> None:
    codes = np.random.default_rng(7).integers(0, 1 << bits, shape, np.uint8)
    (packed,) = run_op(pack(bits), {"codes": codes})
    np.testing.assert_array_equal(packed, packing.pack(codes, bits))
    (unpacked,) = run_op(unpack(bits), {"packed": packed})
    np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("bits", packing.PACKED_BITS)
def test_unpack_every_byte(bits: int) -> None:
    """Every value of every byte of a group of eight codes, against numpy."""
    groups = np.repeat(np.arange(256, dtype=np.uint8)[:, None], bits, 1)
    groups = np.concatenate([np.roll(groups, 37 * i, 0)[:, i : i + 1] for i in range(bits)], 1)
    (codes,) = run_op(unpack(bits), {"packed": groups})
    np.testing.assert_array_equal(codes, packing.unpack(groups, bits, groups.shape[1] * 8 // bits))


# Activations


def activations(kind: str) -> Floats:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((2, 5, 37)).astype(np.float32)
    if kind == "outliers":
        x[:, 2, 4] = 500.0
        x[1, 3, 0] = -1e4
    elif kind == "zeros":
        x[0, 1] = 0.0
        x[1, 4] = -0.0
    elif kind == "tiny":
        x *= 1e-12
    elif kind == "huge":
        x *= 1e35
    elif kind == "ties":
        # Halves of a scale of 1: the largest is 2^(bits-1) - 1 only for 8 bits, the rest are ties there.
        x = rng.integers(-254, 255, x.shape).astype(np.float32) / 2
        x[..., 0] = 127.0
    elif kind == "one_channel":
        x = x[..., :1]
    return x


KINDS = ["random", "outliers", "zeros", "tiny", "huge", "ties", "one_channel"]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("clip", [1.0, 0.65])
@pytest.mark.parametrize("kind", KINDS)
def test_activation_codes_equal_the_oracle(bits: int, clip: float, kind: str) -> None:
    x = activations(kind)
    codes, scale = run_op(quantize_activation(), {"x": x}, bits=bits, clip=clip)
    expected_codes, expected_scale = arithmetic.quantize_activation(torch.from_numpy(x), bits, clip)
    np.testing.assert_array_equal(scale, expected_scale.numpy())
    np.testing.assert_array_equal(codes, expected_codes.numpy())
    assert codes.max() < 1 << bits


@pytest.mark.parametrize("bits", range(2, 9))
def test_activation_codes_by_hand(bits: int) -> None:
    highest = (1 << bits - 1) - 1
    x = np.array([[0.0, 2.0 * highest, -2.0 * highest, 2.0, -2.0, 1.0, min(3.0, 2.0 * highest)]], np.float32)
    codes, scale = run_op(quantize_activation(), {"x": x}, bits=bits, clip=1.0)
    assert scale.tolist() == [[2.0]]
    # 1 / 2 and 3 / 2 are ties and go to the even neighbour, 0 and 2; 2 does not exist with 2 bits.
    expected = [0, highest, -highest, 1, -1, 0, min(2, highest)]
    assert (codes.astype(int) - (1 << bits - 1)).tolist() == [expected]


def test_clipped_activations_reach_the_lowest_code() -> None:
    """Below the clip, the grid has one more code on the negative side."""
    x = np.array([[8.0, -8.0, 1.0]], np.float32)
    codes, scale = run_op(quantize_activation(), {"x": x}, bits=4, clip=0.5)
    assert scale.item() == np.float32(8.0) * (np.float32(0.5) / np.float32(7.0))
    assert codes.tolist() == [[15, 0, 10]]


# The cache


def keys(kind: str) -> Floats:
    x = np.random.default_rng(8).standard_normal((2, 3, 6, 16)).astype(np.float32)
    if kind == "offset":
        x += 40.0
    elif kind == "constant":
        x[:, :, 2] = 3.25
        x[:, 1, 3] = 0.0
    elif kind == "tiny":
        x *= 1e-9
    elif kind == "outliers":
        x[..., 5] *= 1000.0
    return x


@pytest.mark.parametrize("bits", packing.PACKED_BITS)
@pytest.mark.parametrize("clip", [1.0, 0.85, 0.55])
@pytest.mark.parametrize("kind", ["random", "offset", "constant", "tiny", "outliers"])
def test_cache_codes_equal_the_oracle(bits: int, clip: float, kind: str) -> None:
    x = keys(kind)
    rng = np.random.default_rng(9)
    past = rng.integers(0, 256, (2, 3, 4, packing.packed_size(16, bits)), np.uint8)
    past_scale = rng.standard_normal((2, 3, 4, 2)).astype(np.float16)
    present, present_scale = run_op(append_kv(bits), {"x": x, "past": past, "past_scale": past_scale}, clip=clip)
    np.testing.assert_array_equal(present[:, :, :4], past)
    np.testing.assert_array_equal(present_scale[:, :, :4], past_scale)
    codes, stored = arithmetic.quantize_kv(torch.from_numpy(x), bits, clip)
    np.testing.assert_array_equal(present_scale[:, :, 4:], stored.numpy())
    np.testing.assert_array_equal(packing.unpack(present[:, :, 4:], bits, 16), codes.numpy())


@pytest.mark.parametrize("bits", packing.PACKED_BITS)
@pytest.mark.parametrize("kind", ["random", "offset", "constant", "outliers"])
def test_cache_error_is_at_most_half_a_step(bits: int, kind: str) -> None:
    """What is stored stands for what was given, up to half a step and the rounding of scale and zero to float16."""
    x = torch.from_numpy(keys(kind))
    codes, stored = arithmetic.quantize_kv(x, bits)
    error = (arithmetic.dequantize_kv(codes, stored) - x).abs()
    step, zero = stored.float().split(1, -1)
    half_ulps = 2.0**-11 * (zero.abs() + (2**bits - 1) * step)
    assert (error <= 0.5001 * step + half_ulps).all()


def test_cache_by_hand() -> None:
    x = np.array([-1.0, 0.0, 2.0, 0.6, -0.4, 0.5, 1.5, 1.0], np.float32).reshape(1, 1, 1, 8)
    nothing = np.zeros((1, 1, 0, 2), np.uint8), np.zeros((1, 1, 0, 2), np.float16)
    present, scale = run_op(append_kv(2), {"x": x, "past": nothing[0], "past_scale": nothing[1]}, clip=1.0)
    assert scale.ravel().tolist() == [1.0, -1.0]
    # (x + 1) / 1, halves to even: 1.5 -> 2, 2.5 -> 2.
    assert packing.unpack(present, 2, 8).ravel().tolist() == [0, 1, 3, 2, 1, 2, 2, 2]


def test_clipped_cache_by_hand() -> None:
    """Half of -4 .. 8 about its middle is -1 .. 5: a step of 2, and both ends saturate."""
    x = np.array([-4.0, 8.0, -1.0, 0.0, 1.0, 2.0, 4.0, 5.0], np.float32).reshape(1, 1, 1, 8)
    nothing = np.zeros((1, 1, 0, 2), np.uint8), np.zeros((1, 1, 0, 2), np.float16)
    present, scale = run_op(append_kv(2), {"x": x, "past": nothing[0], "past_scale": nothing[1]}, clip=0.5)
    assert scale.ravel().tolist() == [2.0, -1.0]
    # (x + 1) / 2, halves to even: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2.
    assert packing.unpack(present, 2, 8).ravel().tolist() == [0, 3, 0, 0, 1, 2, 2, 3]


@pytest.mark.parametrize("bits", packing.PACKED_BITS)
def test_appending_one_by_one_equals_appending_at_once(bits: int) -> None:
    x = keys("random")
    empty = np.zeros((2, 3, 0, packing.packed_size(16, bits)), np.uint8), np.zeros((2, 3, 0, 2), np.float16)
    at_once = run_op(append_kv(bits), {"x": x, "past": empty[0], "past_scale": empty[1]}, clip=0.7)
    past, scale = empty
    for token in range(x.shape[2]):
        new = {"x": x[:, :, token : token + 1], "past": past, "past_scale": scale}
        past, scale = run_op(append_kv(bits), new, clip=0.7)
    np.testing.assert_array_equal(past, at_once[0])
    np.testing.assert_array_equal(scale, at_once[1])
