// Weights from the portable layout to the words that kernels read, and back.
//
// Sixteen rows at a time are unpacked to bytes, padded with the zero point, and gathered into the lanes' words. A tile
// of rows is written from its first word to its last, so a whole matrix streams through 16 * K bytes of memory.
#pragma once

#include <cstring>
#include <vector>

#include "portable_codes.cuh"
#include "segments.cuh"
#include "weight_codes.cuh"
#include "zero_points.cuh"

namespace planish {

// Returns the eight codes at `codes` as the nibbles of a word, the first lowest. Little-endian.
inline uint32_t gather_nibbles(const uint8_t* codes) {
    uint64_t x;
    std::memcpy(&x, codes, 8);
    x = (x | x >> 4) & 0x00FF00FF00FF00FFu;
    x = (x | x >> 8) & 0x0000FFFF0000FFFFu;
    return static_cast<uint32_t>(x | x >> 16);
}

// Writes the words of one tile of rows. `codes` is [16][stride], one code to a byte.
template <int BITS>
void pack_row_tile(const uint8_t* codes, int64_t stride, int64_t groups, uint32_t* words) {
    for (int64_t group = 0; group < groups; ++group, words += group_words(BITS)) {
        for (int tile = 0; tile < group_tiles(BITS); ++tile) {
            const uint8_t* first = codes + (group * group_tiles(BITS) + tile) * kTileChannels;
            for (int lane = 0; lane < kLanes; ++lane) {
                Nibbles nibbles;
                for (int i = 0; i < 4; ++i) {
                    nibbles.n[i] = gather_nibbles(first + nibble_row(lane, i) * stride + nibble_channel(lane, i));
                }
                uint32_t packed[BITS];
                pack_nibbles<BITS>(nibbles, packed);
                for (int w = 0; w < BITS; ++w) words[word_offset(BITS, tile, w, lane)] = packed[w];
            }
        }
    }
}

// Packs a matrix of `rows` x `channels` codes from the portable layout.
//
// `words` takes matrix_words(rows, channels, BITS) words, `row_sums` one sum of (code - zero point) for each of
// row_tiles_of(rows) * 16 rows; 0 for the rows of the padding.
template <int BITS>
void pack_matrix(const uint8_t* portable, int64_t rows, int64_t channels, uint32_t* words, int32_t* row_sums) {
    const int64_t groups = groups_of(channels, BITS), stride = padded_channels(channels, BITS);
    const int64_t row_bytes = portable_bytes(channels, BITS);
    constexpr uint8_t kZero = zero_point(BITS);
    std::vector<uint8_t> codes(static_cast<size_t>(kTileRows * stride), kZero);
    for (int64_t row_tile = 0; row_tile < row_tiles_of(rows); ++row_tile) {
        for (int r = 0; r < kTileRows; ++r) {
            const int64_t row = row_tile * kTileRows + r;
            uint8_t* line = codes.data() + r * stride;
            if (row < rows) {
                read_portable_row(portable + row * row_bytes, channels, BITS, line);
                std::memset(line + channels, kZero, static_cast<size_t>(stride - channels));
            } else {
                std::memset(line, kZero, static_cast<size_t>(stride));
            }
            int32_t sum = 0;
            for (int64_t k = 0; k < stride; ++k) sum += line[k];
            row_sums[row] = sum - static_cast<int32_t>(stride) * kZero;
        }
        pack_row_tile<BITS>(codes.data(), stride, groups, words + row_tile * groups * group_words(BITS));
    }
}

// Writes the code of every row and channel, [rows][channels], one to a byte: the inverse of pack_matrix.
template <int BITS>
void unpack_matrix(const uint32_t* words, int64_t rows, int64_t channels, uint8_t* codes) {
    const int64_t groups = groups_of(channels, BITS);
    for (int64_t row_tile = 0; row_tile < row_tiles_of(rows); ++row_tile) {
        for (int64_t group = 0; group < groups; ++group, words += group_words(BITS)) {
            for (int tile = 0; tile < group_tiles(BITS); ++tile) {
                const int64_t first = (group * group_tiles(BITS) + tile) * kTileChannels;
                for (int lane = 0; lane < kLanes; ++lane) {
                    uint32_t packed[BITS];
                    for (int w = 0; w < BITS; ++w) packed[w] = words[word_offset(BITS, tile, w, lane)];
                    const Nibbles nibbles = unpack_nibbles<BITS>(packed);
                    for (int i = 0; i < 4; ++i) {
                        const int64_t row = row_tile * kTileRows + nibble_row(lane, i);
                        const int64_t channel = first + nibble_channel(lane, i);
                        for (int m = 0; m < 8; ++m) {
                            if (row < rows && channel + m < channels) {
                                codes[row * channels + channel + m] = nibbles.n[i] >> 4 * m & 15;
                            }
                        }
                    }
                }
            }
        }
    }
}

}  // namespace planish
