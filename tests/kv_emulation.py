"""The kernels of the packed cache run on the host: their warps emulated in C++, called through ctypes.

`Cache` is a packed cache in numpy, with or without pages; `append` and `attend` run the kernels on it, and
`reference` is attention in float64 over the codes that it holds.
"""

import ctypes
import dataclasses
import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from planish.plugins.kernel_library import call
from planish.plugins.kv_library import (
    COUNTER_BYTES,
    PAGE_TOKENS,
    AppendTask,
    AttendTask,
    CacheArrays,
    TokenCounts,
    bind_kv,
)
from planish.plugins.native import build_library
from planish.plugins.packing import pack, packed_size, unpack
from tests.kernel_emulation import FOLDER, aligned

__all__ = ["TYPES", "Cache", "append", "attend", "library", "reference"]

Array = npt.NDArray[Any]

#: The types of queries, keys and values: the number that the kernels know them by.
TYPES: dict[type, int] = {np.float32: 0, np.float16: 1}


@functools.cache
def library() -> ctypes.CDLL:
    """Return the library of kv_emulation.cpp: the C interface of the kernels, for arrays of the host."""
    emulation = bind_kv(ctypes.CDLL(str(build_library(FOLDER / "kv_emulation.cpp"))))
    emulation.planish_float_of_half.argtypes = [ctypes.c_uint16]
    emulation.planish_float_of_half.restype = ctypes.c_float
    emulation.planish_half_of_float.argtypes = [ctypes.c_float]
    emulation.planish_half_of_float.restype = ctypes.c_uint16
    return emulation


