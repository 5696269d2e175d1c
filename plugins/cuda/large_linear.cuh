// A low-bit linear for many tokens (prefill): bound by how fast tensor cores multiply.
//
// A block of kWarps warps takes 256 rows and 64 tokens; a warp 32 rows and all 64 tokens. Per tile of 64 channels a
// warp unpacks two tiles of weights (2 x 18 instructions at 3 bits), loads its codes (8 x 128 bits from shared memory)
// and issues 32 MMAs of 4096 multiply-adds: two tiles of rows to a load, because with one the loads from shared memory
// would take longer than the MMAs.
//
// Weights go from memory to registers, already in the order of the fragments, with the next group under way; only the
// codes of the tokens, which all warps read, pass through shared memory, two stages of one group of channels. In a
// stage the 64 bytes of a tile lie beside those of the next token, so that a load of a warp is 512 consecutive bytes.
//
// The two segments have scales of their own: the sums of one turn into float32 outputs at the boundary, and start again
// at zero for the other.
#pragma once

#include "linear.cuh"

namespace planish {

constexpr int kLargeWarps = 8;
constexpr int kLargeRowTiles = 2;
constexpr int kLargeTokenTiles = 8;
constexpr int kLargeRows = kLargeWarps * kLargeRowTiles * kTileRows;
constexpr int kLargeTokens = kLargeTokenTiles * kTileTokens;
constexpr int kChunkBytes = 16;
constexpr int kTileChunks = kTileChannels / kChunkBytes;

// Bytes of a stage.
PLANISH_HD constexpr int stage_bytes(int bits) { return kLargeTokens * group_channels(bits); }

// Where a lane's 16 codes of a token lie in a stage.
PLANISH_HD int stage_offset(int token_tile, int tile, int lane) {
    return (tile * kLargeTokens + token_tile * kTileTokens + lane / 4) * kTileChannels + kChunkBytes * (lane % 4);
}

// What a warp keeps from group to group.
template <class Warp>
struct LargeSums {
    typename Warp::template PerLane<FragmentC> c[kLargeRowTiles][kLargeTokenTiles];
};

// Its outputs, in the places of LargeSums.
struct FragmentY {
    float reg[4];
};

template <class Warp>
struct LargeOutputs {
    typename Warp::template PerLane<FragmentY> y[kLargeRowTiles][kLargeTokenTiles];
};

// The tiles of rows of a warp. Behind the last row there is nothing to load: the last tile is done again, not stored.
PLANISH_HD void large_row_tiles(const Linear& linear, int64_t row_block, int warp,
                                int64_t (&row_tiles)[kLargeRowTiles]) {
    PLANISH_UNROLL
    for (int r = 0; r < kLargeRowTiles; ++r) {
        const int64_t tile = (row_block * kLargeWarps + warp) * kLargeRowTiles + r,
                      last = row_tiles_of(linear.rows) - 1;
        row_tiles[r] = tile < last ? tile : last;
    }
}

// Copies a thread's part of a stage: the channels from `channel` on of the tokens of a block.
// `copy(to, from, valid)` moves 16 bytes, or writes zeros where there is no such token.
template <int BITS, class Copy>
PLANISH_HD void fill_stage(const Tokens& tokens, int64_t token_block, int64_t channel, uint8_t* stage, int thread,
                           int threads, Copy copy) {
    constexpr int kChunks = group_tiles(BITS) * kTileChunks;
    PLANISH_UNROLL
    for (int i = 0; i < kLargeTokens * kChunks / (kLargeWarps * kLanes); ++i) {
        // Neighbouring threads read neighbouring chunks of one token.
        const int index = thread + i * threads, token = index / kChunks, chunk = index % kChunks;
        const int64_t row = token_block * kLargeTokens + token;
        const bool valid = row < tokens.count;
        copy(stage + (chunk / kTileChunks * kLargeTokens + token) * kTileChannels + chunk % kTileChunks * kChunkBytes,
             tokens.codes + (valid ? row : 0) * tokens.stride + channel + chunk * kChunkBytes, valid);
    }
}

// Adds the products of one group, whose tokens are in `stage`.
template <int BITS, class Warp>
PLANISH_HD void add_group(LargeSums<Warp>& sums,
                          const typename Warp::template PerLane<GroupWords<BITS>> (&words)[kLargeRowTiles],
                          const uint8_t* stage) {
    multiply_group<BITS, Warp>(sums.c, words, [&](int token_tile, int tile, int lane) {
        return *reinterpret_cast<const Quad*>(stage + stage_offset(token_tile, tile, lane));
    });
}

// Calls `visit(r, j, lane, reg, token, row)` for every output of a warp that exists.
template <class Warp, class Visit>
PLANISH_HD void each_output(const Linear& linear, int64_t row_block, int64_t token_block, int warp, Visit visit) {
    PLANISH_UNROLL
    for (int r = 0; r < kLargeRowTiles; ++r) {
        PLANISH_UNROLL
        for (int j = 0; j < kLargeTokenTiles; ++j) {
            Warp::each([&](int lane) {
                PLANISH_UNROLL
                for (int reg = 0; reg < 4; ++reg) {
                    const int64_t row =
                        ((row_block * kLargeWarps + warp) * kLargeRowTiles + r) * kTileRows + c_row(lane, reg);
                    const int64_t token = token_block * kLargeTokens + j * kTileTokens + c_token(lane, reg);
                    if (row < linear.rows && token < linear.tokens.count) visit(r, j, lane, reg, token, row);
                }
            });
        }
    }
}

// Turns the sums of a segment into outputs, and starts the sums again at zero.
template <class Warp>
PLANISH_HD void finish_segment(const Linear& linear, int segment, int low_bits, int64_t row_block, int64_t token_block,
                               int warp, LargeSums<Warp>& sums, LargeOutputs<Warp>& outputs) {
    each_output<Warp>(linear, row_block, token_block, warp,
                      [&](int r, int j, int lane, int reg, int64_t token, int64_t row) {
                          int32_t& sum = sums.c[r][j][lane].reg[reg];
                          outputs.y[r][j][lane].reg[reg] += segment_output(linear, segment, low_bits, token, row, sum);
                          sum = 0;
                      });
}

template <class Warp>
PLANISH_HD void store_outputs(const Linear& linear, int64_t row_block, int64_t token_block, int warp,
                              const LargeOutputs<Warp>& outputs) {
    each_output<Warp>(linear, row_block, token_block, warp,
                      [&](int r, int j, int lane, int reg, int64_t token, int64_t row) {
                          store_output(linear, token, row, outputs.y[r][j][lane].reg[reg]);
                      });
}

}  // namespace planish
