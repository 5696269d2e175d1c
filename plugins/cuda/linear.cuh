// The arguments of a low-bit linear, and the last step of its arithmetic. The same for every kernel that computes one.
#pragma once

#include "outputs.cuh"
#include "product.cuh"
#include "zero_points.cuh"

namespace planish {

// High-impact channels have this many bits.
constexpr int kHighBits = 4;

// A number of bits as a type, so that a lambda can take it as a constant.
template <int BITS>
struct Bits {
    static constexpr int value = BITS;
};

// The weights of one segment.
struct WeightSegment {
    const uint32_t* words;    // matrix_words(rows, channels, bits)
    const float* scales;      // [rows]
    const int32_t* row_sums;  // [row_tiles_of(rows) * 16], of code - zero point
    int64_t groups;           // along K; 0 where the linear has no such segment
};

// y = sum over segments of token scale * weight scale * centred products.
struct Linear : Outputs {
    WeightSegment high;          // kHighBits, the first channels
    WeightSegment low;           // all other channels
    Tokens tokens;               // the codes of both segments, one behind the other
    const float* token_scales;   // [tokens][segments]
    const TokenSum* token_sums;  // [tokens][segments]
};

PLANISH_HD int segments_of(const Linear& linear) { return linear.high.groups > 0 ? 2 : 1; }

// Where the low segment begins in the stored codes of a token.
PLANISH_HD int64_t low_channel(const Linear& linear) { return linear.high.groups * group_channels(kHighBits); }

// What a segment (0 is the first that the linear has) adds to an output, from its sum of products of codes.
PLANISH_HD float segment_output(const Linear& linear, int segment, int low_bits, int64_t token, int64_t row,
                                int32_t products) {
    const int segments = segments_of(linear);
    const bool low = segment == segments - 1;
    const WeightSegment& weights = low ? linear.low : linear.high;
    const int64_t at = token * segments + segment;
    const int32_t product =
        centred(products, linear.token_sums[at], zero_point(low ? low_bits : kHighBits), weights.row_sums[row]);
    return scaled(product, weights.scales[row], linear.token_scales[at]);
}

}  // namespace planish
