"""GPU kernels run on the host: their blocks emulated in C++, called through ctypes.

`Emulated` holds the arguments of one low-bit linear as the kernels take them, made with numpy alone: the order of the
activation codes, their sums and their padding are written here a second time, from the text of fragments.cuh.
"""

import ctypes
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from planish.plugins.kernel_layout import KernelWeight, pack_for_kernel, padded_channels
from planish.plugins.kernel_library import (
    CodeSegment,
    LinearTask,
    Order,
    QuantizeTask,
    WeightOnlyTask,
    WeightSegment,
    bind,
    call,
)
from planish.plugins.native import build_library
from planish.plugins.packing import pack

__all__ = [
    "DOT",
    "FOLDER",
    "LARGE",
    "MMA",
    "Quantized",
    "Segment",
    "aligned",
    "emulate",
    "emulate_weight_only",
    "emulated_kernels",
    "quantize",
    "stored_tokens",
]

#: How products are made: dot products and MMAs for few tokens, and the kernel for many.
DOT, MMA, LARGE = range(3)

FOLDER = Path(__file__).parent / "plugins" / "cuda"

Array = npt.NDArray[Any]


@functools.cache
def emulated_kernels() -> ctypes.CDLL:
    """Return the library of emulated_kernels.cpp: the C interface of the kernels, for arrays of the host."""
    library = bind(ctypes.CDLL(str(build_library(FOLDER / "emulated_kernels.cpp"))))
    library.planish_emulate_small.argtypes = (ctypes.POINTER(LinearTask), *3 * [ctypes.c_int32])
    library.planish_emulate_weight_only.argtypes = (ctypes.POINTER(WeightOnlyTask), *2 * [ctypes.c_int32])
    library.planish_emulate_quantize_blocks.argtypes = (ctypes.POINTER(QuantizeTask), *2 * [ctypes.c_int32])
    library.planish_emulate_quantize.argtypes = (ctypes.POINTER(QuantizeTask), *3 * [ctypes.c_int32])
    return library


@dataclasses.dataclass(frozen=True)
class Segment:
    """Some input channels of a linear: codes of weights [rows, k] and of tokens [tokens, k], and all that scales them.

    Attributes:
        weights: uint8 [rows, k].
        weight_scale: float32 [rows].
        bits: of the weights.
        tokens: uint8 [tokens, k].
        token_scale: float32 [tokens].
        zero: the zero point of the tokens.
    """

    weights: Array
    weight_scale: Array
    bits: int
    tokens: Array
    token_scale: Array
    zero: int

    def product(self) -> Array:
        """Return the exact sums of products of centred codes, int64 [tokens, rows]."""
        return (self.tokens.astype(np.int64) - self.zero) @ (self.weights.astype(np.int64) - (1 << self.bits - 1)).T

    def packed(self) -> KernelWeight:
        return pack_for_kernel(pack(self.weights, self.bits), self.weights.shape[1], self.bits)


