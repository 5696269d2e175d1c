#include <cmath>

#include "kv_cache.h"

namespace planish::plugin {
namespace {

// What the size of a workspace, and a plan, are read from.
planish_attend sizes_of(const PlanishKvAttend& node) {
    planish_attend task = {};
    void* const none[4] = {};
    task.cache = cache_of(node, none);
    task.heads = node.heads;
    task.score_scale = 1 / std::sqrt(static_cast<float>(node.head_dim));
    return task;
}

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
    // TensorRT shares the workspace among layers, and the kernel wants its counters zeroed before their first use.
    if (task.workspace_bytes) {
        if (const int status = clear(call.workspace, PLANISH_ATTEND_COUNTER_BYTES, call.stream)) return status;
    }
    return planish_attend_kv(&task, call.stream);
}

// An engine may run on another GPU than the one it was built on, so this is what a call takes on any.
size_t workspace_bytes(const PlanishKvAttend& node, const std::vector<Shape>& largest) {
    planish_attend task = sizes_of(node);
    task.news.batch = static_cast<int32_t>(largest[0][0]);
    task.news.tokens = 1;
    int64_t bytes = 0;
    // Shapes are those of a contract, and of a profile that configurePlugin took: there is nothing to refuse.
    return planish_attend_workspace(&task, &bytes) == PLANISH_OK ? static_cast<size_t>(bytes) : 0;
}

}  // namespace planish::plugin
