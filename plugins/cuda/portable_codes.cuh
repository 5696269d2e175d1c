// Codes in the portable layout of plugins/packing.py, read one row at a time.
//
// The row of n codes, padded to a multiple of 8, is cut into chunks, and each byte takes one code from every chunk;
// packing.py has the picture. The loops below have no branches and no dependencies, so that a compiler vectorises them.
#pragma once

#include <cstddef>

#include "portable.cuh"

namespace planish {

// Bytes of a packed row of `n` codes.
inline constexpr int64_t portable_bytes(int64_t n, int bits) { return ceil_div<int64_t>(n, 8) * bits; }

// Writes the codes that `packed` holds to `codes`, ceil(n / 8) * 8 of them: the padding too.
inline void read_portable_row(const uint8_t* __restrict__ packed, int64_t n, int bits, uint8_t* __restrict__ codes) {
    const int64_t eighth = ceil_div<int64_t>(n, 8);
    if (bits == 4) {
        for (int64_t i = 0; i < 4 * eighth; ++i) {
            codes[i] = packed[i] & 15;
            codes[4 * eighth + i] = packed[i] >> 4;
        }
    } else if (bits == 2) {
        for (int64_t i = 0; i < 2 * eighth; ++i) {
            for (int chunk = 0; chunk < 4; ++chunk) codes[chunk * 2 * eighth + i] = packed[i] >> 2 * chunk & 3;
        }
    } else {
        for (int64_t i = 0; i < eighth; ++i) {
            const uint8_t planes[3] = {packed[i], packed[eighth + i], packed[2 * eighth + i]};
            uint8_t spread = 0;
            for (int j = 0; j < 3; ++j) {
                codes[j * eighth + i] = planes[j] & 7;
                codes[(3 + j) * eighth + i] = planes[j] >> 4 & 7;
                spread |= (planes[j] >> 3 & 0x11) << j;
            }
            codes[6 * eighth + i] = spread & 7;
            codes[7 * eighth + i] = spread >> 4;
        }
    }
}

}  // namespace planish
