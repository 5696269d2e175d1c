// A low-bit linear for many tokens (prefill): bound by how fast tensor cores multiply.
//
// A block of kWarps warps takes 256 rows and 64 tokens; a warp 32 rows and all 64 tokens. Two tiles of rows to a load
// of codes, because with one the loads from shared memory would take longer than the MMAs. Per tile of 64 channels, a
// warp
//
//     with 8-bit MMAs   unpacks two tiles of weights (2 x 18 instructions at 3 bits), loads 8 x 512 bytes of codes and
//                       issues 32 m16n8k32;
//     with 4-bit MMAs   unpacks two tiles (2 x 9 instructions), loads 8 x 256 bytes and issues 16 m16n8k64. On an A100
//                       that is 256 cycles of MMAs to 128 of loads for the eight warps of a block; with bytes for codes
//                       loads would take as long as MMAs, which is why codes are stored as nibbles for this.
//
// Weights go from memory to registers, already in the order of the fragments, with the next group under way; only the
// codes of the tokens, which all warps read, pass through shared memory, in stages of some tiles. In a stage the bytes
// of a tile lie beside those of the next token, so that a load of a warp is 512 or 256 consecutive bytes.
//
// The two segments have scales of their own: the sums of one turn into float32 outputs at the boundary, and start again
// at zero for the other.
//
// TOKEN_TILES is tiles of eight tokens to a block: 8, but for wgmma_linear.cuh.
#pragma once

#include "linear.cuh"

