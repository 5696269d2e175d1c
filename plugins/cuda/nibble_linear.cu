// The kernel of large_linear.cuh for 4-bit MMAs, on compute capability 8.x: twice the products of 8-bit ones in the
// same time, and half the instructions to unpack.
//
// Later GPUs run such an MMA as a subroutine of some 150 instructions, so for them this file compiles to an empty
// kernel and the launcher refuses.

#include "large_kernel.cuh"

namespace planish {
namespace {

template <int BITS, bool HIGH>
__global__ void __launch_bounds__(kLargeThreads, 1) large_nibbles(const Linear linear) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    large_block<BITS, HIGH, NibbleCodes>(linear);
#endif
}

template <int BITS>
int launch(const Linear& linear, cudaStream_t stream) {
    dim3 grid;
    if (const int status = large_grid(linear, kLargeTokenTiles, grid)) return status;
    const auto kernel = linear.high.groups > 0 ? large_nibbles<BITS, true> : large_nibbles<BITS, false>;
    kernel<<<grid, kLargeThreads, 0, stream>>>(linear);
    return launched("planish_large_linear");
}

}  // namespace

int launch_nibble_linear(const Linear& linear, int bits, cudaStream_t stream) {
    int capability = 0;
    if (const int status = read_capability(capability)) return status;
    if (capability / 10 != 8) {
        return fail(PLANISH_BAD_ARGUMENT,
                    "codes in the order PLANISH_NIBBLES are for compute capability 8.x, not %d.%d", capability / 10,
                    capability % 10);
    }
    const auto launch = bits == 2 ? planish::launch<2> : bits == 3 ? planish::launch<3> : planish::launch<4>;
    return launch(linear, stream);
}

}  // namespace planish
