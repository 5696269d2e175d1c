// Every check of an argument, each with its message.

#include "arguments.cuh"

#include <cstdarg>
#include <cstdio>

namespace {

thread_local char last_error[256] = "";

using Long = long long;

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

namespace planish {

int fail(int status, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(last_error, sizeof(last_error), format, arguments);
    va_end(arguments);
    return status;
}

int read_linear(const planish_linear& task, Linear& linear) {
    if (task.low_bits < 2 || task.low_bits > 4)
        return fail(PLANISH_BAD_ARGUMENT, "weights of %d bits have no kernel", task.low_bits);
    if (task.type < PLANISH_FLOAT32 || task.type > PLANISH_BFLOAT16)
        return fail(PLANISH_BAD_ARGUMENT, "there is no type %d", task.type);
    if (task.order < PLANISH_LANES || task.order > PLANISH_NIBBLES)
        return fail(PLANISH_BAD_ARGUMENT, "there is no order %d", task.order);
    if (task.rows < 1 || task.tokens < 1 || task.tokens > INT32_MAX) {
        return fail(PLANISH_BAD_ARGUMENT, "a product of %lld tokens and %lld rows", static_cast<Long>(task.tokens),
                    static_cast<Long>(task.rows));
    }
    if (task.gated && task.rows % kTileRows) {
        return fail(PLANISH_BAD_ARGUMENT, "%lld rows of gate and up: a multiple of 16", static_cast<Long>(task.rows));
    }
    if (task.high.channels < 0 || task.high.channels % kTileChannels || task.low.channels < 1) {
        return fail(PLANISH_BAD_ARGUMENT,
                    "%d high-impact channels beside %d others: a multiple of 64, and one at least", task.high.channels,
                    task.low.channels);
    }
    const int64_t stored = stored_bytes(task.high.channels + padded_channels(task.low.channels, task.low_bits),
                                        static_cast<Order>(task.order));
    if (task.stride < stored || task.stride % 16) {
        return fail(PLANISH_BAD_ARGUMENT, "tokens %lld bytes apart, which take %lld: a multiple of 16, and not less",
                    static_cast<Long>(task.stride), static_cast<Long>(stored));
    }
    if (!task.low.words || !task.low.scales || !task.low.row_sums || !task.codes || !task.token_scales ||
        !task.token_zero_sums || !task.y ||
        (task.high.channels && (!task.high.words || !task.high.scales || !task.high.row_sums))) {
        return fail(PLANISH_BAD_ARGUMENT, "a linear lacks one of its arrays");
    }
    if (!aligned(task.low.words) || !aligned(task.high.words) || !aligned(task.codes)) {
        return fail(PLANISH_BAD_ARGUMENT, "weights and codes begin at multiples of 16 bytes");
    }
    linear = {{task.y, static_cast<OutputType>(task.type), task.gated != 0, task.rows},
              {task.high.words, task.high.scales, task.high.row_sums, groups_of(task.high.channels, kHighBits)},
              {task.low.words, task.low.scales, task.low.row_sums, groups_of(task.low.channels, task.low_bits)},
              {task.codes, task.stride, static_cast<int>(task.tokens)},
              task.token_scales,
              reinterpret_cast<const TokenSum*>(task.token_zero_sums)};
    return PLANISH_OK;
}

int read_small_linear(const planish_linear& task, Linear& linear) {
    if (const int status = read_linear(task, linear)) return status;
    if (task.tokens > PLANISH_SMALL_TOKENS) {
        return fail(PLANISH_BAD_ARGUMENT, "planish_small_linear takes up to %d tokens, not %lld", PLANISH_SMALL_TOKENS,
                    static_cast<Long>(task.tokens));
    }
    if (task.order != PLANISH_LANES)
        return fail(PLANISH_BAD_ARGUMENT, "planish_small_linear takes codes in the order PLANISH_LANES");
    return PLANISH_OK;
}

int read_weight_only(const planish_weight_only& task, WeightOnlyLinear& linear) {
    if (task.bits < 2 || task.bits > 4)
        return fail(PLANISH_BAD_ARGUMENT, "weights of %d bits have no kernel", task.bits);
    if (task.type < PLANISH_FLOAT32 || task.type > PLANISH_BFLOAT16)
        return fail(PLANISH_BAD_ARGUMENT, "there is no type %d", task.type);
    if (task.rows < 1 || task.tokens < 1 || task.tokens > INT32_MAX) {
        return fail(PLANISH_BAD_ARGUMENT, "a product of %lld tokens and %lld rows", static_cast<Long>(task.tokens),
                    static_cast<Long>(task.rows));
    }
    if (task.gated && task.rows % kTileRows) {
        return fail(PLANISH_BAD_ARGUMENT, "%lld rows of gate and up: a multiple of 16", static_cast<Long>(task.rows));
    }
    if (task.channels < 8 || task.channels % 8 || task.stride < task.channels || task.stride % 8) {
        return fail(PLANISH_BAD_ARGUMENT, "%d channels in tokens %lld apart: multiples of 8, and not less",
                    task.channels, static_cast<Long>(task.stride));
    }
    if (!task.words || !task.scales || !task.x || !task.y)
        return fail(PLANISH_BAD_ARGUMENT, "a linear lacks one of its arrays");
    if (!aligned(task.words) || !aligned(task.x))
        return fail(PLANISH_BAD_ARGUMENT, "weights and tokens begin at multiples of 16 bytes");
    linear = {{task.y, static_cast<OutputType>(task.type), task.gated != 0, task.rows},
              task.words,
              task.scales,
              groups_of(task.channels, task.bits),
              {static_cast<const uint16_t*>(task.x), task.stride, task.channels, static_cast<int>(task.tokens)}};
    return PLANISH_OK;
}

int read_quantize(const planish_quantize& task, RowQuantization& row) {
    if (task.type < PLANISH_FLOAT32 || task.type > PLANISH_BFLOAT16)
        return fail(PLANISH_BAD_ARGUMENT, "there is no type %d", task.type);
    if (task.order < PLANISH_LANES || task.order > PLANISH_NIBBLES)
        return fail(PLANISH_BAD_ARGUMENT, "there is no order %d", task.order);
    if (task.channels < 1 || task.channels > kMostChannels || task.tokens < 1 || task.tokens > INT32_MAX) {
        return fail(PLANISH_BAD_ARGUMENT, "%lld tokens of %d channels; a token has up to %d",
                    static_cast<Long>(task.tokens), task.channels, kMostChannels);
    }
    const bool has_factor = task.right || task.left;
    if (has_factor && (task.m < 1 || task.k < 1 || int64_t{task.m} * task.k != task.channels)) {
        return fail(PLANISH_BAD_ARGUMENT, "%d channels cannot be read as %d x %d", task.channels, task.m, task.k);
    }
    if (task.right && task.right_count != 1 && task.right_count != task.m) {
        return fail(PLANISH_BAD_ARGUMENT, "%d right factors for %d rows", task.right_count, task.m);
    }
    if (task.segment_count < 1 || task.segment_count > kMaxSegments)
        return fail(PLANISH_BAD_ARGUMENT, "%d segments", task.segment_count);
    const int most_bits = task.order == PLANISH_NIBBLES ? 4 : 8;
    int64_t channels = 0, padded = 0;
    for (int s = 0; s < task.segment_count; ++s) {
        const planish_code_segment& segment = task.segments[s];
        if (segment.bits < 2 || segment.bits > most_bits || !(segment.clip > 0 && segment.clip <= 1) ||
            segment.channels < 1 || segment.padded < segment.channels || segment.padded % kTileChannels) {
            return fail(PLANISH_BAD_ARGUMENT, "segment %d: %d channels stored as %d, %d bits of up to %d, clip %g", s,
                        segment.channels, segment.padded, segment.bits, most_bits, static_cast<double>(segment.clip));
        }
        channels += segment.channels;
        padded += segment.padded;
        row.segments[s] = {segment.channels, segment.padded, segment.bits,
                           segment.clip / static_cast<float>(zero_point(segment.bits) - 1)};
    }
    const auto order = static_cast<Order>(task.order);
    const int64_t stored = stored_bytes(padded, order);
    if (channels != task.channels || task.stride < stored || task.stride % 16) {
        return fail(
            PLANISH_BAD_ARGUMENT, "segments of %lld channels and %lld bytes in tokens of %d channels, %lld bytes apart",
            static_cast<Long>(channels), static_cast<Long>(stored), task.channels, static_cast<Long>(task.stride));
    }
    if (!task.x || !task.codes || !task.scales || !task.zero_sums || (task.sum && !task.residual)) {
        return fail(PLANISH_BAD_ARGUMENT, "planish_quantize_tokens lacks one of its arrays");
    }
    if (!aligned(task.codes) || !aligned(task.workspace)) {
        return fail(PLANISH_BAD_ARGUMENT, "codes and workspace begin at multiples of 16 bytes");
    }
    if (task.workspace && task.sum && (task.sum == task.x || task.sum == task.residual)) {
        return fail(PLANISH_BAD_ARGUMENT, "with a workspace, the sum is neither x nor the residual");
    }
    row.channels = task.channels;
    row.gain = task.gain;
    row.epsilon = task.epsilon;
    row.factors = {task.right, task.left, task.right_count, task.m, task.k};
    row.permutation = task.permutation;
    row.segment_count = task.segment_count;
    row.order = order;
    return PLANISH_OK;
}

}  // namespace planish

extern "C" const char* planish_last_error(void) { return last_error; }
