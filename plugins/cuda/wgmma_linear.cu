// The kernel of wgmma_linear.cuh, on compute capability 9.0 alone; for other GPUs it is a trap and the launcher
// refuses.

#include "copy_async.cuh"
#include "large_kernel.cuh"
#include "wgmma_linear.cuh"

namespace planish {
namespace {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// wgmma reads shared memory by another path than the copies write it.
__device__ __forceinline__ void publish_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// All spans of one segment: stage i % 3 holds span i.
template <int BITS, int TOKEN_TILES>
__device__ __forceinline__ void add_segment_wgmma(const Linear& linear, const WeightSegment& weights, int64_t channel,
                                                  int64_t token_block, const int64_t (&row_tiles)[kLargeRowTiles],
                                                  LargeSums<DeviceWarp, TOKEN_TILES>& sums, uint8_t* stages) {
    constexpr int kStage = stage_bytes<ColumnCodes>(kSpanTiles, TOKEN_TILES);
    using Words = DeviceWarp::PerLane<SpanWords<BITS>>;
    const int spans = static_cast<int>(spans_of(weights, BITS));
    const auto fill = [&](int span, int stage) {
        if (span < spans) {
            fill_stage<kSpanTiles, TOKEN_TILES, ColumnCodes>(
                linear.tokens, token_block, channel + int64_t{span} * kSpanChannels, tiles_of_span<BITS>(weights, span),
                stages + stage * kStage, threadIdx.x, copy_async);
        }
        commit_copies();
    };
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(stages));
    Words words[kLargeRowTiles];
    // A slower warp may still read what the segment before left.
    __syncthreads();
    fill(0, 0);
    fill(1, 1);
    load_span<BITS, DeviceWarp>(words, weights, row_tiles, 0);
    int stage = 0;
    for (int span = 0; span < spans; ++span) {
        wait_for_copies<1>();
        publish_copies();
        __syncthreads();
        fill(span + 2, stage == 0 ? 2 : stage - 1);
        add_span<BITS, DeviceWarp>(sums, words, weights, row_tiles, span, address + stage * kStage, DeviceWgmma{});
        stage = stage == 2 ? 0 : stage + 1;
    }
}

#endif

template <int BITS, bool HIGH, int TOKEN_TILES>
__global__ void __launch_bounds__(kLargeThreads, 1) large_wgmma(const Linear linear) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) uint8_t stages[];
    const LargePlace place = {blockIdx.y, blockIdx.x, DeviceWarp::index()};
    int64_t row_tiles[kLargeRowTiles];
    large_row_tiles(linear, place, row_tiles);
    LargeSums<DeviceWarp, TOKEN_TILES> sums = {};
    LargeOutputs<DeviceWarp, TOKEN_TILES> outputs = {};
    add_segment_wgmma<BITS>(linear, linear.low, low_channel(linear), place.token_block, row_tiles, sums, stages);
    finish_segment(linear, HIGH ? 1 : 0, BITS, place, sums, outputs);
    if constexpr (HIGH) {
        add_segment_wgmma<kHighBits>(linear, linear.high, 0, place.token_block, row_tiles, sums, stages);
        finish_segment(linear, 0, BITS, place, sums, outputs);
    }
    store_outputs(linear, place, outputs);
#else
    __trap();
#endif
}

template <int BITS, bool HIGH, int TOKEN_TILES>
int launch(const Linear& linear, cudaStream_t stream) {
    dim3 grid;
    if (const int status = large_grid(linear, TOKEN_TILES, grid)) return status;
    constexpr int kBytes = kSpanStages * stage_bytes<ColumnCodes>(kSpanTiles, TOKEN_TILES);
    constexpr auto kernel = large_wgmma<BITS, HIGH, TOKEN_TILES>;
    if (const int status = allow_shared(reinterpret_cast<const void*>(kernel), kBytes)) return status;
    kernel<<<grid, kLargeThreads, kBytes, stream>>>(linear);
    return launched("planish_large_linear");
}

template <int BITS>
int launch(const Linear& linear, cudaStream_t stream) {
    return linear.high.groups > 0 ? launch<BITS, true, 8>(linear, stream) : launch<BITS, false, 16>(linear, stream);
}

}  // namespace

int launch_wgmma_linear(const Linear& linear, int bits, cudaStream_t stream) {
    int capability = 0;
    if (const int status = read_capability(capability)) return status;
    if (capability != 90) {
        return fail(PLANISH_BAD_ARGUMENT,
                    "codes in the order PLANISH_COLUMNS are for compute capability 9.0, not %d.%d", capability / 10,
                    capability % 10);
    }
    const auto launch = bits == 2 ? planish::launch<2> : bits == 3 ? planish::launch<3> : planish::launch<4>;
    return launch(linear, stream);
}

}  // namespace planish