def stored_tokens(codes: Array, padded: int, zero: int, order: Order = Order.LANES) -> Array:
    """Return codes [tokens, k] in the order in which kernels load them, padded with the zero point."""
    whole = np.pad(codes, [(0, 0), (0, padded - codes.shape[1])], constant_values=zero)
    if order is Order.NIBBLES:
        return np.ascontiguousarray(whole[:, ::2] | whole[:, 1::2] << 4)
    lanes = whole.reshape(-1, padded // 8, 4, 2).swapaxes(2, 3)
    if order is Order.COLUMNS:
        lanes = lanes.reshape(-1, padded // 64, 4, 4, 4).swapaxes(2, 3)
    return np.ascontiguousarray(lanes.reshape(-1, padded))


def emulate(
    low: Segment,
    high: Segment | None = None,
    *,
    way: int,
    order: Order = Order.LANES,
    gated: bool = False,
    warps: int = 1,
    threads: int = 64,
) -> Array:
    """Return y, float32 [tokens, rows], or [tokens, rows / 2] where it is gated, of a kernel.

    `way` is DOT or MMA, the kernels for few tokens with `warps` and `threads` to a block; LARGE takes codes in `order`.
    """
    segments = [low] if high is None else [high, low]
    weights = [each.packed() for each in segments]
    padded = [padded_channels(each.weights.shape[1], each.bits) for each in segments]
    stored = [stored_tokens(each.tokens, size, each.zero, order) for each, size in zip(segments, padded, strict=True)]
    codes = aligned(np.concatenate(stored, 1))
    sums = np.stack([np.stack([np.full(len(each.tokens), each.zero),
                               each.tokens.sum(1, dtype=np.int64) + each.zero * (size - each.tokens.shape[1])], 1)
                     for each, size in zip(segments, padded, strict=True)], 1).astype(np.int32)  # fmt: skip
    scales = np.stack([each.token_scale for each in segments], 1).astype(np.float32)
    tokens, rows = len(low.tokens), len(low.weights)
    y = np.full((tokens, rows // 2 if gated else rows), np.nan, np.float32)
    words = [aligned(weight.words) for weight in weights]
    row_scales = [np.ascontiguousarray(each.weight_scale, np.float32) for each in segments]
    task = LinearTask(low_bits=low.bits, order=order, gated=gated, rows=rows, codes=codes.ctypes.data,
                      stride=codes.shape[1], tokens=tokens, token_scales=scales.ctypes.data,
                      token_zero_sums=sums.ctypes.data, y=y.ctypes.data)  # fmt: skip
    for name, i in (("low", -1), ("high", 0))[: len(segments)]:
        arrays = (words[i].ctypes.data, row_scales[i].ctypes.data, weights[i].row_sums.ctypes.data)
        setattr(task, name, WeightSegment(*arrays, weights[i].channels))
    library = emulated_kernels()
    if way == LARGE:
        call(library, "planish_large_linear", ctypes.byref(task), None)
    else:
        call(library, "planish_emulate_small", ctypes.byref(task), way, warps, threads)
    return y


def emulate_weight_only(x: Array, segment: Segment, *, gated: bool = False, warps: int = 1, threads: int = 64) -> Array:
    """Return y, float32 [tokens, rows] or gated [tokens, rows / 2], of float16 x [tokens, k] and some weights."""
    weight = segment.packed()
    x, words = aligned(x), aligned(weight.words)
    scales = np.ascontiguousarray(segment.weight_scale, np.float32)
    y = np.full((len(x), weight.rows // 2 if gated else weight.rows), np.nan, np.float32)
    task = WeightOnlyTask(words=words.ctypes.data, scales=scales.ctypes.data, bits=segment.bits, gated=gated,
                          channels=x.shape[1], rows=weight.rows, tokens=len(x), x=x.ctypes.data, stride=x.shape[1],
                          y=y.ctypes.data)  # fmt: skip
    call(emulated_kernels(), "planish_emulate_weight_only", ctypes.byref(task), warps, threads)
    return y


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What the quantising kernel gives: codes uint8 [tokens, stored], scale and (zero, sum) of every segment."""

    codes: Array
    scale: Array
    zero_sum: Array


def quantize(
    x: Array,
    segments: list[tuple[int, int, int]],
    *,
    clip: float = 1.0,
    gain: Array | None = None,
    epsilon: float = 0.0,
    right: Array | None = None,
    left: Array | None = None,
    permutation: Array | None = None,
    order: Order = Order.LANES,
    values: int = 16,
    threads: int = 64,
    tiled: bool = False,
    together: int | None = None,
) -> Quantized:
    """Run the quantising kernel on float32 x [tokens, channels].

    Args:
        x: the tokens.
        segments: channels, padded channels and bits of each.
        clip: of all segments.
        gain: float32 [channels] of the RMSNorm; None leaves it out.
        epsilon: of the RMSNorm.
        right: float32 [1 or m, k, k]; None is none.
        left: float32 [m, m]; None is none.
        permutation: int32 [channels]; None is none.
        order: of the codes.
        values: results of a thread, 4 or 16.
        threads: of a block.
        tiled: multiply the factors of a Kronecker product by tensor cores.
        together: multiply a block-diagonal map by tensor cores, with so many tokens to a block; None does not.
    """
    tokens, channels = x.shape
    k = right.shape[1] if right is not None else channels // len(left) if left is not None else channels
    arrays = [None if each is None else np.ascontiguousarray(each) for each in (gain, right, left, permutation)]
    addresses = [None if each is None else each.ctypes.data for each in arrays]
    stride = sum(padded for _, padded, _ in segments) // (2 if order is Order.NIBBLES else 1)
    codes = aligned(np.full((tokens, stride), 255, np.uint8))
    scale = np.empty((tokens, len(segments)), np.float32)
    zero_sum = np.empty((tokens, len(segments), 2), np.int32)
    x = np.ascontiguousarray(x, np.float32)
    task = QuantizeTask(
        x=x.ctypes.data,
        gain=addresses[0],
        epsilon=epsilon,
        right=addresses[1],
        left=addresses[2],
        right_count=0 if right is None else len(right),
        m=channels // k,
        k=k,
        permutation=addresses[3],
        segments=(CodeSegment * 2)(*((*each, clip) for each in segments)),
        segment_count=len(segments),
        order=order,
        channels=channels,
        tokens=tokens,
        codes=codes.ctypes.data,
        stride=stride,
        scales=scale.ctypes.data,
        zero_sums=zero_sum.ctypes.data,
    )
    if together is not None:
        call(emulated_kernels(), "planish_emulate_quantize_blocks", ctypes.byref(task), threads, together)
    else:
        call(emulated_kernels(), "planish_emulate_quantize", ctypes.byref(task), values, threads, tiled)
    return Quantized(codes, scale, zero_sum)


def aligned(array: Array) -> Array:
    """Return a copy that begins at a multiple of 16 bytes, as memory of a GPU does."""
    room = np.empty(array.nbytes + 16, np.uint8)
    start = -room.ctypes.data % 16
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
