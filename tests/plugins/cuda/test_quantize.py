"""The quantising kernel, emulated: exact where nothing but rounding happens, and close to float64 behind transforms."""

import numpy as np
import pytest

from planish.plugins.kernel_library import Order
from planish.plugins.ops import quantize_activation
from tests.kernel_emulation import Array, quantize, stored_tokens
from tests.onnx_run import run_op


def tokens(count: int, channels: int, seed: int = 0) -> Array:
    x = np.random.default_rng(seed).standard_normal((count, channels)).astype(np.float32)
    x[:, channels // 3] *= 30
    return x


def padded(channels: int) -> int:
    return -(-channels // 256) * 256


def transformed(x: Array, right: Array | None, left: Array | None) -> Array:
    """Return x P in float64."""
    k = right.shape[1] if right is not None else x.shape[1] // len(left)
    grid = x.astype(np.float64).reshape(len(x), -1, k)
    if right is not None:
        grid = np.einsum("tmk,mkj->tmj", grid, np.broadcast_to(right, (grid.shape[1], k, k)).astype(np.float64))
    if left is not None:
        grid = np.einsum("lm,tlk->tmk", left.astype(np.float64), grid)
    return grid.reshape(x.shape)


def assert_codes_fit(codes: Array, scale: Array, values: Array, bits: int, clip: float = 1.0) -> None:
    """Check that codes are the nearest to float64 `values` on the grid, but for ties that float32 may break."""
    zero = 1 << bits - 1
    ideal = np.abs(values).max(1, keepdims=True) * clip / (zero - 1)
    np.testing.assert_allclose(scale[:, None], ideal, rtol=1e-4)
    steps = np.clip(values / ideal, -zero, zero - 1)
    assert np.abs(codes.astype(np.float64) - zero - steps).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("channels", [1, 7, 64, 576, 1536])
def test_codes_are_those_of_the_op(bits: int, channels: int) -> None:
    x = tokens(6, channels)
    x[2] = 0
    x[3] = 1e-20
    # At 2 and 3 bits the scale is 3 and 1 by the clip below: values that lie between two codes go to the even one.
    x[4] = (np.arange(channels) % 17 - 8) / 2
    clip = 0.75 if bits < 8 else 1.0
    codes, scale = run_op(quantize_activation(), {"x": x}, bits=bits, clip=clip)
    found = quantize(x, [(channels, padded(channels), bits)], clip=clip, threads=96)
    zero = 1 << bits - 1
    stored = stored_tokens(codes, padded(channels), zero)
    np.testing.assert_array_equal(found.codes, stored)
    np.testing.assert_array_equal(found.scale, scale)
    np.testing.assert_array_equal(found.zero_sum[:, 0], np.stack([np.full(6, zero), stored.sum(1, dtype=int)], 1))


@pytest.mark.parametrize("values", [4, 16])
@pytest.mark.parametrize(
    ("m", "k", "threads"),
    [(24, 24, 160), (9, 64, 192), (64, 9, 160), (1, 576, 192), (2, 288, 192), (7, 96, 256)],
    ids=lambda size: str(size),
)
@pytest.mark.parametrize("form", ["right", "rows", "left", "right left", "rows left"])
def test_transforms(form: str, m: int, k: int, threads: int, values: int) -> None:
    """Kronecker, block-diagonal, mixed and dense maps; rows wider and narrower than the block of threads."""
    rng = np.random.default_rng(m)
    x = tokens(3, m * k)
    right = rng.standard_normal((m if "rows" in form else 1, k, k)).astype(np.float32) if form != "left" else None
    left = rng.standard_normal((m, m)).astype(np.float32) if "left" in form else None
    found = quantize(x, [(m * k, padded(m * k), 8)], right=right, left=left, values=values, threads=threads)
    codes = natural_order(found.codes)[:, : m * k]
    assert_codes_fit(codes, found.scale[:, 0], transformed(x, right, left), 8)


#: m, k, tiles to a warp and the warps of a block: of SmolLM2, LLaMA-2-7B and LLaMA-3-8B, and some with lines and
#: columns behind the last. One tile to a warp would take more warps than there are for the widest two.
TILED = [
    *((24, 24, 1, 6), (32, 48, 1, 12), (64, 64, 1, 32), (8, 72, 1, 10), (9, 20, 1, 6)),
    *(
        (24, 24, 4, 3),
        (32, 48, 4, 6),
        (64, 64, 4, 8),
        (8, 72, 4, 9),
        (9, 20, 4, 3),
        (86, 128, 4, 32),
        (112, 128, 4, 32),
    ),
]


@pytest.mark.parametrize(("m", "k", "tiles", "warps"), TILED, ids=lambda size: str(size))
@pytest.mark.parametrize("form", ["right", "right left"])
def test_tiled_transforms(form: str, m: int, k: int, tiles: int, warps: int) -> None:
    """Kronecker products by tensor cores are as close to float64 as they are on the CUDA cores."""
    rng = np.random.default_rng(m)
    x = tokens(3, m * k)
    right = rng.standard_normal((1, k, k)).astype(np.float32)
    left = rng.standard_normal((m, m)).astype(np.float32) if "left" in form else None
    gain = rng.uniform(0.5, 2, m * k).astype(np.float32)
    found = quantize(
        x,
        [(m * k, padded(m * k), 8)],
        right=right,
        left=left,
        gain=gain,
        values=4 * tiles,
        threads=32 * warps,
        tiled=True,
    )
    wide = x.astype(np.float64)
    normal = wide / np.sqrt((wide**2).mean(1, keepdims=True)) * gain
    codes = natural_order(found.codes)[:, : m * k]
    assert_codes_fit(codes, found.scale[:, 0], transformed(normal, right, left), 8)


@pytest.mark.parametrize(
    ("m", "k", "warps"),
    [(9, 64, 18), (9, 64, 4), (24, 24, 24), (1, 576, 18), (7, 96, 21), (16, 8, 5), (3, 328, 22), (40, 32, 6)],
    ids=lambda size: str(size),
)
@pytest.mark.parametrize("together", [1, 3, 8])
@pytest.mark.parametrize("form", ["rows", "left", "rows left", "right left"])
def test_blocks_of_some_tokens(form: str, together: int, m: int, k: int, warps: int) -> None:
    """Block-diagonal maps and mixings by tensor cores: more tokens than a block has, fewer, and as many."""
    rng = np.random.default_rng(m)
    x = tokens(4, m * k)
    right = rng.standard_normal((m if "rows" in form else 1, k, k)).astype(np.float32) if form != "left" else None
    left = rng.standard_normal((m, m)).astype(np.float32) if "left" in form else None
    gain = rng.uniform(0.5, 2, m * k).astype(np.float32)
    segments = [(m * k, padded(m * k), 8)]
    found = quantize(x, segments, right=right, left=left, gain=gain, threads=32 * warps, together=together)
    wide = x.astype(np.float64)
    normal = wide / np.sqrt((wide**2).mean(1, keepdims=True)) * gain
    codes = natural_order(found.codes)[:, : m * k]
    assert_codes_fit(codes, found.scale[:, 0], transformed(normal, right, left), 8)


@pytest.mark.parametrize(("m", "k"), [(17, 20), (5, 12), (33, 3)], ids=lambda size: str(size))
def test_heads_of_odd_widths_are_mixed(m: int, k: int) -> None:
    """Lines and columns that fill no tile, in lines whose octets go across their ends."""
    x, left = tokens(3, m * k), np.random.default_rng(k).standard_normal((m, m)).astype(np.float32)
    found = quantize(x, [(m * k, padded(m * k), 8)], left=left, threads=128, together=2)
    codes = natural_order(found.codes)[:, : m * k]
    assert_codes_fit(codes, found.scale[:, 0], transformed(x, None, left), 8)


def test_permutation_and_two_segments_behind_blocks() -> None:
    """Channels are found in lines that are apart, permuted or not; a second segment may begin within an octet."""
    rng = np.random.default_rng(4)
    x, right = tokens(4, 576), rng.standard_normal((9, 64, 64)).astype(np.float32)
    y = transformed(x, right, None)
    for order in (None, rng.permutation(576).astype(np.int32)):
        moved = y if order is None else y[:, order]
        found = quantize(x, [(68, 128, 8), (508, 512, 8)], right=right, permutation=order, threads=128, together=2)
        codes = natural_order(found.codes)
        assert_codes_fit(codes[:, :68], found.scale[:, 0], moved[:, :68], 8)
        assert_codes_fit(codes[:, 128:][:, :508], found.scale[:, 1], moved[:, 68:], 8)


def natural_order(stored: Array) -> Array:
    return stored.reshape(len(stored), -1, 2, 4).swapaxes(2, 3).reshape(len(stored), -1)


def test_norm_and_gain() -> None:
    rng = np.random.default_rng(1)
    x, gain = tokens(4, 576), rng.uniform(0.5, 2, 576).astype(np.float32)
    found = quantize(x, [(576, 768, 8)], gain=gain, epsilon=1e-5)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * gain
    assert_codes_fit(natural_order(found.codes)[:, :576], found.scale[:, 0], expected, 8)


def test_permutation_and_two_segments() -> None:
    """High-impact channels go in front, with bits and a scale of their own."""
    x = tokens(4, 576)
    order = np.random.default_rng(2).permutation(576).astype(np.int32)
    found = quantize(x, [(64, 64, 4), (512, 512, 3)], permutation=order, clip=0.9)
    for s, (start, end, bits) in enumerate([(0, 64, 4), (64, 576, 3)]):
        alone = quantize(x[:, order[start:end]], [(end - start, end - start, bits)], clip=0.9)
        np.testing.assert_array_equal(found.codes[:, start:end], alone.codes)
        np.testing.assert_array_equal(found.scale[:, s], alone.scale[:, 0])
        np.testing.assert_array_equal(found.zero_sum[:, s], alone.zero_sum[:, 0])


@pytest.mark.parametrize("order", Order)
def test_orders(order: Order) -> None:
    """The same codes, scales and sums, stored as each kernel loads them; two segments, each padded on its own."""
    x = tokens(3, 700)
    segments = [(64, 64, 4), (636, 768, 3)]
    lanes, found = quantize(x, segments), quantize(x, segments, order=order)
    np.testing.assert_array_equal(found.scale, lanes.scale)
    np.testing.assert_array_equal(found.zero_sum, lanes.zero_sum)
    codes = natural_order(lanes.codes)
    parts = [stored_tokens(codes[:, :64], 64, 8, order), stored_tokens(codes[:, 64:], 768, 4, order)]
    np.testing.assert_array_equal(found.codes, np.concatenate(parts, 1))
