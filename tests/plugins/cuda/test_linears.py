"""Low-bit linears as the kernels compute them, emulated: equal to int64 arithmetic and to the ONNX function bodies."""

import subprocess
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from planish.plugins.kernel_library import Order
from planish.plugins.native import SOURCES, find_compiler
from planish.plugins.ops import matmul
from planish.plugins.packing import pack
from tests.kernel_emulation import DOT, FOLDER, LARGE, MMA, Array, Segment, emulate
from tests.onnx_run import op_model, session


def random_segment(
    rng: np.random.Generator, tokens: int, rows: int, k: int, bits: int, token_bits: int, extreme: bool = False
) -> Segment:
    def codes(shape: tuple[int, int], width: int) -> Array:
        drawn = rng.integers(0, 1 << width, shape, np.uint8)
        return np.where(drawn < 1 << width - 1, 0, (1 << width) - 1).astype(np.uint8) if extreme else drawn

    return Segment(
        codes((rows, k), bits),
        rng.uniform(0.01, 1, rows).astype(np.float32),
        bits,
        codes((tokens, k), token_bits),
        rng.uniform(0.01, 1, tokens).astype(np.float32),
        1 << token_bits - 1,
    )


def ways(tokens: int) -> list[int]:
    return [DOT, MMA] if tokens <= 2 else [MMA]


def expected(*segments: Segment) -> Array:
    """Return the outputs in the float32 arithmetic of PlanishMatMul, from exact sums."""
    y = np.float32(0)
    for each in segments:
        product = each.product()
        assert np.abs(product).max() < 1 << 31
        y = y + product.astype(np.float32) * each.weight_scale * each.token_scale[:, None]
    return np.asarray(y)


