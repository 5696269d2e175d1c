// A block-diagonal map, or one dense one, multiplied with a few rows in shared memory by tensor cores.
//
// Every line of k channels has a matrix of its own, or all the same, with which a tile multiplies that line of some
// tokens: its rows are columns of the matrix, its columns the eight tokens of an MMA. What is dear here is the map
// itself. That of 4096 channels in blocks of 64 is 1 MB, which comes from L2 for every block of threads; 2048 tokens
// one by one would read 2 GB of it, some 400 us on an H100, and eight at a time read 256 MB. So a block of threads has
// as many tokens as its shared memory takes, up to eight. One token alone takes as long as one multiprocessor reads the
// map, some 10 us for that 1 MB, unless spread_blocks.cuh gives some of its lines to each of many.
//
// Multiplied as in tiled_factors.cuh, three MMAs to a product. A warp has two tiles, for which it splits the tokens
// once, and asks for the next step of the map before it multiplies this one.
//
// Lines are replaced where they lie: the results of some matrices are in registers before any is stored. They are so
// far apart as mixing_factor.cuh wants them.
#pragma once

#include "row_lines.cuh"
#include "tiled_factors.cuh"

namespace planish {

constexpr int kMostTokensOfBlock = kTileTokens;
constexpr int kColumnTiles = 2;
constexpr int kWarpColumns = kColumnTiles * kTileRows;

// Warps that share a matrix.
PLANISH_HD constexpr int warps_of_matrix(int k) { return ceil_div(k, kWarpColumns); }

// Warps for a right factor; 0 where one is too wide.
PLANISH_HD constexpr int warps_of_blocks(const Factors& factors) {
    const int together = warps_of_matrix(factors.k), most = kMaxThreads / kLanes / together;
    return factors.k % kFactorDepth ? 0 : (factors.m < most ? factors.m : most) * together;
}

// Lines 8 or 24 floats apart, but for whole turns of the 32 banks: then the four lines and eight columns that the lanes
// of a warp load at once in mixing_factor.cuh are in all of them.
PLANISH_HD constexpr RowLines lines_of_blocks(const Factors& factors) {
    return {factors.k, (factors.k + 7) / 16 * 16 + 8};
}

// Floats from one token to the next: a multiple of four and none of eight, so that the eight tokens and four channels
// that the lanes of a warp load at once are in 32 banks.
PLANISH_HD constexpr int floats_of_token(const Factors& factors) {
    return factors.m * lines_of_blocks(factors).stride | 4;
}

// Some tokens in shared memory.
struct TokenRows {
    float* first;
    int floats;  // floats_of_token
    int count;
};

// A lane's elements of a step of a matrix, for each tile.
struct MatrixStep {
    float value[kColumnTiles][4];
};

// Zeros behind the last column.
PLANISH_HD MatrixStep load_matrix(const float* matrix, int k, int step, int column, int lane) {
    MatrixStep loaded;
    PLANISH_UNROLL
    for (int tile = 0; tile < kColumnTiles; ++tile) {
        PLANISH_UNROLL
        for (int reg = 0; reg < 4; ++reg) {
            const Place at = a_place<1>(lane, reg, 0);
            const int j = column + tile * kTileRows + at.row;
            loaded.value[tile][reg] = j < k ? matrix[(step * kFactorDepth + at.k) * k + j] : 0.0f;
        }
    }
    return loaded;
}

// Adds to `sums` the products of line i of every token with a warp's columns of matrix i.
template <class Warp>
PLANISH_HD void multiply_matrix(TileSums<Warp, kColumnTiles>& sums, const Factors& factors, const TokenRows& rows,
                                int i, int column) {
    const int k = factors.k, steps = k / kFactorDepth;
    const float* matrix = factors.right + (factors.right_count == 1 ? 0 : static_cast<int64_t>(i) * k * k);
    const float* line = rows.first + i * lines_of_blocks(factors).stride;
    typename Warp::template PerLane<MatrixStep> ahead, now;
    Warp::each([&](int lane) { ahead[lane] = load_matrix(matrix, k, 0, column, lane); });
    PLANISH_ROLLED
    for (int step = 0; step < steps; ++step) {
        now = ahead;
        if (step + 1 < steps) {
            Warp::each([&](int lane) { ahead[lane] = load_matrix(matrix, k, step + 1, column, lane); });
        }
        SplitOperand<Warp, FragmentB> b;
        Warp::each([&](int lane) {
            split(b, lane, [&](int reg) {
                // Behind the last token, the last one: what comes of it is thrown away.
                const Place at = b_place<1>(lane, reg, 0);
                const int token = at.row < rows.count ? at.row : rows.count - 1;
                return line[token * rows.floats + step * kFactorDepth + at.k];
            });
        });
        PLANISH_UNROLL
        for (int tile = 0; tile < kColumnTiles; ++tile) {
            SplitOperand<Warp, FragmentA> a;
            Warp::each([&](int lane) { split(a, lane, [&](int reg) { return now[lane].value[tile][reg]; }); });
            add_products<Warp>(sums.tile[tile], a, b);
        }
    }
}

// Replaces every row, in lines_of_blocks, by its product with the map.
template <class Block>
PLANISH_HD void apply_blocks(const Factors& factors, const TokenRows& rows, Block& block) {
    using Warp = typename Block::Warp;
    const int k = factors.k, together = warps_of_matrix(k), at_once = block.threads() / kLanes / together;
    for (int first = 0; first < factors.m; first += at_once) {
        typename Block::template PerWarp<TileSums<Warp, kColumnTiles>> sums;
        const auto matrix_of = [&](int warp) {
            return warp < at_once * together ? first + warp / together : factors.m;
        };
        const auto column_of = [&](int warp) { return warp % together * kWarpColumns; };
        block.each_warp([&](int warp) {
            sums[warp] = {};
            if (matrix_of(warp) < factors.m) {
                multiply_matrix<Warp>(sums[warp], factors, rows, matrix_of(warp), column_of(warp));
            }
        });
        block.each_warp([&](int warp) {
            if (matrix_of(warp) >= factors.m) return;
            float* line = rows.first + matrix_of(warp) * lines_of_blocks(factors).stride;
            PLANISH_UNROLL
            for (int tile = 0; tile < kColumnTiles; ++tile) {
                Warp::each([&](int lane) {
                    PLANISH_UNROLL
                    for (int reg = 0; reg < 4; ++reg) {
                        const int token = c_token(lane, reg);
                        const int j = column_of(warp) + tile * kTileRows + c_row(lane, reg);
                        if (token < rows.count && j < k)
                            line[token * rows.floats + j] = sums[warp].tile[tile][lane].reg[reg];
                    }
                });
            }
        });
    }
}

}  // namespace planish