namespace planish {

constexpr int kLargeWarps = 8;
constexpr int kLargeThreads = kLargeWarps * kLanes;
constexpr int kLargeRowTiles = 2;
constexpr int kLargeTokenTiles = 8;
constexpr int kLargeRows = kLargeWarps * kLargeRowTiles * kTileRows;
constexpr int kChunkBytes = 16;

// The codes of a stage, by their order. `chunk_place` is where one of the 16-byte chunks of a tile lies among them.
struct ByteCodes {
    static constexpr Order kOrder = Order::kLanes;
    static constexpr int kTileBytes = kTileChannels;
    PLANISH_HD static int chunk_place(int, int chunk) { return chunk; }
};

struct NibbleCodes {
    static constexpr Order kOrder = Order::kNibbles;
    static constexpr int kTileBytes = kTileChannels / 2;
    PLANISH_HD static int chunk_place(int, int chunk) { return chunk; }
};

template <class Codes>
PLANISH_HD constexpr int stage_bytes(int tiles, int token_tiles) {
    return tiles * token_tiles * kTileTokens * Codes::kTileBytes;
}

// What a warp keeps from group to group.
template <class Warp, int TOKEN_TILES>
struct LargeSums {
    typename Warp::template PerLane<FragmentC> c[kLargeRowTiles][TOKEN_TILES];
};

// Its outputs, in the places of LargeSums.
struct FragmentY {
    float reg[4];
};

template <class Warp, int TOKEN_TILES>
struct LargeOutputs {
    typename Warp::template PerLane<FragmentY> y[kLargeRowTiles][TOKEN_TILES];
};

// Which outputs a warp computes.
struct LargePlace {
    int64_t row_block;
    int64_t token_block;
    int warp;
};

// The tiles of rows of a warp. Behind the last row there is nothing to load: the last tile is done again, not stored.
PLANISH_HD void large_row_tiles(const Linear& linear, const LargePlace& place, int64_t (&row_tiles)[kLargeRowTiles]) {
    PLANISH_UNROLL
    for (int r = 0; r < kLargeRowTiles; ++r) {
        const int64_t tile = (place.row_block * kLargeWarps + place.warp) * kLargeRowTiles + r,
                      last = row_tiles_of(linear.rows) - 1;
        row_tiles[r] = tile < last ? tile : last;
    }
}

// Copies a thread's part of a stage: the first `tiles` of TILES tiles from `channel` on, of the tokens of a block.
// `copy(to, from, valid)` moves 16 bytes, or writes zeros where there is no such token.
template <int TILES, int TOKEN_TILES, class Codes, class Copy>
PLANISH_HD void fill_stage(const Tokens& tokens, int64_t token_block, int64_t channel, int tiles, uint8_t* stage,
                           int thread, Copy copy) {
    constexpr int kTokens = TOKEN_TILES * kTileTokens, kTileChunks = Codes::kTileBytes / kChunkBytes;
    constexpr int kChunks = TILES * kTileChunks, kAll = kTokens * kChunks;
    PLANISH_UNROLL
    for (int i = 0; i < ceil_div(kAll, kLargeThreads); ++i) {
        // Neighbouring threads read neighbouring chunks of one token.
        const int index = thread + i * kLargeThreads, token = index / kChunks, chunk = index % kChunks;
        const int tile = chunk / kTileChunks;
        if (index >= kAll || tile >= tiles) continue;
        const int64_t row = token_block * kTokens + token;
        const bool valid = row < tokens.count;
        copy(stage + (tile * kTokens + token) * Codes::kTileBytes +
                 Codes::chunk_place(token, chunk % kTileChunks) * kChunkBytes,
             tokens.codes + (valid ? row : 0) * tokens.stride + stored_bytes(channel, Codes::kOrder) +
                 chunk * kChunkBytes,
             valid);
    }
}

// Adds the products of one group, whose tokens are in `stage`.
template <int BITS, class Codes, class Warp>
PLANISH_HD void add_group(LargeSums<Warp, kLargeTokenTiles>& sums,
                          const typename Warp::template PerLane<GroupWords<BITS>> (&words)[kLargeRowTiles],
                          const uint8_t* stage) {
    const auto address = [&](int token_tile, int tile, int lane) {
        constexpr int kTokens = kLargeTokenTiles * kTileTokens;
        return stage + (tile * kTokens + token_tile * kTileTokens + lane / 4) * Codes::kTileBytes +
               Codes::kTileBytes / 4 * (lane % 4);
    };
    if constexpr (Codes::kOrder == Order::kNibbles) {
        multiply_group_u4<BITS, Warp>(sums.c, words, [&](int token_tile, int tile, int lane) {
            return *reinterpret_cast<const FragmentB*>(address(token_tile, tile, lane));
        });
    } else {
        multiply_group<BITS, Warp>(sums.c, words, [&](int token_tile, int tile, int lane) {
            return *reinterpret_cast<const Quad*>(address(token_tile, tile, lane));
        });
    }
}

// Calls `visit(r, j, lane, reg, token, row)` for every output of a warp that exists.
template <class Warp, int TOKEN_TILES, class Visit>
PLANISH_HD void each_output(const Linear& linear, const LargePlace& place, Visit visit) {
    PLANISH_UNROLL
    for (int r = 0; r < kLargeRowTiles; ++r) {
        PLANISH_UNROLL
        for (int j = 0; j < TOKEN_TILES; ++j) {
            Warp::each([&](int lane) {
                PLANISH_UNROLL
                for (int reg = 0; reg < 4; ++reg) {
                    const int64_t tile = (place.row_block * kLargeWarps + place.warp) * kLargeRowTiles + r;
                    const int64_t row = tile * kTileRows + c_row(lane, reg);
                    const int64_t token = (place.token_block * TOKEN_TILES + j) * kTileTokens + c_token(lane, reg);
                    if (row < linear.rows && token < linear.tokens.count) visit(r, j, lane, reg, token, row);
                }
            });
        }
    }
}

// Turns the sums of a segment into outputs, and starts the sums again at zero.
template <class Warp, int TOKEN_TILES>
PLANISH_HD void finish_segment(const Linear& linear, int segment, int low_bits, const LargePlace& place,
                               LargeSums<Warp, TOKEN_TILES>& sums, LargeOutputs<Warp, TOKEN_TILES>& outputs) {
    each_output<Warp, TOKEN_TILES>(linear, place, [&](int r, int j, int lane, int reg, int64_t token, int64_t row) {
        int32_t& sum = sums.c[r][j][lane].reg[reg];
        outputs.y[r][j][lane].reg[reg] += segment_output(linear, segment, low_bits, token, row, sum);
        sum = 0;
    });
}

// Stores the outputs of a warp.
template <class Warp, int TOKEN_TILES>
PLANISH_HD void store_outputs(const Linear& linear, const LargePlace& place, LargeOutputs<Warp, TOKEN_TILES>& outputs) {
    if (linear.gated) {
        PLANISH_UNROLL
        for (int i = 0; i < kLargeRowTiles * TOKEN_TILES; ++i) {
            Warp::each([&](int lane) {
                // Registers 2 and 3 hold what belongs to up.
                float (&y)[4] = outputs.y[i / TOKEN_TILES][i % TOKEN_TILES][lane].reg;
                y[0] = gate(y[0], y[2]);
                y[1] = gate(y[1], y[3]);
            });
        }
    }
    each_output<Warp, TOKEN_TILES>(linear, place, [&](int r, int j, int lane, int reg, int64_t token, int64_t row) {
        if (linear.gated && reg >= 2) return;
        store_output(linear, token, linear.gated ? gated_output(row) : row, outputs.y[r][j][lane].reg[reg]);
    });
}

}  // namespace planish
