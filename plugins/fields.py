"""Unpacking as a linear map: packed bytes, multiplied in uint8, are linear combinations of the codes.

Multiplying a byte by 2^m, modulo 256, drops its m highest bits. A few such products of a packed byte (its *fields*)
form a triangular linear system in the codes it holds, so

    codes = concatenate([byte * m (mod 256) for m in multipliers]) @ field_matrix

A product of floats with codes can then be taken with the fields instead, the small matrix going to the other side:
q . codes = (field_matrix q) . fields. On CPUs whose runtime has no vectorised bit shifts this reads a packed cache
several times faster than unpacking it.
"""

import numpy as np
import numpy.typing as npt

from planish.plugins.packing import packed_size

__all__ = ["FIELD_MULTIPLIERS", "field_matrix"]

#: bits -> the multipliers whose uint8 products with a packed byte are its fields.
FIELD_MULTIPLIERS = {2: (64, 16, 4, 1), 3: (32, 16, 2, 1), 4: (16, 1), 8: (1,)}

#: bits -> lowest bit position of each part of a packed byte; see packing.pack. The parts of a 3-bit byte are a code,
#: one bit of the spread code, a code, and one bit of the other spread code.
_POSITIONS = {2: (0, 2, 4, 6), 3: (0, 3, 4, 7), 4: (0, 4), 8: (0,)}


def field_matrix(bits: int, n: int) -> npt.NDArray[np.float64]:
    """Return the matrix, float64 [len(multipliers) * bytes, n], that takes the fields of packed codes to the codes.

    Its entries are sums of a few powers of two, exact in float32. `n` must be a multiple of 8.
    """
    size = packed_size(n, bits)
    multipliers, positions = FIELD_MULTIPLIERS[bits], _POSITIONS[bits]
    # A part at position p shows up in the field of multiplier m with weight m * 2^p unless it is shifted out whole.
    weights = np.array([[float(m << p) if m << p < 256 else 0.0 for p in positions] for m in multipliers])
    parts = np.kron(np.linalg.inv(weights).T, np.eye(size)).astype(
        np.float64
    )  # fields [.., f * size] -> parts [.., p * size]
    if bits != 3:
        return parts
    low, bit_low, high, bit_high = np.split(parts, 4, axis=1)
    collect = np.kron(np.array([[1.0], [2.0], [4.0]]), np.eye(size // 3))
    return np.concatenate([low, high, bit_low @ collect, bit_high @ collect], axis=1)
