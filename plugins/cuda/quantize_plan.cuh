// Which blocks of threads take the tokens that are quantised: Kronecker products go to the tensor cores with one token
// to a block, block-diagonal maps and mixings with a few, and what neither takes to the CUDA cores with one. A thread
// holds 16 results of a factor, or 4 where there are few tokens, when a GPU is nearly idle and more threads make a
// token's own time shorter.
#pragma once

#include "planish_kernels.h"
#include "spread_blocks.cuh"

namespace planish {

constexpr int kFewTokens = PLANISH_SPREAD_TOKENS;
// What a kernel has of shared memory besides its tokens: a word to a warp, and what CUDA keeps for itself.
constexpr int kScratchBytes = (kMaxThreads / 32) * static_cast<int>(sizeof(int32_t)) + (1 << 10);

enum class QuantizePath { kTiles, kBlocks, kCores };

struct QuantizePlan {
    QuantizePath path;
    int values;    // results of a thread on the CUDA cores; of a warp's tiles, 4 each
    int threads;   // 0 where no block is wide enough
    int together;  // tokens of a block
};

// Threads whose results, VALUES each, make up a row; 0 where the most threads are too few.
inline int threads_of_cores(const Factors& factors, int channels, int values) {
    for (int threads = 64; threads <= kMaxThreads; threads += 32) {
        const int stride = factors.right || factors.left ? results_stride(factors.k, threads) : threads;
        if (stride * values >= channels) return threads;
    }
    return 0;
}

// Lines of a token to a block of threads where its map is spread over a workspace; 0 where it is not.
inline int plan_spread(const planish_quantize& task, const Factors& factors) {
    return task.workspace && task.tokens <= kFewTokens ? lines_of_share(factors, task.tokens) : 0;
}

// `shared_bytes` is what a block may have.
inline QuantizePlan plan_quantization(const RowQuantization& task, int64_t tokens, int shared_bytes) {
    const Factors& factors = task.factors;
    const bool few = tokens <= kFewTokens;
    if (const int threads = few ? threads_of_tiles<1>(factors) : 0) return {QuantizePath::kTiles, 4, threads, 1};
    if (const int threads = threads_of_tiles<4>(factors)) return {QuantizePath::kTiles, 16, threads, 1};
    if (const int threads = threads_of_blocks(factors)) {
        // One where there are few, so that more of the GPU works; else as many as fit.
        const int bytes = floats_of_token(factors) * static_cast<int>(sizeof(float));
        const int fit = (shared_bytes - kScratchBytes) / bytes;
        const int together = few && fit > 1 ? 1 : fit < kMostTokensOfBlock ? fit : kMostTokensOfBlock;
        if (together > 0) return {QuantizePath::kBlocks, 0, threads, together};
    }
    if (const int threads = few ? threads_of_cores(factors, task.channels, 4) : 0) {
        return {QuantizePath::kCores, 4, threads, 1};
    }
    return {QuantizePath::kCores, 16, threads_of_cores(factors, task.channels, 16), 1};
}

}  // namespace planish
