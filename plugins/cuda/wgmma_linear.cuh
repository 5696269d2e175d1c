// The linear of large_linear.cuh by Hopper's wgmma: twice as fast as its mma.
//
// A block of two warpgroups takes 256 rows and 128 tokens, a warp 2 x 16 rows. Per tile of 64 channels a warp unpacks
// two tiles of weights (2 x 18 instructions at 3 bits) into registers, and its warpgroup issues four m64n128k32, 256
// cycles of the tensor cores; no warp loads codes of tokens, wgmma reads them from shared memory. While the MMAs of one
// tile run, the weights of the next are unpacked into other registers.
//
// Per tile a block reads 6 KB of weights (at 3 bits) and 8 KB of codes from L2, 28 bytes per cycle of its MMAs: why
// rows are many. Codes of tokens are 2.7 times as large as those of weights.
//
// A stage holds 256 channels whatever the bits are: 1, 2 or 4 groups, a span. With 128 tokens that is 32 KB, and there
// are three, so that one barrier to a span is enough: the stage that is filled is neither the one that is read, nor the
// one that a slower warp may still be reading. Groups that a last span lacks have weights of zeros, which multiply
// whatever the stage holds to nothing.
//
// Registers of a thread: 128 sums; where there is a high segment half as many tokens, 64 sums and 64 outputs. At 3 bits
// 24 words and 32 unpacked codes. Words are loaded in place, as soon as those before them are unpacked: half a span, a
// thousand cycles, before they are needed; a second set of registers for them would not fit.
#pragma once

#include "large_linear.cuh"
#include "wgmma.cuh"

namespace planish {

constexpr int kSpanTiles = 4;
constexpr int kSpanChannels = kSpanTiles * kTileChannels;
constexpr int kSpanStages = 3;

PLANISH_HD constexpr int span_groups(int bits) { return kSpanTiles / group_tiles(bits); }

// Codes in the order and the places of wgmma.cuh.
struct ColumnCodes {
    static constexpr Order kOrder = Order::kColumns;
    static constexpr int kTileBytes = kTileChannels;
    // A tile begins at a multiple of kSwizzleAtom.
    PLANISH_HD static int chunk_place(int token, int chunk) {
        return static_cast<int>(swizzled(static_cast<uint32_t>(token * kSwizzleRow + chunk * kChunkBytes)) %
                                kSwizzleRow) /
               kChunkBytes;
    }
};

// A lane's words of one span.
template <int BITS>
struct SpanWords {
    GroupWords<BITS> group[span_groups(BITS)];
};

// Tiles of span `span` that the segment has.
template <int BITS>
PLANISH_HD int tiles_of_span(const WeightSegment& weights, int64_t span) {
    const int64_t left = weights.groups * group_tiles(BITS) - span * kSpanTiles;
    return static_cast<int>(left < kSpanTiles ? left : kSpanTiles);
}

PLANISH_HD int64_t spans_of(const WeightSegment& weights, int bits) {
    return ceil_div<int64_t>(weights.groups, span_groups(bits));
}

// Loads 128-bit word `load` of group `group` of a span for both tiles of rows, zeros where the segment has no such
// group.
template <int BITS, class Warp>
PLANISH_HD void load_span_words(typename Warp::template PerLane<SpanWords<BITS>> (&words)[kLargeRowTiles],
                                const WeightSegment& weights, const int64_t (&row_tiles)[kLargeRowTiles], int64_t span,
                                int group, int load) {
    const int64_t at = span * span_groups(BITS) + group;
    const bool valid = at < weights.groups;
    PLANISH_UNROLL
    for (int r = 0; r < kLargeRowTiles; ++r) {
        const uint32_t* first = weights.words + (row_tiles[r] * weights.groups + at) * group_words(BITS);
        Warp::each([&](int lane) {
            const Quad quad = valid ? load_weights(first + (load * kLanes + lane) * 4) : Quad{{0, 0, 0, 0}};
            PLANISH_UNROLL
            for (int i = 0; i < 4; ++i) words[r][lane].group[group].word[load * 4 + i] = quad.word[i];
        });
    }
}

template <int BITS, class Warp>
PLANISH_HD void load_span(typename Warp::template PerLane<SpanWords<BITS>> (&words)[kLargeRowTiles],
                          const WeightSegment& weights, const int64_t (&row_tiles)[kLargeRowTiles], int64_t span) {
    PLANISH_UNROLL
    for (int group = 0; group < span_groups(BITS); ++group) {
        PLANISH_UNROLL
        for (int load = 0; load < group_loads(BITS); ++load) {
            load_span_words<BITS, Warp>(words, weights, row_tiles, span, group, load);
        }
    }
}

// Adds the products of span `span`, whose words are in `words` and whose tokens are at the shared address `stage`.
// Leaves in `words` those of the next span: each is asked for as soon as what was in its place is unpacked.
template <int BITS, class Warp, class Wgmma, int TOKEN_TILES>
PLANISH_HD void add_span(LargeSums<Warp, TOKEN_TILES>& sums,
                         typename Warp::template PerLane<SpanWords<BITS>> (&words)[kLargeRowTiles],
                         const WeightSegment& weights, const int64_t (&row_tiles)[kLargeRowTiles], int64_t span,
                         uint32_t stage, const Wgmma& wgmma) {
    // Fragments of two tiles: of one that is multiplied, and of the next.
    typename Warp::template PerLane<FragmentA> a[2][kLargeRowTiles][2];
    PLANISH_UNROLL
    for (int tile = 0; tile < kSpanTiles; ++tile) {
        const int group = tile / group_tiles(BITS), tile_of_group = tile % group_tiles(BITS);
        PLANISH_UNROLL
        for (int r = 0; r < kLargeRowTiles; ++r) {
            Warp::each([&](int lane) {
                const uint32_t* of_tile = words[r][lane].group[group].word + tile_of_group * BITS;
                const Bytes bytes = to_bytes(unpack_nibbles<BITS>(of_tile));
                PLANISH_UNROLL
                for (int reg = 0; reg < 8; ++reg) {
                    a[tile & 1][r][reg / 4][lane].reg[reg % 4] = bytes.o[u8_register(reg / 4, reg % 4)];
                }
            });
        }
        PLANISH_UNROLL
        for (int load = 0; load < group_loads(BITS); ++load) {
            if ((4 * load + 3) / BITS == tile_of_group) {
                load_span_words<BITS, Warp>(words, weights, row_tiles, span + 1, group, load);
            }
        }
        PLANISH_UNROLL
        for (int r = 0; r < kLargeRowTiles; ++r) {
            wgmma.settle(a[tile & 1][r]);
            wgmma.settle(sums.c[r]);
        }
        wgmma.begin();
        const uint32_t rows = stage + static_cast<uint32_t>(tile * TOKEN_TILES * kTileTokens * kTileChannels);
        PLANISH_UNROLL
        for (int h = 0; h < 2; ++h) {
            PLANISH_UNROLL
            for (int r = 0; r < kLargeRowTiles; ++r) {
                wgmma.multiply(sums.c[r], a[tile & 1][r][h], row_descriptor(rows, h * kSwizzleRow / 2));
            }
        }
        wgmma.commit();
        // The tile before is done: its fragments can be written again.
        wgmma.template wait<1>();
    }
    wgmma.template wait<0>();
    PLANISH_UNROLL
    for (int r = 0; r < kLargeRowTiles; ++r) wgmma.settle(sums.c[r]);
}

}  // namespace planish
