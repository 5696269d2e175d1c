// The launcher of linears for many tokens, and the kernel of large_linear.cuh for 8-bit MMAs, which every GPU has.

#include "large_kernel.cuh"

namespace planish {
namespace {

template <int BITS, bool HIGH>
__global__ void __launch_bounds__(kLargeThreads) large(const Linear linear) {
    large_block<BITS, HIGH, ByteCodes>(linear);
}

template <int BITS>
int launch(const Linear& linear, cudaStream_t stream) {
    dim3 grid;
    if (const int status = large_grid(linear, kLargeTokenTiles, grid)) return status;
    const auto kernel = linear.high.groups > 0 ? large<BITS, true> : large<BITS, false>;
    kernel<<<grid, kLargeThreads, 0, stream>>>(linear);
    return launched("planish_large_linear");
}

}  // namespace
}  // namespace planish

extern "C" int planish_large_linear(const planish_linear* task, void* stream) {
    planish::Linear linear;
    if (const int status = planish::read_linear(*task, linear)) return status;
    const auto on = static_cast<cudaStream_t>(stream);
    if (task->order == PLANISH_NIBBLES) return planish::launch_nibble_linear(linear, task->low_bits, on);
    if (task->order == PLANISH_COLUMNS) return planish::launch_wgmma_linear(linear, task->low_bits, on);
    const auto launch = task->low_bits == 2   ? planish::launch<2>
                        : task->low_bits == 3 ? planish::launch<3>
                                              : planish::launch<4>;
    return launch(linear, on);
}
