// Runs the blocks of the GPU kernels on the host, warp by warp and phase by phase, for the tests in Python.

#include <cstddef>
#include <cstring>
#include <vector>

#include "large_linear.cuh"
#include "quantize_row.cuh"
#include "small_linear.cuh"

using namespace planish;

namespace {

// Mirrors `Linear` with the pointers that ctypes passes; see test_linears.py.
struct Call {
    const uint32_t* high_words;
    const float* high_scales;
    const int32_t* high_sums;
    int64_t high_groups;
    const uint32_t* low_words;
    const float* low_scales;
    const int32_t* low_sums;
    int64_t low_groups;
    int64_t rows;
    const uint8_t* codes;
    int64_t stride;
    int64_t tokens;
    const float* token_scales;
    const TokenSum* token_sums;
    float* y;
};

Linear linear_of(const Call& call) {
    return {{call.high_words, call.high_scales, call.high_sums, call.high_groups},
            {call.low_words, call.low_scales, call.low_sums, call.low_groups},
            call.rows,
            {call.codes, call.stride, static_cast<int>(call.tokens)},
            call.token_scales,
            call.token_sums,
            call.y,
            OutputType::kFloat32};
}

template <int BITS, int ROW_TILES, int TOKEN_TILES>
void by_mma(const Linear& linear, int warps, int threads) {
    constexpr int kPartials = kWarpPartials<ROW_TILES, TOKEN_TILES>;
    std::vector<int32_t> partials(static_cast<std::size_t>(2 * warps * kPartials), -1);
    for (int64_t block = 0; block < ceil_div<int64_t>(row_tiles_of(linear.rows), ROW_TILES); ++block) {
        for (int warp = 0; warp < warps; ++warp) {
            sum_share_mma<BITS, HostWarp, ROW_TILES, TOKEN_TILES>(linear, block, warp, warps, partials.data());
        }
        for (int thread = 0; thread < threads; ++thread) {
            finish_outputs(linear, BITS, block * ROW_TILES * kTileRows, ROW_TILES * kTileRows, thread, threads,
                           partials.data(), warps, kPartials, kTokenStride<ROW_TILES>);
        }
    }
}

template <int BITS, int TOKENS>
void by_dot(const Linear& linear, int warps, int threads) {
    constexpr int kPartials = TOKENS * kTileRows;
    std::vector<int32_t> partials(static_cast<std::size_t>(2 * warps * 4 * kPartials), -1);
    for (int64_t block = 0; block < row_tiles_of(linear.rows); ++block) {
        for (int warp = 0; warp < warps; ++warp) {
            sum_share_dot<BITS, HostWarp, TOKENS>(linear, block, warp, warps, partials.data());
        }
        for (int thread = 0; thread < threads; ++thread) {
            finish_outputs(linear, BITS, block * kTileRows, kTileRows, thread, threads, partials.data(), 4 * warps,
                           kPartials, kTileRows);
        }
    }
}

template <int BITS>
int small(const Linear& linear, int way, int warps, int threads) {
    const int tokens = linear.tokens.count;
    if (way == 0 && tokens <= 1) return by_dot<BITS, 1>(linear, warps, threads), 0;
    if (way == 0 && tokens <= 2) return by_dot<BITS, 2>(linear, warps, threads), 0;
    if (way == 1 && tokens <= 8) return by_mma<BITS, 1, 1>(linear, warps, threads), 0;
    if (way == 1 && tokens <= 16) return by_mma<BITS, 2, 2>(linear, warps, threads), 0;
    return 1;
}

// As the kernel does: fill a stage, multiply, over all groups of a segment; here warp after warp.
template <int BITS>
void add_segment(const Linear& linear, const WeightSegment& weights, int64_t channel, int64_t row_block,
                 int64_t token_block, int warp, LargeSums<HostWarp>& sums) {
    std::vector<Quad> stage(stage_bytes(BITS) / sizeof(Quad));
    auto* bytes = reinterpret_cast<uint8_t*>(stage.data());
    int64_t row_tiles[kLargeRowTiles];
    large_row_tiles(linear, row_block, warp, row_tiles);
    for (int64_t group = 0; group < weights.groups; ++group) {
        for (int thread = 0; thread < kLargeWarps * kLanes; ++thread) {
            fill_stage<BITS>(linear.tokens, token_block, channel + group * group_channels(BITS), bytes, thread,
                             kLargeWarps * kLanes, [](uint8_t* to, const uint8_t* from, bool valid) {
                                 valid ? std::memcpy(to, from, kChunkBytes) : std::memset(to, 0, kChunkBytes);
                             });
        }
        HostWarp::PerLane<GroupWords<BITS>> words[kLargeRowTiles];
        load_groups<BITS, HostWarp>(words, weights.words, row_tiles, weights.groups, group);
        add_group<BITS, HostWarp>(sums, words, bytes);
    }
}

template <int BITS>
void large(const Linear& linear) {
    const int64_t token_blocks = ceil_div<int64_t>(linear.tokens.count, kLargeTokens);
    const int64_t row_blocks = ceil_div<int64_t>(linear.rows, kLargeRows);
    for (int64_t i = 0; i < token_blocks * row_blocks * kLargeWarps; ++i) {
        const int warp = static_cast<int>(i % kLargeWarps);
        const int64_t token_block = i / kLargeWarps % token_blocks, row_block = i / kLargeWarps / token_blocks;
        if ((row_block * kLargeWarps + warp) * kLargeRowTiles >= row_tiles_of(linear.rows)) continue;  // stores nothing
        LargeSums<HostWarp> sums = {};
        LargeOutputs<HostWarp> outputs = {};
        add_segment<BITS>(linear, linear.low, low_channel(linear), row_block, token_block, warp, sums);
        finish_segment<HostWarp>(linear, segments_of(linear) - 1, BITS, row_block, token_block, warp, sums, outputs);
        if (linear.high.groups > 0) {
            add_segment<kHighBits>(linear, linear.high, 0, row_block, token_block, warp, sums);
            finish_segment<HostWarp>(linear, 0, BITS, row_block, token_block, warp, sums, outputs);
        }
        store_outputs<HostWarp>(linear, row_block, token_block, warp, outputs);
    }
}

template <int VALUES>
void quantize(const RowQuantization& task, const float* x, int64_t tokens, int64_t stride, int threads,
              const RowOutput& out) {
    std::vector<float> row(static_cast<std::size_t>(task.channels));
    for (int64_t token = 0; token < tokens; ++token) {
        std::memcpy(row.data(), x + token * task.channels, row.size() * sizeof(float));
        HostBlock block(threads);
        quantize_row<VALUES>(task, row.data(),
                             {out.codes + token * stride, out.scales + token * task.segment_count,
                              out.sums + token * task.segment_count},
                             block);
    }
}

}  // namespace

extern "C" {

void planish_large_linear(const Call* call, int32_t bits) {
    const Linear linear = linear_of(*call);
    if (bits == 2) return large<2>(linear);
    if (bits == 3) return large<3>(linear);
    large<4>(linear);
}

// RowQuantization is passed as it is: its fields have the sizes and places that ctypes gives them.
void planish_quantize(const RowQuantization* task, const float* x, int64_t tokens, int64_t stride, int32_t values,
                      int32_t threads, uint8_t* codes, float* scales, TokenSum* sums) {
    const auto run = values == 4 ? quantize<4> : quantize<16>;
    run(*task, x, tokens, stride, threads, {codes, scales, sums});
}

// `way` is 0 for dot products, 1 for the MMA. Returns 0, or 1 where that way does not take so many tokens.
int planish_small_linear(const Call* call, int32_t bits, int32_t way, int32_t warps, int32_t threads) {
    const Linear linear = linear_of(*call);
    if (bits == 2) return small<2>(linear, way, warps, threads);
    if (bits == 3) return small<3>(linear, way, warps, threads);
    return small<4>(linear, way, warps, threads);
}

}  // extern "C"
