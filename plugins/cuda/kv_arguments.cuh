// The checks of all arguments of the cache's kernels, and how its tokens are split. No CUDA: tests run them on the
// host.
#pragma once

#include "arguments.cuh"
#include "kv_append.cuh"
#include "kv_warps.cuh"
#include "planish_kv.h"

namespace planish {

// Blocks of few columns that a multiprocessor has at once.
constexpr int kBlocksPerSm = 4;
// Fewer tokens than this are not worth a block.
constexpr int kSplitTokens = 2 * kAttendWarps * kTokenTile;
constexpr int64_t kCounterBytes = sizeof(uint32_t);

// Bytes of the parts in the workspace, [batch][kv_heads][splits][columns][kPartFloats]; counters are behind them.
inline int64_t part_bytes(const Attend& task, int splits) {
    const int64_t columns = int64_t{task.news.batch} * task.cache.kv_heads * splits * columns_of(task);
    return columns * (kPartNumbers + task.cache.head_dim) * static_cast<int64_t>(sizeof(float));
}

// Checks an append and turns it into the form that kernels take; `task` is the result.
int read_append(const planish_append& given, Append& task);

// The same for attention.
int read_attend(const planish_attend& given, Attend& task);

// Sets splits and workspace_bytes: as many splits as fill the GPU once and are worth a block each.
int plan_attend(planish_attend& given, int multiprocessors);

}  // namespace planish
