"""Weights go into kernel layout and come back; places in it are those that segments.cuh and fragments.cuh describe."""

import numpy as np
import pytest

from planish.plugins.kernel_layout import KERNEL_BITS, pack_for_kernel, padded_channels, unpack_from_kernel
from planish.plugins.packing import pack, packed_size

SHAPES = [(1, 1), (15, 63), (16, 64), (17, 65), (48, 255), (33, 257), (576, 576), (192, 1536), (32, 4096), (16, 11008),
          (16, 14336)]  # fmt: skip
GROUP = {2: 128, 3: 256, 4: 64}


def random_codes(rows: int, channels: int, bits: int) -> np.ndarray:
    return np.random.default_rng(rows * channels).integers(0, 1 << bits, (rows, channels), np.uint8)


def words_by_the_text(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack by loops over rows, tiles, lanes and nibbles, as the comments of the headers say it."""
    rows, channels = codes.shape
    groups = -(-channels // GROUP[bits])
    padded = np.full((-(-rows // 16) * 16, groups * GROUP[bits]), 1 << bits - 1, np.uint8)
    padded[:rows, :channels] = codes
    tiles = GROUP[bits] // 64
    words = np.zeros((len(padded) // 16, groups, tiles * bits // 4, 32, 4), np.uint32)
    for row_tile, group, tile, lane in np.ndindex(len(words), groups, tiles, 32):
        g, t = divmod(lane, 4)
        n = []
        for h, half in np.ndindex(2, 2):
            start = (group * tiles + tile) * 64 + 16 * t + 8 * h
            nibbles = padded[row_tile * 16 + g + 8 * half, start : start + 8]
            n.append(sum(int(code) << 4 * m for m, code in enumerate(nibbles)))
        if bits == 3:
            for i in range(3):
                n[i] |= sum((n[3] >> 4 * m + i & 1) << 4 * m + 3 for m in range(8))
        elif bits == 2:
            n = [n[0] | n[1] << 2, n[2] | n[3] << 2]
        for w in range(bits):
            flat = tile * bits + w
            words[row_tile, group, flat // 4, lane, flat % 4] = n[w]
    return words.reshape(len(words), -1)


@pytest.mark.parametrize("bits", KERNEL_BITS)
@pytest.mark.parametrize(("rows", "channels"), SHAPES)
def test_codes_come_back(rows: int, channels: int, bits: int) -> None:
    codes = random_codes(rows, channels, bits)
    weight = pack_for_kernel(pack(codes, bits), channels, bits)
    np.testing.assert_array_equal(unpack_from_kernel(weight), codes)
    sums = codes.sum(1, dtype=np.int64) - channels * (1 << bits - 1)
    np.testing.assert_array_equal(weight.row_sums, np.pad(sums, (0, -rows % 16)))


@pytest.mark.parametrize("bits", KERNEL_BITS)
@pytest.mark.parametrize(("rows", "channels"), [(1, 1), (17, 65), (33, 300), (16, 576)])
def test_every_code_is_where_the_headers_say(rows: int, channels: int, bits: int) -> None:
    codes = random_codes(rows, channels, bits)
    words = pack_for_kernel(pack(codes, bits), channels, bits).words
    np.testing.assert_array_equal(words, words_by_the_text(codes, bits))


@pytest.mark.parametrize("bits", KERNEL_BITS)
def test_codes_take_exactly_their_bits(bits: int) -> None:
    for channels in (4096, 11008, 14336):
        weight = pack_for_kernel(np.zeros((32, packed_size(channels, bits)), np.uint8), channels, bits)
        assert weight.words.nbytes * 8 == 32 * channels * bits
        assert padded_channels(channels, bits) == channels


def test_padding() -> None:
    assert [padded_channels(576, bits) for bits in KERNEL_BITS] == [640, 768, 576]
    assert [padded_channels(1, bits) for bits in KERNEL_BITS] == [128, 256, 64]


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_no_such_width(bits: int) -> None:
    with pytest.raises(ValueError, match=f"{bits}-bit weights have no kernel layout"):
        pack_for_kernel(np.zeros((16, 64), np.uint8), 64, bits)


@pytest.mark.parametrize("packed", [np.zeros((4, 23), np.uint8), np.zeros(24, np.uint8), np.zeros((4, 24), np.int8)])
def test_shapes_that_do_not_fit(packed: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"64 packed 3-bit codes to a row are uint8 \[rows, 24\]"):
        pack_for_kernel(packed, 64, 3)


def test_slices_of_a_matrix_are_taken_as_they_are_read() -> None:
    codes = random_codes(40, 128, 3)
    packed = pack(codes, 3)
    np.testing.assert_array_equal(unpack_from_kernel(pack_for_kernel(packed[::2], 128, 3)), codes[::2])
