// A left factor, which mixes the lines of a row, multiplied with a few rows in shared memory by tensor cores.
//
// Y = L^T X: a tile's rows are 16 lines of Y, its columns eight columns of one token's lines. This is the mixing of
// heads in front of o, and of blocks behind a block-diagonal map. What is read again and again is the factor, 16 KB for
// 64 lines: a warp splits a step of it once for all tokens of its block. A token of 4096 channels takes 256 pairs of
// tile and step, three MMAs each. tiled_factors.cuh transposes a row on the way, for which a block-diagonal map, whose
// results do not fit into registers, has no room.
//
// Columns do not meet: a warp for every tile of lines, and as many columns at once as there are warps. Lines are
// replaced where they lie, the results of all lines of a column being in registers before any is stored.
#pragma once

#include "block_factors.cuh"

namespace planish {

// Steps of the factor that are on their way at once: it comes from L2 at the earliest. With more of them the sums of
// eight tokens would not fit into the 64 registers that a thread of 1024 has.
constexpr int kMixedSteps = 2;

PLANISH_HD constexpr int mixed_tiles(const Factors& factors) { return ceil_div(factors.m, kTileRows); }
PLANISH_HD constexpr int mixed_columns(const Factors& factors) { return ceil_div(factors.k, kTileTokens); }

// Warps for a left factor; 0 where there are too many lines.
PLANISH_HD constexpr int warps_of_mixing(const Factors& factors) {
    const int tiles = mixed_tiles(factors), columns = mixed_columns(factors), most = kMaxThreads / kLanes / tiles;
    return (columns < most ? columns : most) * tiles;
}

// Threads of a block for a block-diagonal map, a mixing, or both; 0 where one of them does not fit, or there is none.
PLANISH_HD constexpr int threads_of_blocks(const Factors& factors) {
    const int right = factors.right ? warps_of_blocks(factors) : 0, left = factors.left ? warps_of_mixing(factors) : 0;
    if ((factors.right && !right) || (factors.left && !left)) return 0;
    const int warps = right > left ? right : left, fewest = 4;
    return warps == 0 ? 0 : (warps > fewest ? warps : fewest) * kLanes;
}

// The sums of a warp's tile, for each token.
template <class Warp>
struct MixedSums {
    typename Warp::template PerLane<FragmentF> token[kMostTokensOfBlock];
};

// A lane's elements of some steps of the factor.
struct MixedFactor {
    float value[kMixedSteps][4];
};

// Zeros behind the last line, for the sums and for the lines that are summed.
PLANISH_HD MixedFactor load_mixing(const Factors& factors, int step, int tile, int lane) {
    MixedFactor loaded;
    PLANISH_UNROLL
    for (int s = 0; s < kMixedSteps; ++s) {
        PLANISH_UNROLL
        for (int reg = 0; reg < 4; ++reg) {
            const Place at = a_place<1>(lane, reg, 0);
            const int l = (step + s) * kFactorDepth + at.k, i = tile * kTileRows + at.row;
            loaded.value[s][reg] = l < factors.m && i < factors.m ? factors.left[l * factors.m + i] : 0.0f;
        }
    }
    return loaded;
}

// Where a lane's element of a step and a column is in a row. Behind the last line and column it is the last one: what
// comes of it is multiplied by zero, or thrown away.
PLANISH_HD int mixed_place(const Factors& factors, int step, int column, int lane, int reg) {
    const Place at = b_place<1>(lane, reg, 0);
    const int l = step * kFactorDepth + at.k, j = column * kTileTokens + at.row;
    return (l < factors.m ? l : factors.m - 1) * lines_of_blocks(factors).stride + (j < factors.k ? j : factors.k - 1);
}

// Adds to `sums` the products of a tile of the factor with eight columns of every token.
template <class Warp>
PLANISH_HD void mix_lines(MixedSums<Warp>& sums, const Factors& factors, const TokenRows& rows, int tile, int column) {
    const int steps = ceil_div(factors.m, kFactorDepth);
    typename Warp::template PerLane<MixedFactor> now;
    PLANISH_ROLLED
    for (int first = 0; first < steps; first += kMixedSteps) {
        Warp::each([&](int lane) { now[lane] = load_mixing(factors, first, tile, lane); });
        PLANISH_UNROLL
        for (int s = 0; s < kMixedSteps; ++s) {
            if (first + s >= steps) break;
            SplitOperand<Warp, FragmentA> a;
            Warp::each([&](int lane) { split(a, lane, [&](int reg) { return now[lane].value[s][reg]; }); });
            PLANISH_UNROLL
            for (int token = 0; token < kMostTokensOfBlock; ++token) {
                if (token >= rows.count) break;
                SplitOperand<Warp, FragmentB> b;
                Warp::each([&](int lane) {
                    split(b, lane, [&](int reg) {
                        return rows.first[token * rows.floats + mixed_place(factors, first + s, column, lane, reg)];
                    });
                });
                add_products<Warp>(sums.token[token], a, b);
            }
        }
    }
}

// Replaces every row, in lines_of_blocks, by its product with the factor.
template <class Block>
PLANISH_HD void apply_mixing(const Factors& factors, const TokenRows& rows, Block& block) {
    using Warp = typename Block::Warp;
    const int tiles = mixed_tiles(factors), columns = mixed_columns(factors), stride = lines_of_blocks(factors).stride;
    const int at_once = block.threads() / kLanes / tiles;
    for (int first = 0; first < columns; first += at_once) {
        typename Block::template PerWarp<MixedSums<Warp>> sums;
        const auto column_of = [&](int warp) { return warp < at_once * tiles ? first + warp / tiles : columns; };
        block.each_warp([&](int warp) {
            sums[warp] = {};
            if (column_of(warp) < columns) {
                mix_lines<Warp>(sums[warp], factors, rows, warp % tiles, column_of(warp));
            }
        });
        block.each_warp([&](int warp) {
            if (column_of(warp) >= columns) return;
            PLANISH_UNROLL
            for (int token = 0; token < kMostTokensOfBlock; ++token) {
                if (token >= rows.count) break;
                Warp::each([&](int lane) {
                    PLANISH_UNROLL
                    for (int reg = 0; reg < 4; ++reg) {
                        const int i = warp % tiles * kTileRows + c_row(lane, reg);
                        const int j = column_of(warp) * kTileTokens + c_token(lane, reg);
                        if (i < factors.m && j < factors.k) {
                            rows.first[token * rows.floats + i * stride + j] = sums[warp].token[token][lane].reg[reg];
                        }
                    }
                });
            }
        });
    }
}

}  // namespace planish
