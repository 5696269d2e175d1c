// The packed cache of a node, as kernels take it.
#pragma once

#include "launch.h"
#include "planish_kv.h"

namespace planish::plugin {

// `tensors` are codes and scales of keys, then of values.
template <class Node>
planish_kv_cache cache_of(const Node& node, void* const* tensors) {
    planish_kv_cache cache = {};
    cache.keys = static_cast<uint8_t*>(tensors[0]);
    cache.key_scales = static_cast<uint16_t*>(tensors[1]);
    cache.values = static_cast<uint8_t*>(tensors[2]);
    cache.value_scales = static_cast<uint16_t*>(tensors[3]);
    cache.capacity = node.context;
    cache.kv_heads = node.kv_heads;
    cache.head_dim = node.head_dim;
    cache.key_bits = node.key_bits;
    cache.value_bits = node.value_bits;
    return cache;
}

// Both nodes of the cache have these inputs under the same names; the first is [batch][tokens][channels].
template <class Node>
planish_kv_tokens tokens_of(const Call& call) {
    return {static_cast<int32_t>(call.shapes[0][0]), static_cast<int32_t>(call.shapes[0][1]),
            static_cast<const int32_t*>(call.inputs[Node::kPastLengths]),
            static_cast<const int32_t*>(call.inputs[Node::kNewLengths])};
}

}  // namespace planish::plugin
