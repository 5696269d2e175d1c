"""Attention over the packed cache, emulated: close to float64 on the same codes, whatever the shape."""

import numpy as np
import pytest

from planish.plugins.kv_library import PAGE_TOKENS
from planish.plugins.ops import attend as attend_op
from planish.plugins.packing import PACKED_BITS
from tests.kv_emulation import Array, Cache, attend, reference
from tests.onnx_run import run_op

HEAD_DIMS = (64, 96, 128)
#: Of the length of an output.
TOLERANCE = 1e-3
TILE = 16


def error(found: Array, expected: Array) -> float:
    """Return the largest distance of an output [..., head_dim], as a share of its length."""
    assert np.isfinite(found).all()
    length = np.linalg.norm(expected, axis=-1)
    return float((np.linalg.norm(found - expected, axis=-1) / np.where(length > 0, length, 1)).max())


def queries(rng: np.random.Generator, *shape: int, spread: float = 2.0) -> Array:
    return (rng.standard_normal(shape) * spread).astype(np.float16)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_random_caches(bits: int, head_dim: int) -> None:
    """840 random cases of each width and head size, 10,080 in all: heads, lengths, splits, pages, first tokens."""
    rng = np.random.default_rng(bits * 1000 + head_dim)
    for _ in range(840):
        group, kv_heads = int(rng.choice([1, 3, 4, 8])), int(rng.choice([1, 2]))
        batch, tokens = int(rng.choice([1, 1, 2])), int(rng.choice([1, 1, 1, 2, 5]))
        past = rng.integers(0, int(rng.choice([2, 20, 90])), batch)
        counts = rng.integers(0, tokens + 1, batch) if rng.random() < 0.3 else None
        paged, late = (bool(rng.integers(2)) for _ in range(2))
        first = int(rng.choice([0, 0, 0, 16]))
        bits_of = (bits, int(rng.choice(PACKED_BITS)))
        cache = Cache.empty(
            batch, kv_heads, 2 * PAGE_TOKENS, head_dim, bits_of, first=first, rng=rng if paged else None
        )
        cache.fill(rng, past + tokens, spread=float(rng.choice([0.05, 1.0, 20.0])))
        query = queries(rng, batch, tokens, kv_heads * group, head_dim, spread=float(rng.choice([0.01, 1.0, 4.0])))
        splits = int(rng.integers(1, 5)) if tokens * group <= 8 else 0
        found = attend(cache, past, query, splits=splits, counts=counts, late=late)
        assert error(found, reference(cache, past, query, counts)) < TOLERANCE


@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_boundaries(bits: int, splits: int) -> None:
    """Contexts of one token, and of one less and one more than whole tiles, warps, splits and pages."""
    rng = np.random.default_rng(splits)
    for total in (1, 2, 15, 16, 17, 63, 64, 65, 4 * TILE * splits - 1, 4 * TILE * splits, 4 * TILE * splits + 1, 256):
        cache = Cache.empty(1, 1, 4 * PAGE_TOKENS, 64, (bits, bits), rng=rng)
        cache.fill(rng, np.array([total]))
        query = queries(rng, 1, 1, 4, 64)
        past = np.array([total - 1])
        for late in (False, True):
            found = attend(cache, past, query, splits=splits, late=late)
            assert error(found, reference(cache, past, query)) < TOLERANCE


def test_an_empty_sequence_in_a_batch() -> None:
    """Its outputs are zeros, and nobody else's change."""
    rng = np.random.default_rng(1)
    past, counts = np.array([40, 0, 7]), np.array([1, 0, 1])
    cache = Cache.empty(3, 2, PAGE_TOKENS, 128, (3, 3))
    cache.fill(rng, past + counts)
    query = queries(rng, 3, 1, 2, 128)
    for splits in (0, 1, 3):
        found = attend(cache, past, query, splits=splits, counts=counts)
        assert not found[1].any()
        assert error(found, reference(cache, past, query, counts)) < TOLERANCE


