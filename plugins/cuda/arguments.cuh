// The checks of all arguments, and the messages of what they refuse. No CUDA: tests run them on the host.
#pragma once

#include "linear.cuh"
#include "planish_kernels.h"
#include "quantize_row.cuh"
#include "weight_only.cuh"

namespace planish {

// The widest token that fits into the shared memory of every GPU.
constexpr int kMostChannels = 16384;

// Remembers the message for planish_last_error and returns `status`.
int fail(int status, const char* format, ...);

// Checks a linear and turns it into the form that kernels take; `linear` is the result.
int read_linear(const planish_linear& task, Linear& linear);

// The same for a linear of few tokens.
int read_small_linear(const planish_linear& task, Linear& linear);

// The same for a linear of float activations.
int read_weight_only(const planish_weight_only& task, WeightOnlyLinear& linear);

// The same for quantisation.
int read_quantize(const planish_quantize& task, RowQuantization& row);

}  // namespace planish
