// What one warp does with its weights: load words, unpack, multiply with the codes of the tokens.
//
// Two ways to multiply, over the same words and the same activation codes:
//
//     MMA   any number of tokens in tiles of eight; two m16n8k32 to a tile of weights and a tile of tokens
//     dot   one or two tokens; eight 4-byte dot products per lane, tile and token, no idle columns
//
// Instructions per lane for 32 weights at 3 bits: 0.75 loads, 18 to unpack, and 2 MMAs or 8 dot products per token.
// The next group of words is asked for before the present one is used, so that a warp always has loads under way.
#pragma once

#include "segments.cuh"
#include "warp.cuh"
#include "weight_codes.cuh"

namespace planish {

// The activation codes of all tokens: token i begins at codes + i * stride, in the order of fragments.cuh, one to a
// byte. `codes` and `stride` are multiples of 16.
struct Tokens {
    const uint8_t* codes;
    int64_t stride;
    int count;
};

// A lane's words of one group.
template <int BITS>
struct GroupWords {
    uint32_t word[group_loads(BITS) * 4];
};

// Weights are read once per product and would only push the activations out of L1.
PLANISH_HD Quad load_weights(const uint32_t* address) {
#if defined(__CUDA_ARCH__)
    Quad quad;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(quad.word[0]), "=r"(quad.word[1]), "=r"(quad.word[2]), "=r"(quad.word[3])
                 : "l"(address));
    return quad;
#else
    return *reinterpret_cast<const Quad*>(address);
#endif
}

template <int BITS>
PLANISH_HD void load_group(const uint32_t* group, int lane, GroupWords<BITS>& words) {
    PLANISH_UNROLL
    for (int load = 0; load < group_loads(BITS); ++load) {
        const Quad quad = load_weights(group + (load * kLanes + lane) * 4);
        PLANISH_UNROLL
        for (int i = 0; i < 4; ++i) words.word[load * 4 + i] = quad.word[i];
    }
}

// A lane's 16 codes of one token in the tile that begins at channel `channel`; zeros behind the last token, where the
// sums are thrown away.
PLANISH_HD Quad load_codes(const Tokens& tokens, int token, int64_t channel, int lane) {
    if (token >= tokens.count) return {{0, 0, 0, 0}};
    return *reinterpret_cast<const Quad*>(tokens.codes + token * tokens.stride + channel + 16 * (lane % 4));
}

// Returns sum + the four products of a byte of `weights` with the byte of `codes` beside it.
PLANISH_HD int32_t dot4(uint32_t weights, uint32_t codes, int32_t sum) {
#if defined(__CUDA_ARCH__)
    return static_cast<int32_t>(__dp4a(weights, codes, static_cast<uint32_t>(sum)));
#else
    for (int i = 0; i < 32; i += 8) sum += static_cast<int32_t>((weights >> i & 255) * (codes >> i & 255));
    return sum;
#endif
}

// Adds to `c` the products of one group: its words for ROW_TILES tiles of rows, TOKEN_TILES tiles of tokens.
//
// `codes_of(token_tile, tile, lane)` gives a lane's 16 codes of its token in a tile of the group, from wherever they
// are.
template <int BITS, class Warp, int ROW_TILES, int TOKEN_TILES, class CodesOf>
PLANISH_HD void multiply_group(typename Warp::template PerLane<FragmentC> (&c)[ROW_TILES][TOKEN_TILES],
                               const typename Warp::template PerLane<GroupWords<BITS>> (&words)[ROW_TILES],
                               CodesOf codes_of) {
    PLANISH_UNROLL
    for (int tile = 0; tile < group_tiles(BITS); ++tile) {
        typename Warp::template PerLane<FragmentA> a[ROW_TILES][2];
        PLANISH_UNROLL
        for (int r = 0; r < ROW_TILES; ++r) {
            Warp::each([&](int lane) {
                const Bytes bytes = to_bytes(unpack_nibbles<BITS>(words[r][lane].word + tile * BITS));
                PLANISH_UNROLL
                for (int reg = 0; reg < 8; ++reg) {
                    a[r][reg / 4][lane].reg[reg % 4] = bytes.o[u8_register(reg / 4, reg % 4)];
                }
            });
        }
        PLANISH_UNROLL
        for (int j = 0; j < TOKEN_TILES; ++j) {
            typename Warp::template PerLane<FragmentB> b[2];
            Warp::each([&](int lane) {
                const Quad codes = codes_of(j, tile, lane);
                b[0][lane] = {{codes.word[0], codes.word[1]}};
                b[1][lane] = {{codes.word[2], codes.word[3]}};
            });
            PLANISH_UNROLL
            for (int r = 0; r < ROW_TILES; ++r) {
                Warp::mma_u8(c[r][j], a[r][0], b[0]);
                Warp::mma_u8(c[r][j], a[r][1], b[1]);
            }
        }
    }
}

