// How a weight matrix is cut into tiles, and where its words lie.
//
// The input channels of a linear form one or two segments. High-impact channels, a multiple of 64 of them, come first
// and have 4 bits; all others follow with fewer. Each segment is a matrix of its own: own bits, own scales, own words.
//
// Rows are padded to a multiple of 16 and channels to a multiple of a group, both with the zero point, which adds
// nothing to any product. A group is the shortest run of tiles whose words fill whole 128-bit loads:
//
//     bits             2    3    4
//     words per tile   2    3    4      per lane
//     tiles to a group 2    4    1
//     loads to a group 1    3    1      of 128 bits, per lane
//     channels        128  256   64
//
// The words of a group lie as [load][lane][4], so that every load of a warp is 512 consecutive bytes; groups of one row
// of tiles follow each other, so that a warp that walks along K reads one stream.
#pragma once

#include "fragments.cuh"

namespace planish {

PLANISH_HD constexpr int group_tiles(int bits) { return bits == 4 ? 1 : bits == 3 ? 4 : 2; }

PLANISH_HD constexpr int group_loads(int bits) { return group_tiles(bits) * bits / 4; }

PLANISH_HD constexpr int group_channels(int bits) { return group_tiles(bits) * kTileChannels; }

PLANISH_HD constexpr int64_t group_words(int bits) { return int64_t{group_loads(bits)} * kLanes * 4; }

// Groups along K that `channels` input channels take.
PLANISH_HD constexpr int64_t groups_of(int64_t channels, int bits) {
    return ceil_div<int64_t>(channels, group_channels(bits));
}

// Input channels with padding.
PLANISH_HD constexpr int64_t padded_channels(int64_t channels, int bits) {
    return groups_of(channels, bits) * group_channels(bits);
}

PLANISH_HD constexpr int64_t row_tiles_of(int64_t rows) { return ceil_div<int64_t>(rows, kTileRows); }

// Words of a whole matrix.
PLANISH_HD constexpr int64_t matrix_words(int64_t rows, int64_t channels, int bits) {
    return row_tiles_of(rows) * groups_of(channels, bits) * group_words(bits);
}

// Where word `word` (below `bits`) of tile `tile` (within its group) of a lane lies, from the first word of the group.
PLANISH_HD constexpr int word_offset(int bits, int tile, int word, int lane) {
    const int flat = tile * bits + word;
    return (flat / 4 * kLanes + lane) * 4 + flat % 4;
}

// The first of `total` groups that worker `index` of `workers` does; it ends where worker index + 1 begins. In 32 bits,
// because a GPU divides 64-bit numbers by a subroutine.
PLANISH_HD constexpr int share_begin(int64_t total, int workers, int index) {
    return static_cast<int>(total) * index / workers;
}

}  // namespace planish
