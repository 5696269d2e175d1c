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

__all__ = ["FOLDER", "Segment", "emulate", "emulation", "stored_tokens"]

FOLDER = Path(__file__).parent / "plugins" / "cuda"

Array = npt.NDArray[Any]


@functools.cache
def emulation() -> ctypes.CDLL:
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


def emulate(low: Segment, high: Segment | None = None, *, way: int, warps: int, threads: int = 64) -> Array:
    """Return y, float32 [tokens, rows], of the small-batch kernel; `way` is 0 for dot products and 1 for the MMA."""
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
    failed = emulation().planish_small_linear(ctypes.byref(call), low.bits, way, warps, threads)
    assert not failed
    return y


def _aligned(array: Array) -> Array:
    """Return a copy that begins at a multiple of 16 bytes, as memory of a GPU does."""
    room = np.empty(array.nbytes + 16, np.uint8)
    start = -room.ctypes.data % 16
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
