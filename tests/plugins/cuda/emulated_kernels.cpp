// The C interface of the kernels on the host: their checks as they are, their blocks run warp by warp and phase by
// phase. All memory is the host's; outputs are float32 or float16, tokens too.

#include <cmath>
#include <cstddef>
#include <cstring>
#include <vector>

#include "arguments.cu"
#include "quantize_plan.cuh"
#include "small_linear.cuh"
#include "wgmma_linear.cuh"

using namespace planish;

namespace {

// What a block may have on an H100.
constexpr int kSharedBytes = 227 << 10;

// Runs `body(bits)` with the number of bits as a type.
template <class Body>
void with_bits(int bits, Body body) {
    if (bits == 2) return body(Bits<2>{});
    if (bits == 3) return body(Bits<3>{});
    body(Bits<4>{});
}

// Runs `body(linear)` on a linear whose outputs are float32, and rounds them to the type that was asked for.
template <class LinearType, class Body>
void with_float_outputs(LinearType linear, int64_t tokens, Body body) {
    if (linear.type == OutputType::kFloat32) return body(linear);
    const auto count = static_cast<std::size_t>(tokens * (linear.gated ? linear.rows / 2 : linear.rows));
    std::vector<float> y(count);
    auto* halves = static_cast<_Float16*>(linear.y);
    linear.y = y.data();
    linear.type = OutputType::kFloat32;
    body(linear);
    for (std::size_t i = 0; i < count; ++i) halves[i] = static_cast<_Float16>(y[i]);
}

template <int BITS, int TILES>
void by_mma(const Linear& linear, int warps, int threads) {
    constexpr int kPartials = kWarpPartials<TILES, TILES>, kRows = TILES * kTileRows;
    std::vector<int32_t> partials(static_cast<std::size_t>(2 * warps * kPartials), -1);
    for (int64_t block = 0; block < ceil_div<int64_t>(row_tiles_of(linear.rows), TILES); ++block) {
        for (int warp = 0; warp < warps; ++warp) {
            sum_share_mma<BITS, HostWarp, TILES, TILES>(linear, block, warp, warps, partials.data());
        }
        for (int thread = 0; thread < threads; ++thread) {
            finish_outputs<kRows, kTokenStride<TILES>>(linear, BITS, block * kRows, thread, threads, partials.data(),
                                                       warps, kPartials);
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
            finish_outputs<kTileRows, kTileRows>(linear, BITS, block * kTileRows, thread, threads, partials.data(),
                                                 4 * warps, kPartials);
        }
    }
}

// Every warp of every block in turn, but those that store nothing.
template <int TOKEN_TILES, class Body>
void each_large_warp(const Linear& linear, Body body) {
    const int64_t token_blocks = ceil_div<int64_t>(linear.tokens.count, TOKEN_TILES * kTileTokens);
    const int64_t warps = ceil_div<int64_t>(row_tiles_of(linear.rows), kLargeRowTiles);
    for (int64_t i = 0; i < token_blocks * warps; ++i) {
        body(LargePlace{i % warps / kLargeWarps, i / warps, static_cast<int>(i % warps % kLargeWarps)});
    }
}

const auto copy_now = [](uint8_t* to, const uint8_t* from, bool valid) {
    valid ? std::memcpy(to, from, kChunkBytes) : std::memset(to, 0, kChunkBytes);
};

// As the kernels do: fill a stage, multiply, over all groups or spans of a segment.
template <int BITS, class Codes>
void add_groups(const Linear& linear, const WeightSegment& weights, int64_t channel, const LargePlace& place,
                LargeSums<HostWarp, kLargeTokenTiles>& sums) {
    constexpr int kTiles = group_tiles(BITS);
    std::vector<Quad> stage(stage_bytes<Codes>(kTiles, kLargeTokenTiles) / sizeof(Quad));
    auto* bytes = reinterpret_cast<uint8_t*>(stage.data());
    int64_t row_tiles[kLargeRowTiles];
    large_row_tiles(linear, place, row_tiles);
    for (int64_t group = 0; group < weights.groups; ++group) {
        for (int thread = 0; thread < kLargeThreads; ++thread) {
            fill_stage<kTiles, kLargeTokenTiles, Codes>(linear.tokens, place.token_block,
                                                        channel + group * group_channels(BITS), kTiles, bytes, thread,
                                                        copy_now);
        }
        HostWarp::PerLane<GroupWords<BITS>> words[kLargeRowTiles];
        load_groups<BITS, HostWarp>(words, weights.words, row_tiles, weights.groups, group);
        add_group<BITS, Codes, HostWarp>(sums, words, bytes);
    }
}

template <int BITS, int TOKEN_TILES>
void add_spans(const Linear& linear, const WeightSegment& weights, int64_t channel, const LargePlace& place,
               LargeSums<HostWarp, TOKEN_TILES>& sums) {
    // What no copy fills stays as it is on the GPU: here, codes of 255.
    std::vector<uint8_t> stage(stage_bytes<ColumnCodes>(kSpanTiles, TOKEN_TILES), 255);
    int64_t row_tiles[kLargeRowTiles];
    large_row_tiles(linear, place, row_tiles);
    HostWarp::PerLane<SpanWords<BITS>> words[kLargeRowTiles];
    load_span<BITS, HostWarp>(words, weights, row_tiles, 0);
    for (int64_t span = 0; span < spans_of(weights, BITS); ++span) {
        for (int thread = 0; thread < kLargeThreads; ++thread) {
            fill_stage<kSpanTiles, TOKEN_TILES, ColumnCodes>(
                linear.tokens, place.token_block, channel + span * kSpanChannels, tiles_of_span<BITS>(weights, span),
                stage.data(), thread, copy_now);
        }
        add_span<BITS, HostWarp>(sums, words, weights, row_tiles, span, 0, HostWgmma{stage.data()});
    }
}

// `add(bits, weights, channel, place, sums)` adds the products of a segment.
template <int BITS, int TOKEN_TILES, class Add>
void large(const Linear& linear, Add add) {
    each_large_warp<TOKEN_TILES>(linear, [&](const LargePlace& place) {
        LargeSums<HostWarp, TOKEN_TILES> sums = {};
        LargeOutputs<HostWarp, TOKEN_TILES> outputs = {};
        add(Bits<BITS>{}, linear.low, low_channel(linear), place, sums);
        finish_segment(linear, segments_of(linear) - 1, BITS, place, sums, outputs);
        if (linear.high.groups > 0) {
            add(Bits<kHighBits>{}, linear.high, 0, place, sums);
            finish_segment(linear, 0, BITS, place, sums, outputs);
        }
        store_outputs(linear, place, outputs);
    });
}

template <int BITS>
void large(const Linear& linear, Order order) {
    if (order == Order::kColumns) {
        const auto add = [&](auto bits, const WeightSegment& weights, int64_t channel, const LargePlace& place,
                             auto& sums) { add_spans<decltype(bits)::value>(linear, weights, channel, place, sums); };
        return linear.high.groups > 0 ? large<BITS, 8>(linear, add) : large<BITS, 16>(linear, add);
    }
    large<BITS, kLargeTokenTiles>(
        linear, [&](auto bits, const WeightSegment& weights, int64_t channel, const LargePlace& place, auto& sums) {
            if (order == Order::kNibbles) {
                add_groups<decltype(bits)::value, NibbleCodes>(linear, weights, channel, place, sums);
            } else {
                add_groups<decltype(bits)::value, ByteCodes>(linear, weights, channel, place, sums);
            }
        });
}

template <int BITS, int ROW_TILES, int TOKEN_TILES>
void weight_only(const WeightOnlyLinear& linear, int warps, int threads) {
    std::vector<float> partials(static_cast<std::size_t>(warps * kHalfPartials<ROW_TILES, TOKEN_TILES>));
    for (int64_t first = 0; first < linear.tokens.count; first += TOKEN_TILES * kTileTokens) {
        for (int64_t block = 0; block < ceil_div<int64_t>(row_tiles_of(linear.rows), ROW_TILES); ++block) {
            for (int warp = 0; warp < warps; ++warp) {
                sum_share_f16<BITS, HostWarp, ROW_TILES, TOKEN_TILES>(linear, block, first, warp, warps,
                                                                      partials.data());
            }
            for (int thread = 0; thread < threads; ++thread) {
                finish_f16<ROW_TILES, TOKEN_TILES>(linear, block, first, thread, threads, partials.data(), warps);
            }
        }
    }
}

// Channel `at` of all tokens, with its residual, of the type that tokens have.
float read_channel(const planish_quantize& task, int64_t at) {
    const auto read = [&](const void* from) {
        return task.type == PLANISH_FLOAT32 ? static_cast<const float*>(from)[at]
                                            : static_cast<float>(static_cast<const _Float16*>(from)[at]);
    };
    if (!task.residual) return read(task.x);
    const float sum = read(task.x) + read(task.residual);
    return task.type == PLANISH_FLOAT32 ? sum : static_cast<float>(static_cast<_Float16>(sum));
}

void store_sum(const planish_quantize& task, int64_t at, float value) {
    if (!task.sum) return;
    if (task.type == PLANISH_FLOAT32) {
        static_cast<float*>(task.sum)[at] = value;
    } else {
        static_cast<_Float16*>(task.sum)[at] = static_cast<_Float16>(value);
    }
}

// Reads a token, as a block of threads does.
void read_token(const planish_quantize& task, const RowLines& lines, int64_t token, float* values, HostBlock& block) {
    const int64_t first = token * task.channels;
    block.each([&](int thread) {
        each_channel(lines, task.channels, values, thread, block.threads(), [&](int i, float& place) {
            place = read_channel(task, first + i);
            store_sum(task, first + i, place);
        });
    });
}

RowOutput output_of(const planish_quantize& task, int64_t token) {
    const int64_t at = token * task.segment_count;
    return {task.codes + token * task.stride, task.scales + at, reinterpret_cast<TokenSum*>(task.zero_sums) + at};
}

// Shared memory, in which what nobody writes is no number.
std::vector<float> shared_floats(int64_t count) { return std::vector<float>(static_cast<std::size_t>(count), NAN); }

template <int VALUES, bool TILED>
void quantize(const planish_quantize& task, const RowQuantization& row, int threads) {
    for (int64_t token = 0; token < task.tokens; ++token) {
        auto values = shared_floats(row_floats<TILED>(row));
        HostBlock block(threads);
        read_token(task, lines_before<TILED>(row), token, values.data(), block);
        quantize_row<VALUES, TILED>(row, values.data(), output_of(task, token), block);
    }
}

void quantize_blocks(const planish_quantize& task, const RowQuantization& row, int threads, int tokens) {
    for (int64_t first = 0; first < task.tokens; first += tokens) {
        const int64_t left = task.tokens - first;
        const int floats = floats_of_token(row.factors);
        auto values = shared_floats(int64_t{floats} * tokens);
        HostBlock block(threads);
        const TokenRows rows = {values.data(), floats, left < tokens ? static_cast<int>(left) : tokens};
        for (int i = 0; i < rows.count; ++i) {
            read_token(task, lines_of_blocks(row.factors), first + i, values.data() + i * floats, block);
        }
        quantize_rows(row, rows, [&](int i) { return output_of(task, first + i); }, block);
    }
}

void spread(const planish_quantize& task, const RowQuantization& row, int lines) {
    for (int64_t token = 0; token < task.tokens; ++token) {
        const int64_t first = token * task.channels;
        for (int part = 0; part < ceil_div(row.factors.m, lines); ++part) {
            const LineShare share = share_of(row.factors, lines, part);
            auto values = shared_floats(floats_of_token(factors_of(row.factors, share)));
            HostBlock block(threads_of_share(row.factors));
            spread_lines(
                row, share, values.data(), task.workspace + first, [&](int i) { return read_channel(task, first + i); },
                [&](int i, float value) { store_sum(task, first + i, value); }, block);
        }
    }
}

}  // namespace

