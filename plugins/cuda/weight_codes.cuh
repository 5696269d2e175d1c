// The words that hold a lane's 32 weight codes of one tile, at 2, 3 and 4 bits.
//
// A tile is 16 output channels by 64 input channels, and each of the 32 lanes of a warp owns 32 of its codes: four
// nibble registers n[0..3] of eight 4-bit fields (fragments.cuh says which code is where). In memory a lane has as
// many words as a code has bits, so codes take exactly their bits:
//
//     4 bits   w[i] = n[i]
//     3 bits   n[3] is spread over the spare bit of every nibble of the others: w[i] = n[i] | bit i of n[3] << 3
//     2 bits   two registers share a word: w[0] = n[0] | n[1] << 2, w[1] = n[2] | n[3] << 2
//
// Instructions to nibbles per 32 codes: 0 at 4 bits, 9 at 3 bits (3 + 3 LOP3, 3 SHF), 6 at 2 bits. To bytes: 12 more,
// less the masks that the compiler merges.
#pragma once

#include "portable.cuh"

namespace planish {

// A lane's 32 codes of a tile, one to a nibble: the operand of a 4-bit MMA as it is.
struct Nibbles {
    uint32_t n[4];
};

// The same codes one to a byte: o[2 i] holds the even nibbles of n[i], o[2 i + 1] the odd ones.
struct Bytes {
    uint32_t o[8];
};

// Returns the nibbles that the BITS words at `w` hold.
template <int BITS>
PLANISH_HD Nibbles unpack_nibbles(const uint32_t* w) {
    static_assert(BITS == 2 || BITS == 3 || BITS == 4, "weights have 2, 3 or 4 bits");
    if constexpr (BITS == 4) {
        return {{w[0], w[1], w[2], w[3]}};
    } else if constexpr (BITS == 3) {
        return {{w[0] & 0x77777777u, w[1] & 0x77777777u, w[2] & 0x77777777u,
                 (w[0] >> 3 & 0x11111111u) | (w[1] >> 2 & 0x22222222u) | (w[2] >> 1 & 0x44444444u)}};
    } else {
        return {{w[0] & 0x33333333u, w[0] >> 2 & 0x33333333u, w[1] & 0x33333333u, w[1] >> 2 & 0x33333333u}};
    }
}

// Writes the BITS words that hold `nibbles`; every code must fit in BITS bits.
template <int BITS>
PLANISH_HD void pack_nibbles(const Nibbles& nibbles, uint32_t* w) {
    static_assert(BITS == 2 || BITS == 3 || BITS == 4, "weights have 2, 3 or 4 bits");
    const uint32_t* n = nibbles.n;
    if constexpr (BITS == 4) {
        for (int i = 0; i < 4; ++i) w[i] = n[i];
    } else if constexpr (BITS == 3) {
        for (int i = 0; i < 3; ++i) w[i] = n[i] | (n[3] >> i & 0x11111111u) << 3;
    } else {
        for (int i = 0; i < 2; ++i) w[i] = n[2 * i] | n[2 * i + 1] << 2;
    }
}

PLANISH_HD Bytes to_bytes(const Nibbles& nibbles) {
    Bytes bytes;
    PLANISH_UNROLL
    for (int i = 0; i < 4; ++i) {
        bytes.o[2 * i] = nibbles.n[i] & 0x0F0F0F0Fu;
        bytes.o[2 * i + 1] = nibbles.n[i] >> 4 & 0x0F0F0F0Fu;
    }
    return bytes;
}

}  // namespace planish
