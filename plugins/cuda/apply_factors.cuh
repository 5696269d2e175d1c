// The factors of a transform, multiplied with one row that lies in shared memory.
//
// A row of n = m k channels is a matrix X of m rows and k columns, as in plugins/ops/transform.py:
//
//     right   Y[i][j] = sum_l X[i][l] right[l][j], one matrix for all i or one for each
//     left    Y[i][j] = sum_l left[l][i] X[l][j]
//
// Both together are a Kronecker product, of which a Hadamard rotation is one; `right` for each i is a block-diagonal
// map and `left` behind it a mixing of the blocks. So one routine serves every kind of transform, and the matrices of a
// Hadamard rotation, of any order, are data.
//
// tiled_factors.cuh, block_factors.cuh and mixing_factor.cuh do nearly all of them, many times faster, on the tensor
// cores: what comes here has a right factor whose width is no multiple of eight or above 1024, or more than 512 lines.
//
// Cost: m + k multiply-adds per channel, float32 on the CUDA cores. Each thread holds up to VALUES results in
// registers, so that a row is transformed in place and shared memory holds it once: 57 KB for 14336 channels, which
// every GPU has. A thread's results share a column wherever k is at most the number of threads. Then an element of
// `right` (of X, for the left factor) is loaded once for all of them, and neighbouring threads load neighbouring
// elements.
#pragma once

#include "block.cuh"

namespace planish {

struct Factors {
    const float* right;  // [right_count][k][k]; null is none
    const float* left;   // [m][m]; null is none
    int right_count;     // 1, or m
    int m;
    int k;
};

template <int VALUES>
struct Results {
    float value[VALUES];
};

// Results of one thread are this far apart in the row: whole rows of X, or the threads where a row of X has more.
PLANISH_HD constexpr int results_stride(int k, int threads) { return k <= threads ? threads / k * k : threads; }

// Replaces the row by its product with the left or the right factor. VALUES * results_stride(k, threads) >= m k.
template <int VALUES, bool LEFT, class Block>
PLANISH_HD void apply_factor(const Factors& factors, float* row, Block& block) {
    typename Block::template PerThread<Results<VALUES>> results;
    const int m = factors.m, k = factors.k, stride = results_stride(k, block.threads());
    const bool one_column = k <= block.threads() && (LEFT || factors.right_count == 1);
    block.each([&](int thread) {
        Results<VALUES>& sums = results[thread];
        // Where a thread has no such result it computes another one and does not store it: no branch in the loops.
        const auto result_at = [&](int v) {
            const int at = thread + v * stride;
            return thread < stride && at < m * k ? at : 0;
        };
        PLANISH_UNROLL
        for (int v = 0; v < VALUES; ++v) sums.value[v] = 0;
        if (one_column) {
            const int column = thread % k;
            int row_of[VALUES];
            PLANISH_UNROLL
            for (int v = 0; v < VALUES; ++v) row_of[v] = result_at(v) / k;
            for (int l = 0; l < (LEFT ? m : k); ++l) {
                const float shared = LEFT ? row[l * k + column] : factors.right[l * k + column];
                PLANISH_UNROLL
                for (int v = 0; v < VALUES; ++v) {
                    sums.value[v] += (LEFT ? factors.left[l * m + row_of[v]] : row[row_of[v] * k + l]) * shared;
                }
            }
            return;
        }
        // Nothing to share: one result after the other, so that only its own two addresses are in registers.
        PLANISH_UNROLL
        for (int v = 0; v < VALUES; ++v) {
            const int i = result_at(v) / k, j = result_at(v) % k;
            const float* x = LEFT ? row + j : row + i * k;
            const float* factor =
                LEFT ? factors.left + i : factors.right + (factors.right_count == 1 ? 0 : i * k * k) + j;
            const int step = LEFT ? m : k;
            for (int l = 0; l < (LEFT ? m : k); ++l) sums.value[v] += x[LEFT ? l * k : l] * factor[l * step];
        }
    });
    block.each([&](int thread) {
        PLANISH_UNROLL
        for (int v = 0; v < VALUES; ++v) {
            const int at = thread + v * stride;
            if (thread < stride && at < m * k) row[at] = results[thread].value[v];
        }
    });
}

}  // namespace planish
