#include "launch.h"
#include "planish_kernels.h"

namespace planish::plugin {
namespace {

planish_weight_segment segment(const Call& call, PlanishLinear::Input first, int32_t channels) {
    const auto input = [&](int i) { return call.inputs[static_cast<size_t>(first + i)]; };
    return {static_cast<const uint32_t*>(input(0)), static_cast<const float*>(input(1)),
            static_cast<const int32_t*>(input(2)), channels};
}

}  // namespace

int launch(const PlanishLinear& node, const Call& call) {
    using Node = PlanishLinear;
    planish_linear task = {};
    task.high = segment(call, Node::kHighWords, node.high_channels);
    task.low = segment(call, Node::kWords, node.channels);
    task.low_bits = node.bits;
    task.type = node.type;
    task.rows = node.rows;
    task.gated = node.gated;
    task.tokens = leading_size(call.shapes[0]);
    task.codes = static_cast<const uint8_t*>(call.inputs[Node::kCodes]);
    task.stride = 4 * node.code_words();
    task.token_scales = static_cast<const float*>(call.inputs[Node::kScales]);
    task.token_zero_sums = static_cast<const int32_t*>(call.inputs[Node::kZeroSums]);
    task.y = call.outputs[Node::kY];
    if (task.tokens == 0) return PLANISH_OK;
    if (const int status = planish_best_order(task.tokens, node.code_bits, &task.order)) return status;
    const auto run = task.tokens <= PLANISH_SMALL_TOKENS ? planish_small_linear : planish_large_linear;
    return run(&task, call.stream);
}

}  // namespace planish::plugin