@dataclasses.dataclass(frozen=True, eq=False)
class Cache:
    """A packed cache for `batch` sequences of `capacity` tokens; memory that nothing was written to is all ones.

    Attributes:
        kv_heads: heads of keys and values.
        head_dim: 64, 96 or 128.
        bits: of keys and of values.
        codes: of keys and values, uint8 [blocks, kv_heads, block tokens, bytes].
        scales: of keys and values, float16 [blocks, kv_heads, block tokens, 2].
        firsts: of keys and values, float16 [batch, kv_heads, first, head_dim].
        pages: int32 [batch, pages], or None where a sequence is a block.
    """

    kv_heads: int
    head_dim: int
    bits: tuple[int, int]
    codes: tuple[Array, Array]
    scales: tuple[Array, Array]
    firsts: tuple[Array, Array]
    pages: Array | None

    @classmethod
    def empty(
        cls,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        bits: tuple[int, int],
        *,
        first: int = 0,
        rng: np.random.Generator | None = None,
    ) -> "Cache":
        """Make a cache; with `rng` it has pages, in a random order, some of which belong to nobody."""
        pages, blocks, block = None, batch, capacity
        if rng is not None:
            count = -(-capacity // PAGE_TOKENS)
            blocks, block = batch * count + 3, PAGE_TOKENS
            pages = rng.permutation(blocks)[: batch * count].reshape(batch, count).astype(np.int32)
        shape = (blocks, kv_heads, block)
        key_codes, value_codes = (_ones((*shape, packed_size(head_dim, each)), np.uint8) for each in bits)
        key_scales, value_scales = (_ones((*shape, 2), np.float16) for _ in bits)
        first_keys, first_values = (_ones((batch, kv_heads, first, head_dim), np.float16) for _ in bits)
        return cls(
            kv_heads,
            head_dim,
            bits,
            (key_codes, value_codes),
            (key_scales, value_scales),
            (first_keys, first_values),
            pages,
        )

    @property
    def capacity(self) -> int:
        return self.codes[0].shape[2] if self.pages is None else self.pages.shape[1] * PAGE_TOKENS

    def fill(self, rng: np.random.Generator, tokens: Array, spread: float = 1.0) -> None:
        """Write random codes, scales, zeros and first tokens for the first `tokens` [batch] of every sequence."""
        for sequence, count in enumerate(tokens):
            rows = self.rows(sequence, int(count))
            for part in range(2):
                shape = (int(count), self.kv_heads)
                codes = rng.integers(0, 1 << self.bits[part], (*shape, self.head_dim), np.uint8)
                scale = rng.uniform(0.02, 1.0, shape) * spread / (1 << self.bits[part] - 1)
                zero = scale * -rng.uniform(0.3, 0.7, shape) * ((1 << self.bits[part]) - 1)
                self.codes[part][rows] = pack(codes, self.bits[part])
                self.scales[part][rows] = np.stack([scale, zero], -1)
                first = min(int(count), self.firsts[part].shape[2])
                self.firsts[part][sequence, :, :first] = rng.standard_normal((self.kv_heads, first, self.head_dim))

    def rows(self, sequence: int, count: int) -> tuple[Array, slice, Array]:
        """Return the index of a sequence's first `count` tokens in `codes` and `scales`: [count, kv_heads, ...]."""
        token = np.arange(count)
        if self.pages is None:
            return np.full(count, sequence), slice(None), token
        return self.pages[sequence, token // PAGE_TOKENS], slice(None), token % PAGE_TOKENS

    def values(self, part: int, sequence: int, count: int) -> Array:
        """Return what the codes of keys (0) or values (1) mean, float64 [count, kv_heads, head_dim]."""
        rows = self.rows(sequence, count)
        codes = unpack(self.codes[part][rows], self.bits[part], self.head_dim).astype(np.float64)
        scale, zero = np.split(self.scales[part][rows].astype(np.float64), 2, -1)
        values = codes * scale + zero
        first = min(count, self.firsts[part].shape[2])
        values[:first] = self.firsts[part][sequence, :, :first].swapaxes(0, 1)
        return values

    def arrays(self) -> CacheArrays:
        addresses = [each.ctypes.data for each in (self.codes[0], self.scales[0], self.codes[1], self.scales[1])]
        first = self.firsts[0].shape[2]
        return CacheArrays(
            *addresses,
            None if self.pages is None else self.pages.ctypes.data,
            *(each.ctypes.data if first else None for each in self.firsts),
            first,
            self.capacity,
            self.kv_heads,
            self.head_dim,
            *self.bits,
        )


def append(
    cache: Cache,
    past: Array,
    keys: Array,
    values: Array,
    queries: Array | None = None,
    *,
    counts: Array | None = None,
    clips: tuple[float, float] = (1.0, 1.0),
    angles: tuple[Array, Array] | None = None,
    maps: tuple[Array, Array] | None = None,
    rows: int = 1,
) -> Array | None:
    """Append to the cache and return the rotated queries, if there are any.

    Args:
        cache: written to.
        past: int [batch], tokens that the cache has.
        keys: float32 or float16 [batch, tokens, kv_heads, head_dim].
        values: likewise.
        queries: [batch, tokens, heads, head_dim], likewise.
        counts: int [batch], new tokens of each sequence; None is all.
        clips: of keys and of values.
        angles: cosines and sines, float32 [positions, head_dim / 2]; None is no RoPE.
        maps: of keys and of queries, float32 [1 or kv_heads, head_dim, head_dim].
        rows: tokens of a warp, 1 or 8.
    """
    heads = 0 if queries is None else queries.shape[2]
    parts = [keys, values] if queries is None else [queries, keys, values]
    # As a merged linear gives them: side by side.
    together = aligned(np.concatenate(parts, 2))
    size = together.itemsize * cache.head_dim
    address = together.ctypes.data
    rotated = None if queries is None else aligned(np.full_like(queries, np.nan))
    past, counts = (None if each is None else np.ascontiguousarray(each, np.int32) for each in (past, counts))
    arrays = [None if pair is None else tuple(map(aligned, pair)) for pair in (angles, maps)]
    task = AppendTask(
        cache.arrays(),
        TokenCounts(*keys.shape[:2], past.ctypes.data, None if counts is None else counts.ctypes.data),
        address if heads else None,
        address + heads * size,
        address + (heads + cache.kv_heads) * size,
        together.shape[2] * cache.head_dim,
        together.shape[2] * cache.head_dim,
        None if rotated is None else rotated.ctypes.data,
        heads,
        TYPES[keys.dtype.type],
        *((None, None) if arrays[0] is None else (each.ctypes.data for each in arrays[0])),
        *((None, None) if arrays[1] is None else (each.ctypes.data for each in arrays[1])),
        0 if arrays[1] is None else len(arrays[1][0]),
        *clips,
    )
    library().planish_choose(0, 0, rows > 1)
    call(library(), "planish_append_kv", ctypes.byref(task), None)
    return rotated


def attend(
    cache: Cache, past: Array, queries: Array, *, splits: int, counts: Array | None = None, late: bool = True
) -> Array:
    """Return attention of queries [batch, tokens, heads, head_dim], which are the last tokens of the cache.

    `splits` is 0 for the kernel of many columns; `late` says when asynchronous copies arrive.
    """
    batch, tokens, heads, head_dim = queries.shape
    source, y = aligned(queries), aligned(np.full_like(queries, np.nan))
    past, counts = (None if each is None else np.ascontiguousarray(each, np.int32) for each in (past, counts))
    floats = batch * heads * max(splits, 1) * tokens * (head_dim + 2)
    workspace = aligned(np.full(COUNTER_BYTES // 4 + floats, np.nan, np.float32))
    task = AttendTask(
        cache.arrays(),
        TokenCounts(batch, tokens, past.ctypes.data, None if counts is None else counts.ctypes.data),
        source.ctypes.data,
        heads * head_dim,
        y.ctypes.data,
        heads,
        TYPES[queries.dtype.type],
        1 / np.sqrt(head_dim),
        max(splits, 1),
        workspace.nbytes,
        workspace.ctypes.data,
    )
    library().planish_choose(late, splits == 0, 0)
    call(library(), "planish_attend_kv", ctypes.byref(task), None)
    return y


def reference(cache: Cache, past: Array, queries: Array, counts: Array | None = None) -> Array:
    """Return what `attend` computes, in float64: softmax(q k^T / sqrt(head_dim)) v up to the place of each query."""
    batch, tokens, heads, head_dim = queries.shape
    y = np.zeros(queries.shape)
    for sequence in range(batch):
        count = tokens if counts is None else int(counts[sequence])
        total = int(past[sequence]) + count
        keys, values = (
            cache.values(part, sequence, total).repeat(heads // cache.kv_heads, 1).swapaxes(0, 1) for part in range(2)
        )
        query = queries[sequence, :count].astype(np.float64).swapaxes(0, 1)
        scores = query @ keys.swapaxes(1, 2) / np.sqrt(head_dim)
        place = int(past[sequence]) + np.arange(count)
        scores = np.where(np.arange(total) <= place[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True, initial=-np.inf))
        y[sequence, :count] = (weights / weights.sum(-1, keepdims=True) @ values).swapaxes(0, 1)
    return y


def _ones(shape: tuple[int, ...], dtype: type) -> Array:
    array = aligned(np.zeros(shape, dtype))
    array.view(np.uint8)[...] = 255
    return array
