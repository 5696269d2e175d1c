// The launcher of small_linear.cuh: up to 16 tokens.
//
// One token or two go by dot products, three to eight by one tile of rows and one MMA tile of tokens per warp, up to 16
// by two and two: a block then reads the codes of its tokens from L2 once for 32 rows, and with fewer rows those reads
// would outweigh the weights.
//
// Registers: at most 64 for the first two kinds (32 warps to an SM, each with two groups of words under way: 96 KB of
// weights in flight, several times what it takes to fill the memory's latency), 128 for the last.

#include "launch.cuh"
#include "small_linear.cuh"

namespace planish {
namespace {

constexpr int kMostWarps = 16;
// Two segments of partial sums of 2 x 2 tiles and 8 warps fit into the 48 KB that need no permission; of 16 they do
// not.
constexpr int kMostWideWarps = 8;

template <int BITS, int TOKENS>
__global__ void __launch_bounds__(kMostWarps* kLanes, 2) small_dot(const Linear linear) {
    extern __shared__ int32_t partials[];
    const int warps = blockDim.x / kLanes, warp = DeviceWarp::index();
    sum_share_dot<BITS, DeviceWarp, TOKENS>(linear, blockIdx.x, warp, warps, partials);
    __syncthreads();
    finish_outputs<kTileRows, kTileRows>(linear, BITS, int64_t{blockIdx.x} * kTileRows, threadIdx.x, blockDim.x,
                                         partials, 4 * warps, TOKENS * kTileRows);
}

template <int BITS, int TILES>
__global__ void __launch_bounds__((TILES == 1 ? kMostWarps : kMostWideWarps) * kLanes, 2)
    small_mma(const Linear linear) {
    extern __shared__ int32_t partials[];
    constexpr int kRows = TILES * kTileRows;
    const int warps = blockDim.x / kLanes, warp = DeviceWarp::index();
    sum_share_mma<BITS, DeviceWarp, TILES, TILES>(linear, blockIdx.x, warp, warps, partials);
    __syncthreads();
    finish_outputs<kRows, kTokenStride<TILES>>(linear, BITS, int64_t{blockIdx.x} * kRows, threadIdx.x, blockDim.x,
                                               partials, warps, kWarpPartials<TILES, TILES>);
}

// Warps that share K: as many as there are groups for them.
int warps_for(const Linear& linear, int most) {
    const int64_t groups = linear.low.groups > linear.high.groups ? linear.low.groups : linear.high.groups;
    return static_cast<int>(groups < most ? groups : most);
}

template <int BITS>
int launch(const Linear& linear, cudaStream_t stream) {
    const auto row_tiles = static_cast<unsigned>(row_tiles_of(linear.rows));
    const int tokens = linear.tokens.count, segments = segments_of(linear);
    const auto bytes = [&](int ints) { return ints * segments * sizeof(int32_t); };
    if (tokens > 8) {
        const int warps = warps_for(linear, kMostWideWarps);
        small_mma<BITS, 2>
            <<<ceil_div(row_tiles, 2u), warps * kLanes, bytes(warps * kWarpPartials<2, 2>), stream>>>(linear);
    } else if (tokens > 2) {
        const int warps = warps_for(linear, kMostWarps);
        small_mma<BITS, 1><<<row_tiles, warps * kLanes, bytes(warps * kWarpPartials<1, 1>), stream>>>(linear);
    } else {
        const int warps = warps_for(linear, kMostWarps);
        const auto kernel = tokens == 1 ? small_dot<BITS, 1> : small_dot<BITS, 2>;
        kernel<<<row_tiles, warps * kLanes, bytes(warps * 4 * tokens * kTileRows), stream>>>(linear);
    }
    return launched("planish_small_linear");
}

}  // namespace
}  // namespace planish

extern "C" int planish_small_linear(const planish_linear* task, void* stream) {
    planish::Linear linear;
    if (const int status = planish::read_small_linear(*task, linear)) return status;
    const auto launch = task->low_bits == 2   ? planish::launch<2>
                        : task->low_bits == 3 ? planish::launch<3>
                                              : planish::launch<4>;
    return launch(linear, static_cast<cudaStream_t>(stream));
}
