// The kernel of large_linear.cuh, for 8-bit and for 4-bit MMAs.
//
// Registers of a thread: 64 sums, at 3 bits 48 words of two groups for two tiles, up to 16 unpacked codes, and 64
// outputs where there is a high segment. That is 150 to 255, so one block of 256 threads to an SM: eight warps, two to
// each of its tensor cores, whose loads from shared memory hide behind each other's MMAs.
#pragma once

#include "copy_async.cuh"
#include "large_linear.cuh"
#include "launch.cuh"

namespace planish {

// All groups of one segment: stage i & 1 holds group i, the other one is being filled.
template <int BITS, class Codes>
__device__ __forceinline__ void add_segment(const Linear& linear, const WeightSegment& weights, int64_t channel,
                                            int64_t token_block, const int64_t (&row_tiles)[kLargeRowTiles],
                                            LargeSums<DeviceWarp, kLargeTokenTiles>& sums, uint8_t* stages) {
    constexpr int kTiles = group_tiles(BITS), kStage = stage_bytes<Codes>(kTiles, kLargeTokenTiles);
    using Words = DeviceWarp::PerLane<GroupWords<BITS>>;
    const auto fill = [&](int64_t group) {
        if (group < weights.groups) {
            fill_stage<kTiles, kLargeTokenTiles, Codes>(linear.tokens, token_block,
                                                        channel + group * group_channels(BITS), kTiles,
                                                        stages + (group & 1) * kStage, threadIdx.x, copy_async);
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
        wait_for_copies<1>();
        __syncthreads();
        add_group<BITS, Codes, DeviceWarp>(sums, words, stages + (group & 1) * kStage);
        // The stage that was read is the next to be filled.
        __syncthreads();
    }
}

template <int BITS, bool HIGH, class Codes>
__device__ __forceinline__ void large_block(const Linear& linear) {
    // The widest stage is that of 3 bits.
    constexpr int kTiles = group_tiles(BITS) > group_tiles(kHighBits) ? group_tiles(BITS) : group_tiles(kHighBits);
    __shared__ __align__(16) uint8_t stages[2 * stage_bytes<Codes>(kTiles, kLargeTokenTiles)];
    const LargePlace place = {blockIdx.y, blockIdx.x, DeviceWarp::index()};
    int64_t row_tiles[kLargeRowTiles];
    large_row_tiles(linear, place, row_tiles);
    LargeSums<DeviceWarp, kLargeTokenTiles> sums = {};
    LargeOutputs<DeviceWarp, kLargeTokenTiles> outputs = {};
    add_segment<BITS, Codes>(linear, linear.low, low_channel(linear), place.token_block, row_tiles, sums, stages);
    finish_segment(linear, HIGH ? 1 : 0, BITS, place, sums, outputs);
    // Last, though these channels come first: beside the outputs of the other segment there are no registers for the
    // words of 3-bit groups, but for those of 4 bits there are.
    if constexpr (HIGH) {
        add_segment<kHighBits, Codes>(linear, linear.high, 0, place.token_block, row_tiles, sums, stages);
        finish_segment(linear, 0, BITS, place, sums, outputs);
    }
    store_outputs(linear, place, outputs);
}

// Blocks that read the same weights are neighbours, so that all but the first find them in L2.
inline int large_grid(const Linear& linear, int token_tiles, dim3& grid) {
    grid = dim3(ceil_div(linear.tokens.count, token_tiles * kTileTokens),
                static_cast<unsigned>(ceil_div<int64_t>(linear.rows, kLargeRows)));
    if (grid.y <= 65535) return PLANISH_OK;
    return fail(PLANISH_BAD_ARGUMENT, "%lld rows are more than a launch can have", static_cast<long long>(linear.rows));
}

// The launchers of the other orders, see nibble_linear.cu and wgmma_linear.cu.
int launch_nibble_linear(const Linear& linear, int bits, cudaStream_t stream);
int launch_wgmma_linear(const Linear& linear, int bits, cudaStream_t stream);

}  // namespace planish
