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
from planish.plugins.native import build_library
from planish.plugins.packing import pack

__all__ = ["DOT", "FOLDER", "LARGE", "MMA", "Quantized", "Segment", "emulate", "quantize", "stored_tokens"]

#: How products are made: dot products and MMAs for few tokens, and the kernel for many.
DOT, MMA, LARGE = range(3)

FOLDER = Path(__file__).parent / "plugins" / "cuda"

Array = npt.NDArray[Any]


@functools.cache
def _emulation() -> ctypes.CDLL:
    """Return the library of emulation.cpp."""
    return ctypes.CDLL(str(build_library(FOLDER / "emulation.cpp")))


class _Call(ctypes.Structure):
    _fields_ = [
        *((f"{segment}_{name}", ctypes.c_void_p if name != "groups" else ctypes.c_int64)
          for segment in ("high", "low") for name in ("words", "scales", "sums", "groups")),
        ("rows", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("token_scales", ctypes.c_void_p),
        ("token_sums", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
    ]  # fmt: skip


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


def stored_tokens(codes: Array, padded: int, zero: int) -> Array:
    """Return codes [tokens, k] in the order in which lanes load 8-bit codes, padded with the zero point."""
    whole = np.pad(codes, [(0, 0), (0, padded - codes.shape[1])], constant_values=zero)
    return np.ascontiguousarray(whole.reshape(-1, padded // 8, 4, 2).swapaxes(2, 3).reshape(-1, padded))


def emulate(low: Segment, high: Segment | None = None, *, way: int, warps: int = 1, threads: int = 64) -> Array:
    """Return y, float32 [tokens, rows], of a kernel.

    `way` is DOT or MMA, the kernels for few tokens with `warps` and `threads` to a block, or LARGE.
    """
    segments = [low] if high is None else [high, low]
    weights = [each.packed() for each in segments]
    padded = [padded_channels(each.weights.shape[1], each.bits) for each in segments]
    stored = [stored_tokens(each.tokens, size, each.zero) for each, size in zip(segments, padded, strict=True)]
    codes = _aligned(np.concatenate(stored, 1))
    sums = np.stack([np.stack([np.full(len(part), each.zero), part.sum(1, dtype=np.int64)], 1)
                     for part, each in zip(stored, segments, strict=True)], 1).astype(np.int32)  # fmt: skip
    scales = np.stack([each.token_scale for each in segments], 1).astype(np.float32)
    tokens, rows = len(low.tokens), len(low.weights)
    y = np.full((tokens, rows), np.nan, np.float32)
    words = [_aligned(weight.words) for weight in weights]
    call = _Call(rows=rows, codes=codes.ctypes.data, stride=codes.shape[1], tokens=tokens,
                 token_scales=scales.ctypes.data, token_sums=sums.ctypes.data, y=y.ctypes.data)  # fmt: skip
    row_scales = [np.ascontiguousarray(each.weight_scale, np.float32) for each in segments]
    for name, i in (("low", -1), ("high", 0))[: len(segments)]:
        setattr(call, f"{name}_words", words[i].ctypes.data)
        setattr(call, f"{name}_scales", row_scales[i].ctypes.data)
        setattr(call, f"{name}_sums", weights[i].row_sums.ctypes.data)
        setattr(call, f"{name}_groups", padded[i] // {2: 128, 3: 256, 4: 64}[segments[i].bits])
    if way == LARGE:
        _emulation().planish_large_linear(ctypes.byref(call), low.bits)
    else:
        failed = _emulation().planish_small_linear(ctypes.byref(call), low.bits, way, warps, threads)
        assert not failed
    return y


class _CodeSegment(ctypes.Structure):
    _fields_ = [
        ("channels", ctypes.c_int32),
        ("padded", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("factor", ctypes.c_float),
    ]


class _Quantization(ctypes.Structure):
    _fields_ = [
        ("channels", ctypes.c_int32),
        ("gain", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("right", ctypes.c_void_p),
        ("left", ctypes.c_void_p),
        ("right_count", ctypes.c_int32),
        ("m", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("permutation", ctypes.c_void_p),
        ("segments", _CodeSegment * 2),
        ("segment_count", ctypes.c_int32),
    ]


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
    values: int = 16,
    threads: int = 64,
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
        values: results of a thread, 4 or 16.
        threads: of a block.
    """
    tokens, channels = x.shape
    k = right.shape[1] if right is not None else channels // len(left) if left is not None else channels
    arrays = [None if each is None else np.ascontiguousarray(each) for each in (gain, right, left, permutation)]
    addresses = [None if each is None else each.ctypes.data for each in arrays]
    task = _Quantization(
        channels,
        addresses[0],
        epsilon,
        addresses[1],
        addresses[2],
        0 if right is None else len(right),
        channels // k,
        k,
        addresses[3],
        (_CodeSegment * 2)(*((*each, np.float32(clip) / np.float32((1 << each[2] - 1) - 1)) for each in segments)),
        len(segments),
    )
    stride = sum(padded for _, padded, _ in segments)
    codes = np.full((tokens, stride), 255, np.uint8)
    scale = np.empty((tokens, len(segments)), np.float32)
    zero_sum = np.empty((tokens, len(segments), 2), np.int32)
    x = np.ascontiguousarray(x, np.float32)
    size = ctypes.c_int64
    _emulation().planish_quantize(
        ctypes.byref(task), ctypes.c_void_p(x.ctypes.data), size(tokens), size(stride), values, threads,
        *(ctypes.c_void_p(each.ctypes.data) for each in (codes, scale, zero_sum)),
    )  # fmt: skip
    return Quantized(codes, scale, zero_sum)


def _aligned(array: Array) -> Array:
    """Return a copy that begins at a multiple of 16 bytes, as memory of a GPU does."""
    room = np.empty(array.nbytes + 16, np.uint8)
    start = -room.ctypes.data % 16
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
