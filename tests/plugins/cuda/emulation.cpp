// Runs the blocks of the GPU kernels on the host, warp by warp and phase by phase, for the tests in Python.

#include <cstddef>
#include <vector>

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

}  // namespace

extern "C" {

// `way` is 0 for dot products, 1 for the MMA. Returns 0, or 1 where that way does not take so many tokens.
int planish_small_linear(const Call* call, int32_t bits, int32_t way, int32_t warps, int32_t threads) {
    const Linear linear = linear_of(*call);
    if (bits == 2) return small<2>(linear, way, warps, threads);
    if (bits == 3) return small<3>(linear, way, warps, threads);
    return small<4>(linear, way, warps, threads);
}

}  // extern "C"
