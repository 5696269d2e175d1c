// A linear of float16 activations and low-bit weights (W2A16, W3A16, W4A16): for few tokens bound by how fast weights
// come in, like small_linear.cuh, whose layout of weights and division of work it has.
//
// A nibble becomes a float16 without a conversion: or-ed into the fraction of 1024 it is 1024 + code, and one
// subtraction makes code - zero of it, exactly. A mask takes nibbles i and i + 4 of a register at once, into the two
// halves of a word; where i is odd they are worth 16 codes, and a multiply-add by 1/16 in place of the subtraction
// makes up for it, so that there is one shift to a register instead of three. Instructions for 32 weights at 3 bits: 9
// to nibbles, 4 shifts, 16 to bias, 16 to centre: the first 29 on the integer pipe, of which an H100 takes nine tenths
// of a cycle's worth per weight that its memory gives.
//
// So the channel of element s of pair p of a lane's nibble register is 2 p + s and, in the high half, four behind, and
// activations are brought into that order by two byte permutations for every four of them.
//
// Sums are float32, added in an order that only the width and the number of warps decide.
#pragma once

#include "outputs.cuh"
#include "product.cuh"
#include "zero_points.cuh"

namespace planish {

// float16 activations, as bits: token i begins at values + i * stride; `channels` and `stride` are multiples of 8, and
// values of 16 bytes.
struct HalfTokens {
    const uint16_t* values;
    int64_t stride;
    int channels;
    int count;
};

// y = weight scale * sum of x (w - zero).
struct WeightOnlyLinear : Outputs {
    const uint32_t* words;  // matrix_words(rows, channels, bits)
    const float* scales;    // [rows]
    int64_t groups;
    HalfTokens tokens;
};

// Floats from one token to the next in the partial sums; see small_linear.cuh.
template <int ROW_TILES>
constexpr int kHalfTokenStride = kTileRows * ROW_TILES + 4;

template <int ROW_TILES, int TOKEN_TILES>
constexpr int kHalfPartials = kTileTokens * TOKEN_TILES * kHalfTokenStride<ROW_TILES>;

// A lane's codes of nibble register n as float16: word i holds the channels i and i + 4, code - zero.
struct HalfCodes {
    uint32_t word[4];
};

template <int BITS>
PLANISH_HD HalfCodes to_halves(uint32_t n) {
    constexpr uint32_t kEven = 0x000F000Fu, kOdd = 0x00F000F0u, kBias = 0x64006400u;
    constexpr int kZero = zero_point(BITS);
    const uint32_t upper = n >> 8;
    return {{centred_halves<1>((n & kEven) | kBias, kZero), centred_halves<16>((n & kOdd) | kBias, kZero),
             centred_halves<1>((upper & kEven) | kBias, kZero), centred_halves<16>((upper & kOdd) | kBias, kZero)}};
}

// A lane's eight activations that meet n[2 h] and n[2 h + 1], zeros behind the last token and the last channel.
PLANISH_HD Quad load_halves(const HalfTokens& tokens, int64_t token, int64_t channel, int lane, int h) {
    const int64_t at = channel + 16 * (lane % 4) + 8 * h;
    if (token >= tokens.count || at >= tokens.channels) return {{0, 0, 0, 0}};
    return *reinterpret_cast<const Quad*>(tokens.values + token * tokens.stride + at);
}

// Adds to `c` the products of one group, whose channels begin at `channel`, with the tokens from `first_token` on.
template <int BITS, class Warp, int ROW_TILES, int TOKEN_TILES>
PLANISH_HD void multiply_group_f16(typename Warp::template PerLane<FragmentF> (&c)[ROW_TILES][TOKEN_TILES],
                                   const typename Warp::template PerLane<GroupWords<BITS>> (&words)[ROW_TILES],
                                   const HalfTokens& tokens, int64_t first_token, int64_t channel) {
    PLANISH_UNROLL
    for (int tile = 0; tile < group_tiles(BITS); ++tile) {
        PLANISH_UNROLL
        for (int h = 0; h < 2; ++h) {
            // MMA p of the two that these eight channels of a lane take.
            typename Warp::template PerLane<FragmentA> a[ROW_TILES][2];
            PLANISH_UNROLL
            for (int r = 0; r < ROW_TILES; ++r) {
                Warp::each([&](int lane) {
                    const Nibbles nibbles = unpack_nibbles<BITS>(words[r][lane].word + tile * BITS);
                    PLANISH_UNROLL
                    for (int half = 0; half < 2; ++half) {
                        const HalfCodes codes = to_halves<BITS>(nibbles.n[2 * h + half]);
                        PLANISH_UNROLL
                        for (int i = 0; i < 4; ++i) a[r][i / 2][lane].reg[i % 2 * 2 + half] = codes.word[i];
                    }
                });
            }
            PLANISH_UNROLL
            for (int j = 0; j < TOKEN_TILES; ++j) {
                typename Warp::template PerLane<FragmentB> b[2];
                Warp::each([&](int lane) {
                    const Quad x = load_halves(tokens, first_token + j * kTileTokens + lane / 4,
                                               channel + tile * kTileChannels, lane, h);
                    PLANISH_UNROLL
                    for (int p = 0; p < 2; ++p) {
                        b[p][lane] = {{low_halves(x.word[p], x.word[p + 2]), high_halves(x.word[p], x.word[p + 2])}};
                    }
                });
                PLANISH_UNROLL
                for (int r = 0; r < ROW_TILES; ++r) {
                    Warp::mma_f16(c[r][j], a[r][0], b[0]);
                    Warp::mma_f16(c[r][j], a[r][1], b[1]);
                }
            }
        }
    }
}

// Phase 1, a warp: partial sums over its share of K; `partials` is [warps][tokens][kHalfTokenStride].
template <int BITS, class Warp, int ROW_TILES, int TOKEN_TILES>
PLANISH_HD void sum_share_f16(const WeightOnlyLinear& linear, int64_t block, int64_t first_token, int warp, int warps,
                              float* partials) {
    typename Warp::template PerLane<FragmentF> c[ROW_TILES][TOKEN_TILES] = {};
    typename Warp::template PerLane<GroupWords<BITS>> words[ROW_TILES], ahead[ROW_TILES];
    int64_t row_tiles[ROW_TILES];
    PLANISH_UNROLL
    for (int r = 0; r < ROW_TILES; ++r) {
        const int64_t tile = block * ROW_TILES + r, last = row_tiles_of(linear.rows) - 1;
        row_tiles[r] = tile < last ? tile : last;
    }
    const int begin = share_begin(linear.groups, warps, warp), end = share_begin(linear.groups, warps, warp + 1);
    if (begin < end) load_groups<BITS, Warp>(ahead, linear.words, row_tiles, linear.groups, begin);
    for (int group = begin; group < end; ++group) {
        PLANISH_UNROLL
        for (int r = 0; r < ROW_TILES; ++r) words[r] = ahead[r];
        if (group + 1 < end) load_groups<BITS, Warp>(ahead, linear.words, row_tiles, linear.groups, group + 1);
        multiply_group_f16<BITS, Warp>(c, words, linear.tokens, first_token, int64_t{group} * group_channels(BITS));
    }
    float* mine = partials + warp * kHalfPartials<ROW_TILES, TOKEN_TILES>;
    PLANISH_UNROLL
    for (int i = 0; i < ROW_TILES * TOKEN_TILES; ++i) {
        Warp::each([&](int lane) {
            PLANISH_UNROLL
            for (int reg = 0; reg < 4; ++reg) {
                const int r = i / TOKEN_TILES, j = i % TOKEN_TILES;
                const int token = j * kTileTokens + c_token(lane, reg);
                mine[token * kHalfTokenStride<ROW_TILES> + r * kTileRows + c_row(lane, reg)] = c[r][j][lane].reg[reg];
            }
        });
    }
}

// Phase 2, a thread: adds up the partial sums of its outputs and stores them.
template <int ROW_TILES, int TOKEN_TILES>
PLANISH_HD void finish_f16(const WeightOnlyLinear& linear, int64_t block, int64_t first_token, int thread, int threads,
                           const float* partials, int warps) {
    constexpr int kRows = ROW_TILES * kTileRows, kTokens = TOKEN_TILES * kTileTokens;
    const int64_t first_row = block * kRows, left = linear.tokens.count - first_token;
    store_block<kRows>(linear, first_token, static_cast<int>(left < kTokens ? left : kTokens), first_row, thread,
                       threads, [&](int token, int row) {
                           const float* part = partials + token * kHalfTokenStride<ROW_TILES> + row;
                           float sum = 0;
                           for (int w = 0; w < warps; ++w) sum += part[w * kHalfPartials<ROW_TILES, TOKEN_TILES>];
                           return sum * linear.scales[first_row + row];
                       });
}

}  // namespace planish
