// The launcher of weight_only.cuh: up to 8 tokens by one tile of rows and one of tokens, up to 16 by two and two; more
// go in blocks of 32, which unpack weights once for all of them.
//
// Registers: at most 64, 128 and 255. Partial sums of 32 tokens and eight warps take 36 KB of shared memory.

#include "launch.cuh"

namespace planish {
namespace {

template <int TOKEN_TILES>
constexpr int kWarps = TOKEN_TILES == 1 ? 16 : 8;

template <int BITS, int ROW_TILES, int TOKEN_TILES>
__global__ void __launch_bounds__(kWarps<TOKEN_TILES>* kLanes, TOKEN_TILES <= 2 ? 2 : 1)
    weight_only(const WeightOnlyLinear linear) {
    extern __shared__ float partials[];
    const int warps = blockDim.x / kLanes, warp = DeviceWarp::index();
    const int64_t first_token = int64_t{blockIdx.y} * TOKEN_TILES * kTileTokens;
    sum_share_f16<BITS, DeviceWarp, ROW_TILES, TOKEN_TILES>(linear, blockIdx.x, first_token, warp, warps, partials);
    __syncthreads();
    finish_f16<ROW_TILES, TOKEN_TILES>(linear, blockIdx.x, first_token, threadIdx.x, blockDim.x, partials, warps);
}

template <int BITS, int ROW_TILES, int TOKEN_TILES>
int launch(const WeightOnlyLinear& linear, cudaStream_t stream) {
    constexpr int kMost = kWarps<TOKEN_TILES>;
    const int warps = static_cast<int>(linear.groups < kMost ? linear.groups : kMost);
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(row_tiles_of(linear.rows), ROW_TILES)),
                    static_cast<unsigned>(ceil_div(linear.tokens.count, TOKEN_TILES * kTileTokens)));
    if (grid.y > 65535)
        return fail(PLANISH_BAD_ARGUMENT, "%d tokens are more than a launch can have", linear.tokens.count);
    const size_t bytes = warps * kHalfPartials<ROW_TILES, TOKEN_TILES> * sizeof(float);
    weight_only<BITS, ROW_TILES, TOKEN_TILES><<<grid, warps * kLanes, bytes, stream>>>(linear);
    return launched("planish_weight_only_linear");
}

template <int BITS>
int launch(const WeightOnlyLinear& linear, cudaStream_t stream) {
    if (linear.tokens.count <= 8) return launch<BITS, 1, 1>(linear, stream);
    if (linear.tokens.count <= 16) return launch<BITS, 2, 2>(linear, stream);
    return launch<BITS, 2, 4>(linear, stream);
}

}  // namespace
}  // namespace planish

extern "C" int planish_weight_only_linear(const planish_weight_only* task, void* stream) {
    planish::WeightOnlyLinear linear;
    if (const int status = planish::read_weight_only(*task, linear)) return status;
    const auto launch = task->bits == 2   ? planish::launch<2>
                        : task->bits == 3 ? planish::launch<3>
                                          : planish::launch<4>;
    return launch(linear, static_cast<cudaStream_t>(stream));
}
