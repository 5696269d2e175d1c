"""Pack low-bit codes into bytes along the last axis, and back.

Codes are unsigned, 0 .. 2^bits - 1. The last axis (length n, padded with zeros to a multiple of 8) is cut into
chunks, and each byte takes one code from every chunk, so that unpacking is a few whole-array operations and a
concatenation, in any array language:

    4 bits: 2 chunks of n/2. byte i = c0[i] | c1[i] << 4
    2 bits: 4 chunks of n/4. byte i = c0[i] | c1[i] << 2 | c2[i] << 4 | c3[i] << 6
    3 bits: 8 chunks of n/8, three byte planes of n/8 each ("N3", two nibble lanes to a byte):
            plane j, byte i = c_j[i] | bit_j(c6[i]) << 3 | c_{3+j}[i] << 4 | bit_j(c7[i]) << 7,   j = 0, 1, 2
    8 bits: the code itself

Three codes fill the low bits of a nibble triple and the fourth is spread over its three spare bits, which is why
3-bit codes take exactly 3 bits and still unpack without crossing a byte.
"""

import numpy as np
import numpy.typing as npt

__all__ = ["PACKED_BITS", "pack", "packed_size", "unpack"]

Codes = npt.NDArray[np.uint8]

#: The widths that have a packed form.
PACKED_BITS = (2, 3, 4, 8)


def packed_size(n: int, bits: int) -> int:
    """Return the bytes that `n` codes of `bits` bits take along the packed axis."""
    return n if bits == 8 else -(-n // 8) * bits


def pack(codes: Codes, bits: int) -> Codes:
    """Pack `codes`.

    Args:
        codes: uint8 [..., n], each below 2^bits.
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 [..., packed_size(n, bits)].

    Raises:
        ValueError: if a code does not fit in `bits` bits, or `bits` has no packed form.
    """
    if bits not in PACKED_BITS:
        raise ValueError(f"{bits}-bit codes have no packed form; packed widths are {PACKED_BITS}")
    if codes.size and int(codes.max()) >= 1 << bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits")
    if bits == 8:
        return codes
    padding = -codes.shape[-1] % 8
    if padding:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, padding)])
    if bits == 4:
        low, high = np.split(codes, 2, axis=-1)
        return low | high * np.uint8(16)
    if bits == 2:
        first, second, third, fourth = np.split(codes, 4, axis=-1)
        packed: Codes = first | second * np.uint8(4) | third * np.uint8(16) | fourth * np.uint8(64)
        return packed
    chunks = np.split(codes, 8, axis=-1)
    spread = chunks[6] | chunks[7] << 4
    planes = [chunks[j] | chunks[3 + j] << 4 | ((spread >> j) & 0x11) << 3 for j in range(3)]
    return np.concatenate(planes, axis=-1)


def unpack(packed: Codes, bits: int, n: int) -> Codes:
    """Return the `n` codes, uint8 [..., n], that `pack` put into `packed`, uint8 [..., bytes]."""
    if bits == 8:
        return packed
    if bits == 4:
        chunks = [packed & 15, packed >> 4]
    elif bits == 2:
        chunks = [packed >> shift & 3 for shift in (0, 2, 4, 6)]
    else:
        planes = np.split(packed >> 3 & 0x11, 3, axis=-1)
        spread = planes[0] | planes[1] << 1 | planes[2] << 2
        chunks = [packed & 7, packed >> 4 & 7, spread & 7, spread >> 4]
    return np.concatenate(chunks, axis=-1)[..., :n]