extern "C" {

// A kernel with a number of warps, threads and results of a thread that the launcher would not choose.

// `tiled` is 0 for factors on the CUDA cores.
int planish_emulate_quantize(const planish_quantize* task, int32_t values, int32_t threads, int32_t tiled) {
    RowQuantization row = {};
    if (const int status = read_quantize(*task, row)) return status;
    if (tiled) {
        values == 4 ? quantize<4, true>(*task, row, threads) : quantize<16, true>(*task, row, threads);
    } else {
        values == 4 ? quantize<4, false>(*task, row, threads) : quantize<16, false>(*task, row, threads);
    }
    return PLANISH_OK;
}

// `tokens` to a block.
int planish_emulate_quantize_blocks(const planish_quantize* task, int32_t threads, int32_t tokens) {
    RowQuantization row = {};
    if (const int status = read_quantize(*task, row)) return status;
    quantize_blocks(*task, row, threads, tokens);
    return PLANISH_OK;
}

// `mma` is 0 for dot products, of one or two tokens.
int planish_emulate_small(const planish_linear* task, int32_t mma, int32_t warps, int32_t threads) {
    Linear linear;
    if (const int status = read_small_linear(*task, linear)) return status;
    with_float_outputs(linear, task->tokens, [&](const Linear& floats) {
        with_bits(task->low_bits, [&](auto bits) {
            constexpr int kBits = decltype(bits)::value;
            if (!mma && task->tokens == 1) return by_dot<kBits, 1>(floats, warps, threads);
            if (!mma) return by_dot<kBits, 2>(floats, warps, threads);
            task->tokens <= 8 ? by_mma<kBits, 1>(floats, warps, threads) : by_mma<kBits, 2>(floats, warps, threads);
        });
    });
    return PLANISH_OK;
}

int planish_emulate_weight_only(const planish_weight_only* task, int32_t warps, int32_t threads) {
    WeightOnlyLinear linear;
    if (const int status = read_weight_only(*task, linear)) return status;
    with_float_outputs(linear, task->tokens, [&](const WeightOnlyLinear& floats) {
        with_bits(task->bits, [&](auto bits) {
            constexpr int kBits = decltype(bits)::value;
            if (task->tokens <= 8) return weight_only<kBits, 1, 1>(floats, warps, threads);
            if (task->tokens <= 16) return weight_only<kBits, 2, 2>(floats, warps, threads);
            weight_only<kBits, 2, 4>(floats, warps, threads);
        });
    });
    return PLANISH_OK;
}

// The C interface. No stream: work is done at once.

int planish_best_order(int64_t, int32_t, int32_t* order) { return *order = PLANISH_LANES; }

int planish_quantize_tokens(const planish_quantize* task, void*) {
    RowQuantization row = {};
    if (const int status = read_quantize(*task, row)) return status;
    if (const int lines = plan_spread(*task, row.factors)) {
        spread(*task, row, lines);
        planish_quantize behind = *task;
        behind.x = task->workspace;
        behind.type = PLANISH_FLOAT32;
        behind.residual = behind.gain = behind.right = behind.workspace = nullptr;
        behind.sum = nullptr;
        return planish_quantize_tokens(&behind, nullptr);
    }
    const QuantizePlan plan = plan_quantization(row, task->tokens, kSharedBytes);
    if (plan.path == QuantizePath::kBlocks) {
        return planish_emulate_quantize_blocks(task, plan.threads, plan.together);
    }
    return planish_emulate_quantize(task, plan.values, plan.threads, plan.path == QuantizePath::kTiles);
}

int planish_small_linear(const planish_linear* task, void*) {
    return planish_emulate_small(task, task->tokens > 2, 2, 64);
}

int planish_large_linear(const planish_linear* task, void*) {
    Linear linear;
    if (const int status = read_linear(*task, linear)) return status;
    with_float_outputs(linear, task->tokens, [&](const Linear& floats) {
        with_bits(task->low_bits,
                  [&](auto bits) { large<decltype(bits)::value>(floats, static_cast<Order>(task->order)); });
    });
    return PLANISH_OK;
}

int planish_weight_only_linear(const planish_weight_only* task, void*) {
    return planish_emulate_weight_only(task, 2, 64);
}

}  // extern "C"
