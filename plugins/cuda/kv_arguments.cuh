// The checks of all arguments of the cache's kernels, and how its tokens are split. No CUDA: tests run them on the
// host.
#pragma once

#include "arguments.cuh"
#include "kv_append.cuh"
#include "kv_warps.cuh"
#include "planish_kv.h"

namespace planish {

// Fewer tokens than this are not worth a block.
constexpr int kSplitTokens = 2 * kAttendWarps * kTokenTile;
// Blocks that splits are made for at most, so that what a workspace takes does not depend on the GPU; none today has
// room for more.
constexpr int kMostBlocks = PLANISH_ATTEND_COUNTER_BYTES / sizeof(uint32_t);

// Bytes of the parts in the workspace, [batch][kv_heads][splits][columns][kPartFloats]. Counters are in front of them,
// a fixed number: behind them they would be where the parts of a call with another plan are.
inline int64_t part_bytes(const Attend& task, int splits) {
    const int64_t columns = int64_t{task.news.batch} * task.cache.kv_heads * splits * columns_of(task);
    return columns * (kPartNumbers + task.cache.head_dim) * static_cast<int64_t>(sizeof(float));
}

// Checks an append and turns it into the form that kernels take; `task` is the result.
int read_append(const planish_append& given, Append& task);

// The same for attention.
int read_attend(const planish_attend& given, Attend& task);

// Checks shapes and turns them into the form that plans take; what arrays there are is not looked at.
int read_shapes(const planish_attend& given, Attend& task);

// Sets splits and workspace_bytes of a task of these shapes: as many splits as fill the GPU once, which has room for
// `blocks` of them, and are worth a block each.
void plan_attend(const Attend& task, int blocks, planish_attend& given);

}  // namespace planish
