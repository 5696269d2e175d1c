#include <algorithm>
#include <cmath>

#include "kv_cache.h"

namespace planish::plugin {
namespace {

// What a plan reads of a task.
planish_attend sizes_of(const PlanishKvAttend& node) {
    planish_attend task = {};
    void* const none[4] = {};
    task.cache = cache_of(node, none);
    task.heads = node.heads;
    task.score_scale = 1 / std::sqrt(static_cast<float>(node.head_dim));
    return task;
}

// Past this many queries to a KV head, kernels split nothing and take no workspace.
constexpr int64_t kMostSplitQueries = 64;

}  // namespace

int launch(const PlanishKvAttend& node, const Call& call) {
    using Node = PlanishKvAttend;
    planish_attend task = sizes_of(node);
    task.news = tokens_of<Node>(call);
    if (!task.news.batch || !task.news.tokens) return PLANISH_OK;
    void* tensors[4];
    for (size_t i = 0; i < 4; ++i) tensors[i] = const_cast<void*>(call.inputs[Node::kKeyCache + i]);
    task.cache = cache_of(node, tensors);
    task.queries = call.inputs[Node::kQuery];
    task.stride = int64_t{node.heads} * node.head_dim;
    task.y = call.outputs[Node::kY];
    task.type = static_cast<int32_t>(call.type);
    if (const int status = planish_plan_attend(&task)) return status;
    task.workspace = call.workspace;
    // TensorRT shares the workspace among layers, and the kernel wants it zeroed before its first use.
    if (task.workspace_bytes) {
        const auto bytes = static_cast<size_t>(task.workspace_bytes);
        if (const int status = clear(call.workspace, bytes, call.stream)) return status;
    }
    return planish_attend_kv(&task, call.stream);
}

size_t workspace_bytes(const PlanishKvAttend& node, const std::vector<Shape>& largest) {
    planish_attend task = sizes_of(node);
    int64_t most = 0;
    // Fewer sequences are split into more parts, so the largest call need not take the most.
    for (int64_t batch = 1; batch <= largest[0][0]; ++batch) {
        for (int64_t tokens = 1; tokens <= std::min(largest[0][1], kMostSplitQueries); ++tokens) {
            task.news.batch = static_cast<int32_t>(batch);
            task.news.tokens = static_cast<int32_t>(tokens);
            task.news.past = reinterpret_cast<const int32_t*>(&task);
            if (planish_plan_attend(&task) == PLANISH_OK) most = std::max(most, task.workspace_bytes);
        }
    }
    return static_cast<size_t>(most);
}

}  // namespace planish::plugin