def test_maps_of_tiles(tmp_path: Path) -> None:
    """12,000 random tiles through words, unpacking and both MMAs; banks of shared memory; see tiles_test.cpp."""
    program = tmp_path / "tiles"
    command = [find_compiler(), "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}"]
    subprocess.run([*command, str(FOLDER / "tiles_test.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("k", [1, 63, 64, 65, 255, 256, 257, 576, 1536])
def test_edges(bits: int, k: int) -> None:
    """Every number of tokens that the kernel takes, rows that fill no tile, warps that get no group."""
    rng = np.random.default_rng(k * 8 + bits)
    for tokens in range(1, 17):
        rows = int(rng.choice([1, 15, 16, 17, 31, 32, 33, 48]))
        segment = random_segment(rng, tokens, rows, k, bits, 3, extreme=tokens % 2 == 0)
        for way in ways(tokens):
            y = emulate(segment, way=way, warps=int(rng.integers(1, 17)))
            np.testing.assert_array_equal(y, expected(segment))


@pytest.mark.parametrize("k", [4096, 11008, 14336])
def test_widths_of_large_models(k: int) -> None:
    segment = random_segment(np.random.default_rng(k), 2, 48, k, 3, 3, extreme=True)
    for way in (DOT, MMA):
        np.testing.assert_array_equal(emulate(segment, way=way, warps=16), expected(segment))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_largest_sums_stay_in_int32(bits: int) -> None:
    """Codes of 8 bits at their extremes over the widest input of any of these models."""
    rng = np.random.default_rng(bits)
    for weight, token in ((0, 0), (0, 255), ((1 << bits) - 1, 0), ((1 << bits) - 1, 255)):
        segment = random_segment(rng, 2, 16, 28672, bits, 8)
        segment.weights[:], segment.tokens[:] = weight, token
        for way in (DOT, MMA):
            np.testing.assert_array_equal(emulate(segment, way=way, warps=3), expected(segment))


@pytest.mark.parametrize("high_channels", [64, 128, 512])
@pytest.mark.parametrize("bits", [2, 3])
def test_two_segments(bits: int, high_channels: int) -> None:
    """High-impact channels at 4 bits in front, with scales of their own."""
    rng = np.random.default_rng(high_channels + bits)
    for tokens in (1, 2, 3, 8, 9, 16):
        low = random_segment(rng, tokens, 33, 700, bits, 3)
        high = random_segment(rng, tokens, 33, high_channels, 4, 4)
        for way in ways(tokens):
            np.testing.assert_array_equal(emulate(low, high, way=way, warps=4), expected(high, low))


def test_tokens_and_weights_of_zeros() -> None:
    segment = random_segment(np.random.default_rng(0), 8, 32, 576, 3, 3)
    segment.tokens[::2], segment.weights[::3] = 4, 4
    y = emulate(segment, way=MMA, warps=3)
    np.testing.assert_array_equal(y, expected(segment))
    assert not y[::2].any()
    assert not y[:, ::3].any()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_function_body_gives_the_same(bits: int) -> None:
    """3,400 random products of each width, 34 shapes, as ONNX Runtime computes the meaning of PlanishMatMul."""
    rng = np.random.default_rng(bits)
    for k in (576, 1536, *rng.integers(1, 600, 32).tolist()):
        rows = int(rng.integers(1, 49))
        runs = None
        for _ in range(100):
            tokens = int(rng.integers(1, 17))
            segment = random_segment(rng, tokens, rows, k, bits, 3)
            feeds = {
                "codes": segment.tokens[None],
                "scale": segment.token_scale[None, :, None],
                "weight": pack(segment.weights, bits),
                "weight_scale": segment.weight_scale[None],
            }
            if runs is None:
                model = op_model(matmul(bits), feeds, k=k, group=k, activation_bits=3)
                runs = session(ir.to_proto(model))
            (y,) = runs.run(None, feeds)
            for way in ways(tokens):
                found = emulate(segment, way=way, warps=int(rng.integers(1, 9)))
                np.testing.assert_array_equal(found, y[0])


#: What the orders of codes are multiplied by: 8-bit MMAs, wgmma, 4-bit MMAs.
@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("tokens", "rows", "k"), [(1, 1, 1), (17, 33, 65), (63, 16, 257), (65, 300, 576), (130, 257, 100)]
)
def test_many_tokens(tokens: int, rows: int, k: int, bits: int, order: Order) -> None:
    segment = random_segment(np.random.default_rng(tokens), tokens, rows, k, bits, 4, extreme=k == 65)
    np.testing.assert_array_equal(emulate(segment, way=LARGE, order=order), expected(segment))


@pytest.mark.parametrize("order", Order)
def test_a_long_prompt(order: Order) -> None:
    segment = random_segment(np.random.default_rng(0), 4096, 40, 576, 3, 3)
    np.testing.assert_array_equal(emulate(segment, way=LARGE, order=order), expected(segment))


@pytest.mark.parametrize("order", [Order.LANES, Order.COLUMNS])
def test_many_tokens_of_8_bits(order: Order) -> None:
    segment = random_segment(np.random.default_rng(0), 40, 48, 1000, 4, 8, extreme=True)
    np.testing.assert_array_equal(emulate(segment, way=LARGE, order=order), expected(segment))


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_many_tokens_in_two_segments(bits: int, order: Order) -> None:
    rng = np.random.default_rng(bits)
    for high_channels in (64, 320):
        low, high = random_segment(rng, 70, 48, 300, bits, 3), random_segment(rng, 70, 48, high_channels, 4, 4)
        np.testing.assert_array_equal(emulate(low, high, way=LARGE, order=order), expected(high, low))


@pytest.mark.parametrize("order", [Order.COLUMNS, Order.NIBBLES])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_random_products_of_many_tokens(bits: int, order: Order) -> None:
    """1,000 random products of each width and order, of random shapes."""
    rng = np.random.default_rng(bits)
    for _ in range(1000):
        tokens, rows, k = rng.integers(1, [30, 34, 400])
        segment = random_segment(rng, tokens, rows, k, bits, 4)
        np.testing.assert_array_equal(emulate(segment, way=LARGE, order=order), expected(segment))


@pytest.mark.parametrize("two_segments", [False, True])
@pytest.mark.parametrize("rows", [16, 48, 320])
def test_gate_and_up(rows: int, two_segments: bool) -> None:
    """silu(gate) * up, of eight rows of gate before eight of up, by every kernel."""
    rng = np.random.default_rng(rows)
    for tokens in (1, 2, 7, 16, 67):
        low = random_segment(rng, tokens, rows, 300, 3, 3)
        high = random_segment(rng, tokens, rows, 64, 4, 4) if two_segments else None
        both = [high, low] if high else [low]
        gate, up = np.moveaxis(expected(*both).astype(np.float64).reshape(tokens, -1, 2, 8), 2, 0)
        wanted = (gate / (1 + np.exp(-gate)) * up).reshape(tokens, -1)
        runs = [{"way": LARGE, "order": order} for order in Order]
        if tokens <= 16:
            runs += [{"way": way, "warps": 2} for way in ways(tokens)]
        for run in runs:
            np.testing.assert_allclose(emulate(low, high, gated=True, **run), wanted, rtol=1e-5, atol=1e-30)
