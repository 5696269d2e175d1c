"""Packing loses nothing, takes the bits it says, and lays bytes out as documented."""

import numpy as np
import pytest

from planish.plugins.packing import PACKED_BITS, pack, packed_size, unpack

LENGTHS = [1, 2, 7, 8, 9, 15, 16, 63, 64, 100, 576]


def random_codes(shape: tuple[int, ...], bits: int) -> np.ndarray:
    return np.random.default_rng(bits).integers(0, 1 << bits, shape, np.uint8)


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("n", LENGTHS)
def test_unpack_undoes_pack(bits: int, n: int) -> None:
    codes = random_codes((3, 5, n), bits)
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (3, 5, packed_size(n, bits))
    np.testing.assert_array_equal(unpack(packed, bits, n), codes)


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_every_code_survives_in_every_place(bits: int) -> None:
    """One code at a time among zeros, so that no bit hides behind another."""
    codes = np.zeros((16, 1 << bits, 16), np.uint8)
    for place in range(16):
        codes[place, :, place] = np.arange(1 << bits)
    np.testing.assert_array_equal(unpack(pack(codes, bits), bits, 16), codes)
    inverted = (1 << bits) - 1 - codes
    np.testing.assert_array_equal(unpack(pack(inverted, bits), bits, 16), inverted)


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_sizes(bits: int) -> None:
    for n in (8, 64, 576, 1536):
        assert packed_size(n, bits) * 8 == n * bits
    assert packed_size(9, bits) == (9 if bits == 8 else 2 * bits)
    assert packed_size(0, bits) == 0


GOLDEN = {
    2: ([0, 1, 2, 3, 3, 0, 1, 2], [0b01_11_10_00, 0b10_00_11_01]),
    # c0 = 1, c3 = 4, c6 = 5 = 0b101, c7 = 3 = 0b011: bit j of c6 and c7 fills the spare bits of plane j.
    3: ([1, 2, 3, 4, 5, 6, 5, 3], [0b1_100_1_001, 0b1_101_0_010, 0b0_110_1_011]),
    4: ([0, 1, 2, 3, 12, 13, 14, 15], [0xC0, 0xD1, 0xE2, 0xF3]),
    8: ([0, 1, 127, 128, 129, 254, 255, 7], [0, 1, 127, 128, 129, 254, 255, 7]),
}


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_layout(bits: int) -> None:
    codes, expected = GOLDEN[bits]
    assert pack(np.array(codes, np.uint8), bits).tolist() == expected


def test_layout_of_two_chunk_elements() -> None:
    """With 16 codes each chunk holds two neighbours, and neighbours go to neighbouring bytes."""
    codes = np.arange(16, dtype=np.uint8)
    assert pack(codes, 4).tolist() == [i | (i + 8) << 4 for i in range(8)]


def test_padding_is_zero() -> None:
    assert pack(np.full(9, 15, np.uint8), 4).tolist() == [0xFF, *[0x0F] * 7]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_code_too_large(bits: int) -> None:
    codes = np.zeros(8, np.uint8)
    codes[3] = 1 << bits
    with pytest.raises(ValueError, match=f"code {1 << bits} does not fit in {bits} bits"):
        pack(codes, bits)


@pytest.mark.parametrize("bits", [1, 5, 7, 16])
def test_no_such_width(bits: int) -> None:
    with pytest.raises(ValueError, match=f"{bits}-bit codes have no packed form"):
        pack(np.zeros(8, np.uint8), bits)


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_no_rows(bits: int) -> None:
    packed = pack(np.zeros((0, 64), np.uint8), bits)
    assert packed.shape == (0, 8 * bits)
    assert unpack(packed, bits, 64).shape == (0, 64)
