// A low-bit linear for few tokens (decode): bound by how fast weights come in.
//
// Bytes: the weights once, rows * K * bits / 8; the codes of the tokens once per block, from L2. At 3 bits and one
// token that is 0.375 bytes per weight against 2 in float16.
//
// A block takes ROW_TILES tiles of rows and all of K; its warps share K. So there is no second kernel, no workspace and
// no atomic addition, and the sum of a row is a sum of int32, the same in any order: results do not depend on the grid.
// Each warp reads one contiguous stream, with the next group of words under way while it multiplies.
//
// A block has two phases with a barrier between them. Both are written for a block of either kind, see warp.cuh.
#pragma once

#include "linear.cuh"

namespace planish {

// Ints from one token to the next in the partial sums. The 4 put the eight tokens that a warp writes at once into
// different banks of shared memory.
template <int ROW_TILES>
constexpr int kTokenStride = kTileRows * ROW_TILES + 4;

// Ints of partial sums per segment and warp.
template <int ROW_TILES, int TOKEN_TILES>
constexpr int kWarpPartials = kTileTokens * TOKEN_TILES * kTokenStride<ROW_TILES>;

// Phase 1, a warp: partial sums over its share of K. `partials` is [segments][warps][tokens][kTokenStride].
template <int BITS, class Warp, int ROW_TILES, int TOKEN_TILES>
PLANISH_HD void sum_share_mma(const Linear& linear, int64_t block, int warp, int warps, int32_t* partials) {
    int64_t row_tiles[ROW_TILES];
    PLANISH_UNROLL
    for (int r = 0; r < ROW_TILES; ++r) {
        // The last block may have fewer tiles: it does its last one twice, and phase 2 takes the first.
        const int64_t tile = block * ROW_TILES + r, last = row_tiles_of(linear.rows) - 1;
        row_tiles[r] = tile < last ? tile : last;
    }
    const auto segment = [&](auto bits, const WeightSegment& weights, int64_t channel, int index) {
        constexpr int kBits = decltype(bits)::value;
        typename Warp::template PerLane<FragmentC> c[ROW_TILES][TOKEN_TILES] = {};
        multiply_mma<kBits, Warp, ROW_TILES, TOKEN_TILES>(
            c, weights.words, row_tiles, weights.groups, share_begin(weights.groups, warps, warp),
            share_begin(weights.groups, warps, warp + 1), linear.tokens, channel);
        int32_t* mine = partials + (index * warps + warp) * kWarpPartials<ROW_TILES, TOKEN_TILES>;
        PLANISH_UNROLL
        for (int r = 0; r < ROW_TILES; ++r) {
            PLANISH_UNROLL
            for (int j = 0; j < TOKEN_TILES; ++j) {
                Warp::each([&](int lane) {
                    PLANISH_UNROLL
                    for (int reg = 0; reg < 4; ++reg) {
                        const int token = j * kTileTokens + c_token(lane, reg);
                        mine[token * kTokenStride<ROW_TILES> + r * kTileRows + c_row(lane, reg)] =
                            c[r][j][lane].reg[reg];
                    }
                });
            }
        }
    };
    if (linear.high.groups > 0) segment(Bits<kHighBits>{}, linear.high, 0, 0);
    segment(Bits<BITS>{}, linear.low, low_channel(linear), segments_of(linear) - 1);
}

// The same by dot products, for TOKENS tokens: `partials` is [segments][warps][lane % 4][TOKENS][16].
template <int BITS, class Warp, int TOKENS>
PLANISH_HD void sum_share_dot(const Linear& linear, int64_t block, int warp, int warps, int32_t* partials) {
    const auto segment = [&](auto bits, const WeightSegment& weights, int64_t channel, int index) {
        constexpr int kBits = decltype(bits)::value;
        typename Warp::template PerLane<DotSums<TOKENS>> sums = {};
        multiply_dot<kBits, Warp, TOKENS>(sums, weights.words, block, weights.groups,
                                          share_begin(weights.groups, warps, warp),
                                          share_begin(weights.groups, warps, warp + 1), linear.tokens, channel);
        int32_t* mine = partials + (index * warps + warp) * 4 * TOKENS * kTileRows;
        Warp::each([&](int lane) {
            PLANISH_UNROLL
            for (int half = 0; half < 2; ++half) {
                PLANISH_UNROLL
                for (int token = 0; token < TOKENS; ++token) {
                    mine[(lane % 4 * TOKENS + token) * kTileRows + 8 * half + lane / 4] = sums[lane].row[half][token];
                }
            }
        });
    };
    if (linear.high.groups > 0) segment(Bits<kHighBits>{}, linear.high, 0, 0);
    segment(Bits<BITS>{}, linear.low, low_channel(linear), segments_of(linear) - 1);
}

// Phase 2, a thread: adds up the partial sums of its outputs and stores them. A segment has `parts` partial sums,
// `part_size` ints apart; the tokens of one are TOKEN_STRIDE ints apart.
template <int ROWS, int TOKEN_STRIDE>
PLANISH_HD void finish_outputs(const Linear& linear, int low_bits, int64_t first_row, int thread, int threads,
                               const int32_t* partials, int parts, int part_size) {
    store_block<ROWS>(linear, 0, linear.tokens.count, first_row, thread, threads, [&](int token, int row) {
        float y = 0;
        for (int segment = 0; segment < segments_of(linear); ++segment) {
            const int32_t* part = partials + int64_t{segment} * parts * part_size + token * TOKEN_STRIDE + row;
            int32_t products = 0;
            for (int p = 0; p < parts; ++p) products += part[p * part_size];
            y += segment_output(linear, segment, low_bits, token, first_row + row, products);
        }
        return y;
    });
}

}  // namespace planish
