// The packed cache of a node, as kernels take it.
#pragma once

#include "kv_kernels.h"
#include "launch.h"

namespace planish::plugin {

// `tensors` are codes and grids of keys, then of values.
template <class Node>
planish_kv_cache cache_of(const Node& node, void* const* tensors, int64_t batch) {
    planish_kv_cache cache = {};
    cache.keys = {static_cast<uint8_t*>(tensors[0]), tensors[1], node.key_bits, 1};
    cache.values = {static_cast<uint8_t*>(tensors[2]), tensors[3], node.value_bits, 1};
    cache.batch = static_cast<int32_t>(batch);
    cache.kv_heads = node.kv_heads;
    cache.head_dim = node.head_dim;
    cache.capacity = node.context;
    return cache;
}

// Both nodes of the cache have these inputs under the same names.
template <class Node>
planish_kv_tokens tokens_of(const Call& call) {
    return {static_cast<const int32_t*>(call.inputs[Node::kPastLengths]),
            static_cast<const int32_t*>(call.inputs[Node::kNewLengths]), static_cast<int32_t>(call.shapes[0][1]),
            static_cast<int32_t>(call.type)};
}

}  // namespace planish::plugin
