// Both factors of a Kronecker product, multiplied with one row in shared memory by tensor cores.
//
// The formulas are those of apply_factors.cuh. There every multiply-add takes a load from shared memory, and a row of
// 4096 = 64 x 64 channels keeps a multiprocessor busy for some 16000 cycles: several times what it takes an H100 to
// copy that row, and, when there is one token, what the whole GPU needs for the product behind. Here the same row is
// 512 pairs of tile and step, three MMAs each (split_floats.cuh): some 2400 cycles.
//
// Y = X R has the rows of X for rows of its tiles. Y = L^T X is (X^T L)^T: the same product of a transposed row, so the
// first product stores its results transposed, and one routine serves both.
//
// Shared memory: a line of `depth` floats is padded to a multiple of eight and four more. Then the eight lines and four
// columns that the lanes of a warp load at once are in 32 banks. Results replace the row: all of them are in registers
// before any is stored.
#pragma once

#include "apply_factors.cuh"
#include "block.cuh"
#include "split_floats.cuh"

namespace planish {

constexpr int kFactorDepth = 8;  // k of an MMA of tf32

// Floats from one line to the next.
PLANISH_HD constexpr int tiled_stride(int depth) { return ceil_div(depth, kFactorDepth) * kFactorDepth + 4; }

// Whether factors can be multiplied by tiles. A map of its own for every row of X has a tile for each, of one row.
PLANISH_HD constexpr bool has_tiles(const Factors& factors) {
    return factors.right && factors.right_count == 1 && factors.m >= kTileTokens;
}

// Floats that a row takes, however it lies.
PLANISH_HD constexpr int tiled_floats(const Factors& factors) {
    const int right = factors.m * tiled_stride(factors.k), left = factors.k * tiled_stride(factors.m);
    return factors.left && left > right ? left : right;
}

// Warps of TILES tiles each that a product of [rows][depth] takes.
template <int TILES>
PLANISH_HD constexpr int warps_of_product(int rows, int depth) {
    return ceil_div(rows, TILES * kTileRows) * ceil_div(depth, kTileTokens);
}

template <int TILES>
PLANISH_HD constexpr int warps_of_tiles(const Factors& factors) {
    const int right = warps_of_product<TILES>(factors.m, factors.k);
    const int left = warps_of_product<TILES>(factors.k, factors.m);
    return factors.left && left > right ? left : right;
}

// Threads of a block that has a warp for all tiles of the larger product; 0 where there are no tiles, or too many.
template <int TILES>
PLANISH_HD constexpr int threads_of_tiles(const Factors& factors) {
    const int warps = warps_of_tiles<TILES>(factors), fewest = 4;
    return has_tiles(factors) && warps * kLanes <= kMaxThreads ? (warps > fewest ? warps : fewest) * kLanes : 0;
}

// The sums of a warp's tiles, below each other.
template <class Warp, int TILES>
struct TileSums {
    typename Warp::template PerLane<FragmentF> tile[TILES];
};

// Where a warp's tiles are.
struct TilePlace {
    int row;
    int column;
};

template <int TILES>
PLANISH_HD TilePlace place_of_tiles(int warp, int rows) {
    const int below = ceil_div(rows, TILES * kTileRows);
    return {warp % below * TILES * kTileRows, warp / below * kTileTokens};
}

// A lane's elements of some steps of the factor. Few tiles to a warp go with few tokens, whose blocks find the factor
// in L2 at the earliest: four steps on their way at once hide most of that.
template <int TILES>
struct FactorSteps {
    static constexpr int kSteps = TILES == 1 ? 4 : 1;
    float value[kSteps][2];
};

// Of the steps from `step` on, zeros behind the end of the factor, [depth][depth].
template <int TILES>
PLANISH_HD FactorSteps<TILES> load_factor(const float* factor, int depth, int step, int column, int lane) {
    FactorSteps<TILES> steps;
    PLANISH_UNROLL
    for (int s = 0; s < FactorSteps<TILES>::kSteps; ++s) {
        PLANISH_UNROLL
        for (int reg = 0; reg < 2; ++reg) {
            const Place at = b_place<1>(lane, reg, 0);
            const int l = (step + s) * kFactorDepth + at.k, j = column + at.row;
            steps.value[s][reg] = l < depth && j < depth ? factor[l * depth + j] : 0.0f;
        }
    }
    return steps;
}

// Where a lane reads the first element of lines g and g + 8 of each tile. Behind the last line it reads that one again:
// what comes of it is thrown away.
template <int TILES>
struct LinePlaces {
    int line[TILES][2];
};

template <int TILES>
PLANISH_HD LinePlaces<TILES> lines_of(int first_row, int rows, int stride, int lane) {
    LinePlaces<TILES> places;
    PLANISH_UNROLL
    for (int tile = 0; tile < TILES; ++tile) {
        PLANISH_UNROLL
        for (int reg = 0; reg < 2; ++reg) {
            const Place at = a_place<1>(lane, reg, 0);
            const int line = first_row + tile * kTileRows + at.row;
            places.line[tile][reg] = (line < rows ? line : rows - 1) * stride + at.k;
        }
    }
    return places;
}

// Adds to `sums` the products of the warp's lines of x, [rows][tiled_stride(depth)], with its columns of the factor.
template <int TILES, class Warp>
PLANISH_HD void multiply_tiles(TileSums<Warp, TILES>& sums, const float* x, int rows, const float* factor, int depth,
                               TilePlace place) {
    constexpr int kAtOnce = FactorSteps<TILES>::kSteps;
    const int stride = tiled_stride(depth), steps = ceil_div(depth, kFactorDepth);
    typename Warp::template PerLane<FactorSteps<TILES>> ahead, now;
    typename Warp::template PerLane<LinePlaces<TILES>> places;
    Warp::each([&](int lane) {
        places[lane] = lines_of<TILES>(place.row, rows, stride, lane);
        ahead[lane] = load_factor<TILES>(factor, depth, 0, place.column, lane);
    });
    PLANISH_ROLLED
    for (int first = 0; first < steps; first += kAtOnce) {
        now = ahead;
        if (first + kAtOnce < steps) {
            Warp::each([&](int lane) {
                ahead[lane] = load_factor<TILES>(factor, depth, first + kAtOnce, place.column, lane);
            });
        }
        PLANISH_UNROLL
        for (int s = 0; s < kAtOnce; ++s) {
            if (first + s >= steps) break;
            const float* column = x + (first + s) * kFactorDepth;
            SplitOperand<Warp, FragmentB> b;
            Warp::each([&](int lane) { split(b, lane, [&](int reg) { return now[lane].value[s][reg]; }); });
            PLANISH_UNROLL
            for (int tile = 0; tile < TILES; ++tile) {
                if (place.row + tile * kTileRows >= rows) break;
                SplitOperand<Warp, FragmentA> a;
                Warp::each([&](int lane) {
                    // Registers 2 and 3 are four columns behind 0 and 1.
                    split(a, lane, [&](int reg) { return column[places[lane].line[tile][reg % 2] + reg / 2 * 4]; });
                });
                add_products<Warp>(sums.tile[tile], a, b);
            }
        }
    }
}

// Replaces x, [rows][tiled_stride(depth)], by its product with a factor; `store(row, column, value)` says where to.
template <int TILES, class Block, class Store>
PLANISH_HD void multiply_factor(const float* factor, float* x, int rows, int depth, Block& block, Store store) {
    using Warp = typename Block::Warp;
    typename Block::template PerWarp<TileSums<Warp, TILES>> sums;
    const int busy = warps_of_product<TILES>(rows, depth);
    block.each_warp([&](int warp) {
        sums[warp] = {};
        if (warp < busy) {
            multiply_tiles<TILES, Warp>(sums[warp], x, rows, factor, depth, place_of_tiles<TILES>(warp, rows));
        }
    });
    block.each_warp([&](int warp) {
        if (warp >= busy) return;
        const TilePlace place = place_of_tiles<TILES>(warp, rows);
        PLANISH_UNROLL
        for (int tile = 0; tile < TILES; ++tile) {
            Warp::each([&](int lane) {
                PLANISH_UNROLL
                for (int reg = 0; reg < 4; ++reg) {
                    store(place.row + tile * kTileRows + c_row(lane, reg), place.column + c_token(lane, reg),
                          sums[warp].tile[tile][lane].reg[reg]);
                }
            });
        }
    });
}

// Replaces the row, [m][tiled_stride(k)] with zeros behind k, by its product with both factors, [m][k].
template <int TILES, class Block>
PLANISH_HD void apply_tiled(const Factors& factors, float* row, Block& block) {
    const int m = factors.m, k = factors.k, stride = tiled_stride(m), padded = stride - 4;
    if (!factors.left) {
        multiply_factor<TILES>(factors.right, row, m, k, block, [&](int i, int j, float value) {
            if (i < m && j < k) row[i * k + j] = value;
        });
        return;
    }
    // Behind m is what came of the last line again: finite, and the factor is zero there.
    multiply_factor<TILES>(factors.right, row, m, k, block, [&](int i, int j, float value) {
        if (i < padded && j < k) row[j * stride + i] = value;
    });
    multiply_factor<TILES>(factors.left, row, k, m, block, [&](int j, int i, float value) {
        if (i < m && j < k) row[i * k + j] = value;
    });
}

}  // namespace planish