@pytest.mark.parametrize("splits", [0, 1, 3])
def test_lengths_are_taken_as_far_as_there_is_room(splits: int) -> None:
    """Less than nothing is nothing, more than the cache holds is all of it, more than was given is what was given."""
    rng = np.random.default_rng(splits)
    past, counts = np.array([-9, 63, 70, 40, 62, 30]), np.array([1, 1, 1, -1, 2, 7])
    kept_past, kept_counts = np.array([0, 63, 64, 40, 62, 30]), np.array([1, 1, 0, 0, 2, 2])
    cache = Cache.empty(6, 2, PAGE_TOKENS, 64, (3, 3))
    cache.fill(rng, np.full(6, PAGE_TOKENS))
    query = queries(rng, 6, 2, 4, 64)
    found = attend(cache, past, query, splits=splits, counts=counts)
    np.testing.assert_array_equal(found, attend(cache, kept_past, query, splits=splits, counts=kept_counts))
    assert error(found, reference(cache, kept_past, query, kept_counts)) < TOLERANCE
    assert not found[2:4].any()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_long_context(bits: int) -> None:
    """4,000 tokens that count about alike: what is left of values after averaging is small beside their zeros."""
    rng = np.random.default_rng(bits)
    cache = Cache.empty(1, 1, 4096, 128, (bits, bits))
    cache.fill(rng, np.array([4000]))
    query = queries(rng, 1, 1, 1, 128, spread=0.1)
    past = np.array([3999])
    expected = reference(cache, past, query)
    for splits in (1, 7):
        assert error(attend(cache, past, query, splits=splits), expected) < TOLERANCE


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_a_prompt(group: int, head_dim: int) -> None:
    """Many new tokens behind a past, of which every one attends up to itself."""
    rng = np.random.default_rng(group)
    past, counts = np.array([0, 33]), np.array([50, 37])
    cache = Cache.empty(2, 1, 2 * PAGE_TOKENS, head_dim, (3, 3), first=16)
    cache.fill(rng, past + counts)
    query = queries(rng, 2, 50, group, head_dim)
    found = attend(cache, past, query, splits=0, counts=counts)
    assert error(found, reference(cache, past, query, counts)) < TOLERANCE
    # The last token alone, by the other kernel.
    last = attend(cache, past + counts - 1, query[np.arange(2), counts - 1][:, None], splits=2)
    assert error(found[np.arange(2), counts - 1][:, None], last.astype(np.float64)) < TOLERANCE


def test_values_of_any_size() -> None:
    """Scales far from 1, one huge key, and a query of zeros, which attends to all alike."""
    rng = np.random.default_rng(3)
    past = np.array([70])
    for factor in (2.0**-9, 1.0, 1000.0):
        cache = Cache.empty(1, 1, 2 * PAGE_TOKENS, 96, (4, 4))
        cache.fill(rng, past + 1)
        cache.scales[1][...] = (cache.scales[1].astype(np.float32) * factor).astype(np.float16)
        cache.scales[0][0, 0, 20] *= np.float16(50)
        for spread in (0.0, 1e-4, 1.0, 100.0):
            query = queries(rng, 1, 1, 8, 96, spread=spread)
            for splits in (0, 2):
                assert error(attend(cache, past, query, splits=splits), reference(cache, past, query)) < TOLERANCE


def test_the_merge_is_the_same_for_every_order_of_arrival() -> None:
    rng = np.random.default_rng(4)
    cache = Cache.empty(2, 2, 256, 64, (3, 3))
    cache.fill(rng, np.array([200, 31]))
    query = queries(rng, 2, 1, 8, 64)
    runs = [attend(cache, np.array([199, 30]), query, splits=3, late=late) for late in (False, True)]
    np.testing.assert_array_equal(*runs)


@pytest.mark.parametrize("key_bits", PACKED_BITS)
def test_function_body_gives_the_same(key_bits: int) -> None:
    """PlanishAttend, run by ONNX Runtime in float32, over the same bytes."""
    rng = np.random.default_rng(key_bits)
    value_bits = {2: 3, 3: 4, 4: 8, 8: 2}[key_bits]
    cache = Cache.empty(2, 2, 48, 64, (key_bits, value_bits))
    cache.fill(rng, np.array([48, 48]))
    query = queries(rng, 2, 5, 6, 64).astype(np.float32)
    mask = np.where(np.arange(48) <= 43 + np.arange(5)[:, None], 0, -np.inf).astype(np.float32)
    feeds = {
        "query": query.reshape(2, 5, -1),
        "key": cache.codes[0],
        "key_scale": cache.scales[0],
        "value": cache.codes[1],
        "value_scale": cache.scales[1],
        "mask": np.broadcast_to(mask, (2, 1, 5, 48)).copy(),
    }
    (y,) = run_op(attend_op(key_bits, value_bits), feeds, heads=6, head_dim=64)
    found = attend(cache, np.array([43, 43]), query, splits=0)
    assert error(found, y.reshape(query.shape).astype(np.float64)) < TOLERANCE
