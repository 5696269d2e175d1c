#include "kv_cache.h"

namespace planish::plugin {

int launch(const PlanishKvAppend& node, const Call& call) {
    using Node = PlanishKvAppend;
    planish_append task = {};
    task.cache = cache_of(node, call.outputs.data());
    task.news = tokens_of<Node>(call);
    task.keys = call.inputs[Node::kKey];
    task.values = call.inputs[Node::kValue];
    task.stride = int64_t{node.kv_heads} * node.head_dim;
    task.type = static_cast<int32_t>(call.type);
    task.key_clip = node.key_clip;
    task.value_clip = node.value_clip;
    // Where a host does not let inputs and outputs share memory, what the cache holds has to come along.
    const int64_t rows = int64_t{task.news.batch} * node.kv_heads * node.context;
    const int64_t bytes[] = {rows * 4 * node.key_words(), rows * 4, rows * 4 * node.value_words(), rows * 4};
    for (size_t i = 0; i < Node::kOutputs; ++i) {
        const void* past = call.inputs[Node::kKeyCache + i];
        if (past == call.outputs[i]) continue;
        if (const int status = copy(call.outputs[i], past, static_cast<size_t>(bytes[i]), call.stream)) return status;
    }
    return task.news.batch && task.news.tokens ? planish_append_kv(&task, call.stream) : PLANISH_OK;
}

}  // namespace planish::plugin
