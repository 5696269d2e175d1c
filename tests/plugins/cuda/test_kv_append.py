"""New keys and values in the packed cache, emulated: codes, scales and zeros equal to those of PlanishAppendKv."""

import ctypes

import numpy as np
import pytest

from planish.plugins.kv_library import PAGE_TOKENS
from planish.plugins.ops import append_kv
from planish.plugins.packing import PACKED_BITS, pack, packed_size, unpack
from tests.kv_emulation import Array, Cache, append, library
from tests.onnx_run import run_op

HEAD_DIMS = (64, 96, 128)


def vectors(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> Array:
    x = rng.standard_normal(shape).astype(np.float32)
    if kind == "offset":
        x += 40
    elif kind == "constant":
        x[..., ::2, :] = 3.25
        x[0] = 0
    elif kind == "tiny":
        x *= np.float32(1e-9)
    elif kind == "outliers":
        x[..., 5] *= 1000
    elif kind == "ties":
        # Zeros and scales that are whole numbers, so that halves lie between two codes.
        x = rng.integers(0, 31, shape).astype(np.float32) / 2
        x[..., 0], x[..., 1] = 0, 15
    return x


KINDS = ["random", "offset", "constant", "tiny", "outliers", "ties"]


def rotated(x: Array, angles: tuple[Array, Array], positions: Array) -> Array:
    """Return x [batch, tokens, heads, head_dim] behind RoPE, each step rounded to float32."""
    cosine, sine = (np.tile(table[positions], 2)[:, :, None] for table in angles)
    half = x.shape[-1] // 2
    other = np.concatenate([-x[..., half:], x[..., :half]], -1)
    return (x * cosine + other * sine).astype(np.float32)


def angles(head_dim: int, positions: int) -> tuple[Array, Array]:
    frequencies = 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = (np.arange(positions)[:, None] * frequencies).astype(np.float32)
    return np.cos(turns), np.sin(turns)


def of_op(x: Array, bits: int, clip: float) -> tuple[Array, Array]:
    """Return what PlanishAppendKv makes of x [batch, tokens, heads, head_dim]: codes and scales, tokens first."""
    batch, _, heads, head_dim = x.shape
    past = np.zeros((batch, heads, 0, packed_size(head_dim, bits)), np.uint8)
    feeds = {"x": x.swapaxes(1, 2).copy(), "past": past, "past_scale": np.zeros((batch, heads, 0, 2), np.float16)}
    codes, scales = run_op(append_kv(bits), feeds, clip=clip)
    return codes.swapaxes(1, 2), scales.swapaxes(1, 2)


def assert_appended(cache: Cache, past: Array, new: tuple[Array, Array], clips: tuple[float, float]) -> None:
    for part, (x, clip) in enumerate(zip(new, clips, strict=True)):
        codes, scales = of_op(x, cache.bits[part], clip)
        for sequence in range(len(x)):
            block, heads, token = cache.rows(sequence, int(past[sequence]) + x.shape[1])
            rows = block[past[sequence] :], heads, token[past[sequence] :]
            np.testing.assert_array_equal(cache.scales[part][rows], scales[sequence])
            np.testing.assert_array_equal(cache.codes[part][rows], codes[sequence])


def untouched(cache: Cache) -> int:
    """Return how many rows of the keys hold nothing."""
    return int((cache.scales[0].view(np.uint16) == 0xFFFF).all(-1).sum())


def test_halves() -> None:
    """Float16 of every exponent there and back, and floats that lie between two of them."""
    every = np.concatenate([np.arange(0, 1 << 16, 37), np.arange(1030)]).astype(np.uint16)
    finite = every[np.isfinite(every.view(np.float16))]
    floats = finite.view(np.float16).astype(np.float32)
    assert [library().planish_float_of_half(int(half)) for half in finite] == floats.tolist()
    above = np.nextafter(finite.view(np.float16), np.float16(np.inf)).astype(np.float64)
    between = ((floats + above) / 2)[np.isfinite(above)]
    near = np.concatenate([between, np.nextafter(between.astype(np.float32), np.float32(9e9)), floats, floats * 1.0001])
    for value in np.concatenate([near.astype(np.float32), np.float32([65519, 65520, 1e9, 6e-8, 2.9e-8, 1e-30])]):
        with np.errstate(over="ignore"):
            assert library().planish_half_of_float(ctypes.c_float(value)) == value.astype(np.float16).view(np.uint16)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_lanes_find_every_channel(bits: int, head_dim: int) -> None:
    """600 random pairs of rows as the lanes of a warp read them, for keys and for values."""
    rng = np.random.default_rng(bits * head_dim)
    for _ in range(600):
        rows = rng.integers(0, 1 << bits, (2, head_dim), np.uint8)
        # A lane may read a word behind the last row.
        memory = np.append(pack(rows, bits).ravel(), np.uint8([255, 254, 253, 252]))
        found = np.full((3, head_dim), -1, np.int32)
        at = [memory.ctypes.data, memory.ctypes.data + packed_size(head_dim, bits)]
        out = [found.ctypes.data, found[1:].ctypes.data]
        library().planish_read_row(*map(ctypes.c_void_p, at), bits, head_dim, *map(ctypes.c_void_p, out))
        np.testing.assert_array_equal(found, rows[[0, 0, 1]])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_the_op(kind: str, bits: int, head_dim: int) -> None:
    """72 kinds of rows, 144 rows of keys and of values each: 20,736 rows."""
    rng = np.random.default_rng(head_dim + bits)
    for clips in ((1.0, 0.85), (0.55, 1.0)):
        past = rng.integers(0, 20, 4).astype(np.int32)
        cache = Cache.empty(4, 2, 64, head_dim, (bits, int(rng.choice(PACKED_BITS))))
        keys, values = (vectors(rng, (4, 9, 2, head_dim), kind) for _ in range(2))
        append(cache, past, keys, values, clips=clips)
        assert_appended(cache, past, (keys, values), clips)
        assert untouched(cache) == 4 * 2 * (64 - 9)


def test_float16_keys() -> None:
    rng = np.random.default_rng(0)
    cache = Cache.empty(1, 3, 16, 64, (3, 3))
    keys, values = (vectors(rng, (1, 5, 3, 64), "random").astype(np.float16) for _ in range(2))
    append(cache, np.zeros(1), keys, values)
    assert_appended(cache, np.zeros(1, int), (keys.astype(np.float32), values.astype(np.float32)), (1.0, 1.0))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rope_and_queries(head_dim: int) -> None:
    """Codes of rotated keys are exact, and so are rotated queries; values are not rotated."""
    rng = np.random.default_rng(head_dim)
    past = np.array([3, 0])
    cache = Cache.empty(2, 2, 32, head_dim, (3, 3))
    keys, values = (vectors(rng, (2, 6, 2, head_dim), "random") for _ in range(2))
    queries = vectors(rng, (2, 6, 6, head_dim), "random")
    table = angles(head_dim, 32)
    found = append(cache, past, keys, values, queries, angles=table)
    positions = past[:, None] + np.arange(6)
    np.testing.assert_array_equal(found, rotated(queries, table, positions))
    assert_appended(cache, past, (rotated(keys, table, positions), values), (1.0, 1.0))


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_key_map(head_dim: int, count: int, rows: int) -> None:
    """Keys by K and queries by K^-T, one for all heads or one for each; scores stay what they were."""
    rng = np.random.default_rng(head_dim + count)
    cache = Cache.empty(1, 2, 16, head_dim, (8, 8))
    keys, values = (vectors(rng, (1, 11, 2, head_dim), "random") for _ in range(2))
    queries = vectors(rng, (1, 11, 4, head_dim), "random")
    # Behind the map four channels are large: rows that were shared out wrongly would span another range.
    key_map = np.stack([np.linalg.qr(rng.standard_normal((head_dim, head_dim)))[0] for _ in range(count)])
    key_map[..., :4] *= 8
    query_map = np.linalg.inv(key_map).swapaxes(-1, -2)
    maps = key_map.astype(np.float32), query_map.astype(np.float32)
    table = angles(head_dim, 16)
    found = append(cache, np.zeros(1), keys, values, queries, angles=table, maps=maps, rows=rows)
    turned = rotated(keys, table, np.arange(11)[None]).astype(np.float64)
    mapped = np.einsum("bthd,hde->bthe", turned, np.broadcast_to(maps[0], (2, head_dim, head_dim)))
    expected = np.einsum(
        "bthd,hde->bthe",
        rotated(queries, table, np.arange(11)[None]).astype(np.float64),
        np.broadcast_to(maps[1], (2, head_dim, head_dim)).repeat(2, 0),
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)
    step = cache.scales[0][0, :, :11, 0].T[..., None].astype(np.float64)
    assert (np.abs(cache.values(0, 0, 11) - mapped[0]) <= 0.51 * step + 2**-11 * np.abs(mapped[0])).all()
    np.testing.assert_array_equal(unpack(cache.codes[1][0, :, :11], 8, head_dim).swapaxes(0, 1),
                                  of_op(values, 8, 1.0)[0][0])  # fmt: skip


def test_pages_and_first_tokens() -> None:
    rng = np.random.default_rng(5)
    past = np.array([60, 0, 130])
    cache = Cache.empty(3, 2, 3 * PAGE_TOKENS, 96, (3, 4), first=16, rng=rng)
    keys, values = (vectors(rng, (3, 20, 2, 96), "random") for _ in range(2))
    append(cache, past, keys, values)
    assert_appended(cache, past, (keys, values), (1.0, 1.0))
    for first, new in zip(cache.firsts, (keys, values), strict=True):
        np.testing.assert_array_equal(first[1].swapaxes(0, 1), new[1, :16].astype(np.float16))
        assert (first[[0, 2]].view(np.uint16) == 0xFFFF).all()
    assert untouched(cache) == cache.scales[0][..., 0].size - 3 * 2 * 20


def test_tokens_that_are_not_there() -> None:
    """Sequences have counts of their own, one of them none, and a full cache takes nothing more."""
    rng = np.random.default_rng(6)
    past, counts = np.array([0, 5, 30]), np.array([7, 0, 7])
    cache = Cache.empty(3, 1, 32, 64, (2, 2))
    keys, values = (vectors(rng, (3, 7, 1, 64), "random") for _ in range(2))
    for rows in (1, 8):
        append(cache, past, keys, values, counts=counts, rows=rows)
        assert untouched(cache) == 3 * 32 - 7 - 2
    assert_appended(cache, np.zeros(1, int), (keys[:1], values[:1]), (1.0, 1.0))


@pytest.mark.parametrize("rows", [1, 8])
def test_lengths_are_taken_as_far_as_there_is_room(rows: int) -> None:
    """Less than nothing is nothing, more than the cache holds is all of it, more than was given is what was given."""
    rng = np.random.default_rng(rows)
    past, counts = np.array([-9, 63, 70, 40, 62]), np.array([1, 2, 1, -1, 7])
    kept_past, kept_counts = np.array([0, 63, 64, 40, 62]), np.array([1, 1, 0, 0, 2])
    x = vectors(rng, (3, 5, 2, 4, 64), "random")
    tables, maps = angles(64, PAGE_TOKENS), (np.eye(64, dtype=np.float32)[None] * 2,) * 2
    found, expected = (Cache.empty(5, 4, PAGE_TOKENS, 64, (3, 4)) for _ in range(2))
    for cache, (before, new) in ((found, (past, counts)), (expected, (kept_past, kept_counts))):
        append(cache, before, x[0], x[1], x[2], counts=new, angles=tables, maps=maps, rows=rows)
    for part in range(2):
        np.testing.assert_array_equal(found.codes[part], expected.codes[part])
        np.testing.assert_array_equal(found.scales[part], expected.scales[part])
    assert untouched(found) == 4 * (5 * PAGE_TOKENS - kept_counts.sum())
