// The factors of a transform, multiplied with one row that lies in shared memory.
//
// A row of n = m k channels is a matrix X of m rows and k columns, as in plugins/ops/transform.py:
//
//     right   Y[i][j] = sum_l X[i][l] right[l][j], one matrix for all i or one for each
//     left    Y[i][j] = sum_l left[l][i] X[l][j]
//
// Both together are a Kronecker product, of which a Hadamard rotation is one; `right` for each i is a block-diagonal map
// and `left` behind it a mixing of the blocks. So one routine serves every kind of transform, and the matrices of a
// Hadamard rotation, of any order, are data.
//
// Cost: m + k multiply-adds per channel, float32 on the CUDA cores. Each thread holds up to VALUES results in registers,
// so that a row is transformed in place and shared memory holds it once: 57 KB for 14336 channels, which every GPU has.
// A thread's results share a column wherever k is at most the number of threads. Then an element of `right` (of X, for
// the left factor) is loaded once for all of them, and neighbouring threads load neighbouring elements.
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
        int row_of[VALUES], column_of[VALUES];
        PLANISH_UNROLL
        for (int v = 0; v < VALUES; ++v) {
            // Where there is no such result, another one is computed and not stored: no branch in the loops below.
            const int at = thread + v * stride, inside = thread < stride && at < m * k ? at : 0;
            sums.value[v] = 0;
            row_of[v] = inside / k;
            column_of[v] = inside % k;
        }
        if (one_column && LEFT) {
            for (int l = 0; l < m; ++l) {
                const float x = row[l * k + thread % k];
                PLANISH_UNROLL
                for (int v = 0; v < VALUES; ++v) sums.value[v] += factors.left[l * m + row_of[v]] * x;
            }
        } else if (one_column) {
            for (int l = 0; l < k; ++l) {
                const float factor = factors.right[l * k + thread % k];
                PLANISH_UNROLL
                for (int v = 0; v < VALUES; ++v) sums.value[v] += row[row_of[v] * k + l] * factor;
            }
        } else if (LEFT) {
            for (int l = 0; l < m; ++l) {
                PLANISH_UNROLL
                for (int v = 0; v < VALUES; ++v) {
                    sums.value[v] += factors.left[l * m + row_of[v]] * row[l * k + column_of[v]];
                }
            }
        } else {
            for (int l = 0; l < k; ++l) {
                PLANISH_UNROLL
                for (int v = 0; v < VALUES; ++v) {
                    const int matrix = factors.right_count == 1 ? 0 : row_of[v];
                    sums.value[v] += row[row_of[v] * k + l] * factors.right[(matrix * k + l) * k + column_of[v]];
                }
            }
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
