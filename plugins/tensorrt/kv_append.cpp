#include "kv_cache.h"

#include "planish_kernels.h"

namespace planish::plugin {

int launch(const PlanishKvAppend& node, const Call& call) {
    using Node = PlanishKvAppend;
    const int64_t batch = call.shapes[0][0];
    planish_append_kv task = {};
    task.cache = cache_of(node, call.outputs.data(), batch);
    task.cache.keys.clip = node.key_clip;
    task.cache.values.clip = node.value_clip;
    task.news = tokens_of<Node>(call);
    task.keys = call.inputs[Node::kKey];
    task.values = call.inputs[Node::kValue];
    // Where a host does not let inputs and outputs share memory, what the cache holds has to come along.
    const int64_t slots = batch * node.kv_heads * node.context;
    const int64_t bytes[] = {slots * 4 * node.key_words(), slots * 4, slots * 4 * node.value_words(), slots * 4};
    for (size_t i = 0; i < Node::kOutputs; ++i) {
        const void* past = call.inputs[Node::kKeyCache + i];
        if (past == call.outputs[i]) continue;
        if (const int status = copy(call.outputs[i], past, static_cast<size_t>(bytes[i]), call.stream)) return status;
    }
    return batch && task.news.tokens ? planish_append_kv_tokens(&task, call.stream) : PLANISH_OK;
}

}  // namespace planish::plugin
