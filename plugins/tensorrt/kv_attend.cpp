#include "kv_cache.h"

#include "planish_kernels.h"

namespace planish::plugin {

int launch(const PlanishKvAttend& node, const Call& call) {
    using Node = PlanishKvAttend;
    const int64_t batch = call.shapes[0][0];
    void* tensors[4];
    for (size_t i = 0; i < 4; ++i) tensors[i] = const_cast<void*>(call.inputs[Node::kKeyCache + i]);
    planish_attend_kv task = {};
    task.cache = cache_of(node, tensors, batch);
    task.news = tokens_of<Node>(call);
    task.queries = call.inputs[Node::kQuery];
    task.y = call.outputs[Node::kY];
    task.heads = node.heads;
    task.workspace = call.workspace;
    return batch && task.news.tokens ? planish_attend_kv_tokens(&task, call.stream) : PLANISH_OK;
}

size_t workspace_bytes(const PlanishKvAttend& node, const std::vector<Shape>& largest) {
    void* const none[4] = {};
    planish_attend_kv task = {};
    task.cache = cache_of(node, none, largest[0][0]);
    task.news.tokens = static_cast<int32_t>(largest[0][1]);
    task.heads = node.heads;
    return static_cast<size_t>(planish_attend_kv_workspace(&task));
}

}  // namespace planish::plugin