// The same by 4-bit MMAs: `codes_of` gives the fragment of a lane's token. Nibbles need no bytes made of them.
template <int BITS, class Warp, int ROW_TILES, int TOKEN_TILES, class CodesOf>
PLANISH_HD void multiply_group_u4(typename Warp::template PerLane<FragmentC> (&c)[ROW_TILES][TOKEN_TILES],
                                  const typename Warp::template PerLane<GroupWords<BITS>> (&words)[ROW_TILES],
                                  CodesOf codes_of) {
    PLANISH_UNROLL
    for (int tile = 0; tile < group_tiles(BITS); ++tile) {
        typename Warp::template PerLane<FragmentA> a[ROW_TILES];
        PLANISH_UNROLL
        for (int r = 0; r < ROW_TILES; ++r) {
            Warp::each([&](int lane) {
                const Nibbles nibbles = unpack_nibbles<BITS>(words[r][lane].word + tile * BITS);
                PLANISH_UNROLL
                for (int reg = 0; reg < 4; ++reg) a[r][lane].reg[reg] = nibbles.n[reg];
            });
        }
        PLANISH_UNROLL
        for (int j = 0; j < TOKEN_TILES; ++j) {
            typename Warp::template PerLane<FragmentB> b;
            Warp::each([&](int lane) { b[lane] = codes_of(j, tile, lane); });
            PLANISH_UNROLL
            for (int r = 0; r < ROW_TILES; ++r) Warp::mma_u4(c[r][j], a[r], b);
        }
    }
}

// The words of group `group` for each tile of rows. `weights` is the first word of a segment whose tiles of rows have
// `groups` groups.
template <int BITS, class Warp, int ROW_TILES>
PLANISH_HD void load_groups(typename Warp::template PerLane<GroupWords<BITS>> (&words)[ROW_TILES],
                            const uint32_t* weights, const int64_t (&row_tiles)[ROW_TILES], int64_t groups,
                            int64_t group) {
    PLANISH_UNROLL
    for (int r = 0; r < ROW_TILES; ++r) {
        const uint32_t* first = weights + (row_tiles[r] * groups + group) * group_words(BITS);
        Warp::each([&](int lane) { load_group<BITS>(first, lane, words[r][lane]); });
    }
}

// Adds to `c` the products of ROW_TILES tiles of rows with all tokens, TOKEN_TILES tiles of them, over the groups
// begin .. end - 1. `channel` is where the segment begins in the stored codes.
template <int BITS, class Warp, int ROW_TILES, int TOKEN_TILES>
PLANISH_HD void multiply_mma(typename Warp::template PerLane<FragmentC> (&c)[ROW_TILES][TOKEN_TILES],
                             const uint32_t* weights, const int64_t (&row_tiles)[ROW_TILES], int64_t groups,
                             int64_t begin, int64_t end, const Tokens& tokens, int64_t channel) {
    typename Warp::template PerLane<GroupWords<BITS>> words[ROW_TILES], ahead[ROW_TILES];
    if (begin < end) load_groups<BITS, Warp>(ahead, weights, row_tiles, groups, begin);
    for (int64_t group = begin; group < end; ++group) {
        PLANISH_UNROLL
        for (int r = 0; r < ROW_TILES; ++r) words[r] = ahead[r];
        if (group + 1 < end) load_groups<BITS, Warp>(ahead, weights, row_tiles, groups, group + 1);
        const int64_t at = channel + group * group_channels(BITS);
        multiply_group<BITS, Warp>(c, words, [&](int token_tile, int tile, int lane) {
            return load_codes(tokens, token_tile * kTileTokens + lane / 4, at + tile * kTileChannels, lane);
        });
    }
}

// A lane's sums of `multiply_dot`: of rows g and g + 8 of a tile, over the channels that the lane owns.
template <int TOKENS>
struct DotSums {
    int32_t row[2][TOKENS];
};

// Adds to `sums` the products of one tile of rows with TOKENS tokens over the groups begin .. end - 1. The sum of a row
// is spread over the four lanes 4 g .. 4 g + 3.
template <int BITS, class Warp, int TOKENS>
PLANISH_HD void multiply_dot(typename Warp::template PerLane<DotSums<TOKENS>>& sums, const uint32_t* weights,
                             int64_t row_tile, int64_t groups, int64_t begin, int64_t end, const Tokens& tokens,
                             int64_t channel) {
    using Words = typename Warp::template PerLane<GroupWords<BITS>>;
    Words ahead;
    const auto load_ahead = [&](int64_t group) {
        const uint32_t* words = weights + (row_tile * groups + group) * group_words(BITS);
        Warp::each([&](int lane) { load_group<BITS>(words, lane, ahead[lane]); });
    };
    if (begin < end) load_ahead(begin);
    for (int64_t group = begin; group < end; ++group) {
        const Words words = ahead;
        if (group + 1 < end) load_ahead(group + 1);
        Warp::each([&](int lane) {
            PLANISH_UNROLL
            for (int tile = 0; tile < group_tiles(BITS); ++tile) {
                const int64_t at = channel + group * group_channels(BITS) + tile * kTileChannels;
                const Bytes bytes = to_bytes(unpack_nibbles<BITS>(words[lane].word + tile * BITS));
                PLANISH_UNROLL
                for (int token = 0; token < TOKENS; ++token) {
                    const Quad codes = load_codes(tokens, token, at, lane);
                    // Nibble register i holds row i & 1 and the channels whose codes are words 2 (i / 2) and behind.
                    PLANISH_UNROLL
                    for (int i = 0; i < 4; ++i) {
                        int32_t& sum = sums[lane].row[i & 1][token];
                        sum = dot4(bytes.o[2 * i], codes.word[i / 2 * 2], sum);
                        sum = dot4(bytes.o[2 * i + 1], codes.word[i / 2 * 2 + 1], sum);
                    }
                }
            }
        });
    }
}

}  // namespace planish
