// What a launcher says when it cannot launch, and the checks of a linear's arguments.

#include "launch.cuh"

namespace {

thread_local char last_error[256] = "";

}  // namespace

namespace planish {

int fail(int status, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(last_error, sizeof(last_error), format, arguments);
    va_end(arguments);
    return status;
}

int launched(const char* kernel) {
    const cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) return PLANISH_OK;
    return fail(PLANISH_CUDA_FAILED, "%s could not be launched: %s", kernel, cudaGetErrorString(error));
}

int read_linear(const planish_linear& task, Linear& linear) {
    if (task.low_bits < 2 || task.low_bits > 4)
        return fail(PLANISH_BAD_ARGUMENT, "weights of %d bits have no kernel", task.low_bits);
    if (task.type < PLANISH_FLOAT32 || task.type > PLANISH_BFLOAT16)
        return fail(PLANISH_BAD_ARGUMENT, "there is no type %d", task.type);
    if (task.rows < 1 || task.tokens < 1 || task.tokens > INT32_MAX) {
        return fail(PLANISH_BAD_ARGUMENT, "a product of %lld tokens and %lld rows", static_cast<long long>(task.tokens),
                    static_cast<long long>(task.rows));
    }
    if (task.high.channels < 0 || task.high.channels % kTileChannels || task.low.channels < 1) {
        return fail(PLANISH_BAD_ARGUMENT,
                    "%d high-impact channels beside %d others: a multiple of 64, and one at least", task.high.channels,
                    task.low.channels);
    }
    const int64_t stored = task.high.channels + padded_channels(task.low.channels, task.low_bits);
    if (task.stride < stored || task.stride % 16) {
        return fail(PLANISH_BAD_ARGUMENT, "tokens %lld bytes apart, which take %lld: a multiple of 16, and not less",
                    static_cast<long long>(task.stride), static_cast<long long>(stored));
    }
    if (!task.low.words || !task.low.scales || !task.low.row_sums || !task.codes || !task.token_scales ||
        !task.token_zero_sums || !task.y ||
        (task.high.channels && (!task.high.words || !task.high.scales || !task.high.row_sums))) {
        return fail(PLANISH_BAD_ARGUMENT, "a linear lacks one of its arrays");
    }
    if (!aligned(task.low.words) || !aligned(task.high.words) || !aligned(task.codes)) {
        return fail(PLANISH_BAD_ARGUMENT, "weights and codes begin at multiples of 16 bytes");
    }
    linear = {{task.high.words, task.high.scales, task.high.row_sums, groups_of(task.high.channels, kHighBits)},
              {task.low.words, task.low.scales, task.low.row_sums, groups_of(task.low.channels, task.low_bits)},
              task.rows,
              {task.codes, task.stride, static_cast<int>(task.tokens)},
              task.token_scales,
              reinterpret_cast<const TokenSum*>(task.token_zero_sums),
              task.y,
              static_cast<OutputType>(task.type)};
    return PLANISH_OK;
}

}  // namespace planish

extern "C" const char* planish_last_error(void) { return last_error; }
