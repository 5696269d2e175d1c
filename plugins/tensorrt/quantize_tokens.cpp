#include <algorithm>

#include "launch.h"
#include "planish_kernels.h"

namespace planish::plugin {

int launch(const PlanishQuantizeTokens& node, const Call& call) {
    using Node = PlanishQuantizeTokens;
    const planish_code_segment rest = {node.channels, static_cast<int32_t>(padded_channels(node.channels, node.bits)),
                                       node.activation_bits, node.clip};
    const int32_t most_bits = std::max(node.activation_bits, node.high_channels ? node.high_activation_bits : 0);
    planish_quantize task = {};
    task.x = call.inputs[Node::kX];
    if (node.added) {
        task.residual = call.inputs[Node::kResidual];
        task.sum = call.outputs[Node::kSum];
    }
    if (node.normed) {
        task.gain = static_cast<const float*>(call.inputs[Node::kGain]);
        task.epsilon = node.epsilon;
    }
    task.right = static_cast<const float*>(call.inputs[Node::kRight]);
    task.left = static_cast<const float*>(call.inputs[Node::kLeft]);
    task.right_count = node.right_count;
    task.m = node.m;
    task.k = node.k;
    task.permutation = static_cast<const int32_t*>(call.inputs[Node::kPermutation]);
    if (node.high_channels) {
        task.segments[task.segment_count++] = {node.high_channels, node.high_channels, node.high_activation_bits,
                                               node.high_clip};
    }
    task.segments[task.segment_count++] = rest;
    task.type = static_cast<int32_t>(call.type);
    task.channels = static_cast<int32_t>(node.width());
    task.tokens = leading_size(call.shapes[0]);
    if (task.tokens == 0) return PLANISH_OK;
    task.codes = static_cast<uint8_t*>(call.outputs[Node::kCodes]);
    task.stride = 4 * node.code_words();
    // The linear behind asks for the same order. A token has the room that the widest one takes.
    if (const int status = planish_best_order(task.tokens, most_bits, &task.order)) return status;
    task.scales = static_cast<float*>(call.outputs[Node::kScales]);
    task.zero_sums = static_cast<int32_t*>(call.outputs[Node::kZeroSums]);
    if (task.tokens <= PLANISH_SPREAD_TOKENS) task.workspace = static_cast<float*>(call.workspace);
    return planish_quantize_tokens(&task, call.stream);
}

size_t workspace_bytes(const PlanishQuantizeTokens& node, const std::vector<Shape>& largest) {
    if (node.right_count < 2) return 0;
    const int64_t tokens = std::min<int64_t>(leading_size(largest[0]), PLANISH_SPREAD_TOKENS);
    return static_cast<size_t>(tokens * node.width()) * sizeof(float);
}

}  // namespace planish::plugin
