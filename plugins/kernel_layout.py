"""Weights in the layout that the GPU kernels read, made from the portable one.

The portable layout (`packing.py`) is for array languages; kernels want every lane of a warp to find its codes in whole
128-bit loads, in the order of the tensor cores' fragments. Both take the same bits. The layout itself is in
`cuda/segments.cuh`, `cuda/fragments.cuh` and `cuda/weight_codes.cuh`, and is written by the same C++ that the kernels
are made of, called here through ctypes (`native.py`).

Rows are padded to a multiple of 16, input channels to a multiple of 128, 256 or 64 (at 2, 3, 4 bits), with the zero
point.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from planish.plugins.native import host_library
from planish.plugins.packing import Codes, packed_size

__all__ = [
    "KERNEL_BITS",
    "TILE_ROWS",
    "KernelWeight",
    "gated_rows",
    "pack_for_kernel",
    "padded_channels",
    "unpack_from_kernel",
]

#: The widths that have a kernel layout.
KERNEL_BITS = (2, 3, 4)
#: Output channels of a tile.
TILE_ROWS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class KernelWeight:
    """One weight matrix, or one segment of its input channels, as kernels read it.

    Attributes:
        words: uint32 [row tiles, words], the words of each tile of rows.
        row_sums: int32 [row tiles * 16], the sum over channels of code - 2^(bits-1); 0 for padding.
        rows: output channels.
        channels: input channels.
        bits: of a code.
    """

    words: npt.NDArray[np.uint32]
    row_sums: npt.NDArray[np.int32]
    rows: int
    channels: int
    bits: int


def padded_channels(channels: int, bits: int) -> int:
    """Return the input channels that `channels` of them take with padding.

    Raises:
        ValueError: if the width has no kernel layout.
        NativeBuildError: if the packer cannot be compiled.
    """
    _check_bits(bits)
    return int(host_library().planish_padded_channels(channels, bits))


def pack_for_kernel(packed: Codes, channels: int, bits: int) -> KernelWeight:
    """Return a weight in kernel layout.

    Args:
        packed: uint8 [rows, packed_size(channels, bits)], layout of `packing.pack`; may be a memory map.
        channels: input channels, one at least.
        bits: 2, 3 or 4.

    Raises:
        ValueError: if the width has no kernel layout or the shape does not fit.
        NativeBuildError: if the packer cannot be compiled.
    """
    _check_bits(bits)
    if packed.ndim != 2 or packed.dtype != np.uint8 or packed.shape[1] != packed_size(channels, bits) or channels < 1:
        raise ValueError(
            f"{channels} packed {bits}-bit codes to a row are uint8 [rows, {packed_size(channels, bits)}], "
            f"and this is {packed.dtype} {list(packed.shape)}"
        )
    rows = packed.shape[0]
    row_tiles = -(-rows // TILE_ROWS)
    library = host_library()
    words = np.empty((row_tiles, library.planish_matrix_words(TILE_ROWS, channels, bits)), np.uint32)
    row_sums = np.empty(row_tiles * TILE_ROWS, np.int32)
    source = np.ascontiguousarray(packed)
    library.planish_pack_weight(source.ctypes.data, rows, channels, bits, words.ctypes.data, row_sums.ctypes.data)
    return KernelWeight(words, row_sums, rows, channels, bits)


def unpack_from_kernel(weight: KernelWeight) -> Codes:
    """Return the codes of a weight in kernel layout, uint8 [rows, channels]."""
    codes = np.empty((weight.rows, weight.channels), np.uint8)
    words = np.ascontiguousarray(weight.words)
    host_library().planish_unpack_weight(
        words.ctypes.data, weight.rows, weight.channels, weight.bits, codes.ctypes.data
    )
    return codes


def gated_rows(rows: int) -> npt.NDArray[np.int64]:
    """Return the order of rows in which kernels compute silu(gate) * up themselves.

    Gate and up lie one behind the other, `rows` together; row i of the weight to pack, and of its scales, is row
    `gated_rows(rows)[i]`: eight of gate, eight of up, and so on.

    Raises:
        ValueError: if the rows do not come in sixteens.
    """
    if rows % TILE_ROWS:
        raise ValueError(f"{rows} rows of gate and up do not come in sixteens")
    return np.arange(rows).reshape(2, -1, TILE_ROWS // 2).swapaxes(0, 1).ravel()


def _check_bits(bits: int) -> None:
    if bits not in KERNEL_BITS:
        raise ValueError(f"{bits}-bit weights have no kernel layout; those of {KERNEL_BITS} bits have")
