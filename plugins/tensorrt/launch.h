// What a node of the graph does at run time: a call of planish_kernels.h. Knows no TensorRT.
#pragma once

#include "contracts.h"

namespace planish::plugin {

// The tensors of a call, inputs and outputs by their number in the contract; null where a node has no such input.
struct Call {
    std::vector<const void*> inputs;
    std::vector<void*> outputs;
    std::vector<Shape> shapes;  // of the inputs
    Type type;                  // of the first input
    void* workspace;
    void* stream;
};

// Enqueue the work on the stream. The result is a status of planish_kernels.h.
int launch(const PlanishQuantizeTokens& node, const Call& call);
int launch(const PlanishLinear& node, const Call& call);
int launch(const PlanishKvAppend& node, const Call& call);
int launch(const PlanishKvAttend& node, const Call& call);

// The workspace that a call needs at most, in bytes, by the largest shapes of its inputs.
template <class Node>
size_t workspace_bytes(const Node&, const std::vector<Shape>&) {
    return 0;
}
size_t workspace_bytes(const PlanishQuantizeTokens& node, const std::vector<Shape>& largest);
size_t workspace_bytes(const PlanishKvAttend& node, const std::vector<Shape>& largest);

// Enqueue a copy between two places of device memory, and zeros; the results are statuses of planish_kernels.h.
int copy(void* to, const void* from, size_t bytes, void* stream);
int clear(void* to, size_t bytes, void* stream);

// What the GPU of this thread is lacking; empty if nothing.
std::string problem_of_device();

}  // namespace planish::plugin
