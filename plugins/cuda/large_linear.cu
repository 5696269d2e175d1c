// The launcher of large_linear.cuh: any number of tokens.
//
// Registers of a thread: 64 sums, at 3 bits 48 words of two groups for two tiles, 16 unpacked codes, and 64 outputs
// where there is a high segment. That is 150 to 255, so one block of 256 threads to an SM: eight warps, two to each of
// its tensor cores, whose loads from shared memory hide behind each other's MMAs.

#include "large_linear.cuh"
#include "launch.cuh"

namespace planish {
namespace {

// 16 bytes to shared memory in the background, or zeros.
__device__ __forceinline__ void copy_async(uint8_t* to, const uint8_t* from, bool valid) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until no more than the newest group of copies is under way.
__device__ __forceinline__ void wait_for_older_copies() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

// All groups of one segment: stage i & 1 holds group i, the other one is being filled.
template <int BITS>
__device__ __forceinline__ void add_segment(const Linear& linear, const WeightSegment& weights, int64_t channel,
                                            int64_t token_block, const int64_t (&row_tiles)[kLargeRowTiles],
                                            LargeSums<DeviceWarp>& sums, uint8_t* stages) {
    using Words = DeviceWarp::PerLane<GroupWords<BITS>>;
    const auto fill = [&](int64_t group) {
        if (group < weights.groups) {
            fill_stage<BITS>(linear.tokens, token_block, channel + group * group_channels(BITS),
                             stages + (group & 1) * stage_bytes(BITS), threadIdx.x, kLargeWarps * kLanes, copy_async);
        }
        // A group without copies too, so that the one to wait for is always the older of two.
        commit_copies();
    };
    Words words[kLargeRowTiles], ahead[kLargeRowTiles];
    fill(0);
    load_groups<BITS, DeviceWarp>(ahead, weights.words, row_tiles, weights.groups, 0);
    for (int64_t group = 0; group < weights.groups; ++group) {
        fill(group + 1);
        for (int r = 0; r < kLargeRowTiles; ++r) words[r] = ahead[r];
        if (group + 1 < weights.groups) {
            load_groups<BITS, DeviceWarp>(ahead, weights.words, row_tiles, weights.groups, group + 1);
        }
        wait_for_older_copies();
        __syncthreads();
        add_group<BITS, DeviceWarp>(sums, words, stages + (group & 1) * stage_bytes(BITS));
        // The stage that was read is the next to be filled.
        __syncthreads();
    }
}

template <int BITS, bool HIGH>
__global__ void __launch_bounds__(kLargeWarps* kLanes) large(const Linear linear) {
    // The widest stage is that of 3 bits.
    __shared__ __align__(16)
        uint8_t stages[2 * (stage_bytes(BITS) > stage_bytes(kHighBits) ? stage_bytes(BITS) : stage_bytes(kHighBits))];
    const int64_t token_block = blockIdx.x, row_block = blockIdx.y;
    const int warp = DeviceWarp::index();
    int64_t row_tiles[kLargeRowTiles];
    large_row_tiles(linear, row_block, warp, row_tiles);
    LargeSums<DeviceWarp> sums = {};
    LargeOutputs<DeviceWarp> outputs = {};
    add_segment<BITS>(linear, linear.low, low_channel(linear), token_block, row_tiles, sums, stages);
    finish_segment<DeviceWarp>(linear, HIGH ? 1 : 0, BITS, row_block, token_block, warp, sums, outputs);
    // Last, though these channels come first: beside the outputs of the other segment there are no registers for the
    // words of 3-bit groups, but for those of 4 bits there are.
    if constexpr (HIGH) {
        add_segment<kHighBits>(linear, linear.high, 0, token_block, row_tiles, sums, stages);
        finish_segment<DeviceWarp>(linear, 0, BITS, row_block, token_block, warp, sums, outputs);
    }
    store_outputs<DeviceWarp>(linear, row_block, token_block, warp, outputs);
}

template <int BITS>
int launch(const Linear& linear, cudaStream_t stream) {
    // Blocks that read the same weights are neighbours, so that all but the first find them in L2.
    const dim3 grid(ceil_div(linear.tokens.count, kLargeTokens),
                    static_cast<unsigned>(ceil_div<int64_t>(linear.rows, kLargeRows)));
    if (grid.y > 65535)
        return fail(PLANISH_BAD_ARGUMENT, "%lld rows are more than a launch can have",
                    static_cast<long long>(linear.rows));
    const auto kernel = linear.high.groups > 0 ? large<BITS, true> : large<BITS, false>;
    kernel<<<grid, kLargeWarps * kLanes, 0, stream>>>(linear);
    return launched("planish_large_linear");
}

}  // namespace
}  // namespace planish

extern "C" int planish_large_linear(const planish_linear* task, void* stream) {
    planish::Linear linear;
    if (const int status = planish::read_linear(*task, linear)) return status;
    const auto launch = task->low_bits == 2   ? planish::launch<2>
                        : task->low_bits == 3 ? planish::launch<3>
                                              : planish::launch<4>;
    return launch(linear, static_cast<cudaStream_t>(stream));
}
