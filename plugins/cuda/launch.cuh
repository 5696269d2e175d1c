// Checks and errors that all launchers share.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>

#include <cuda_runtime.h>

#include "linear.cuh"
#include "planish_kernels.h"

namespace planish {

// Remembers the message for planish_last_error and returns `status`.
int fail(int status, const char* format, ...);

// The status of the launch that was made last.
int launched(const char* kernel);

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Checks a linear and turns it into the form that kernels take; `y` is the result.
int read_linear(const planish_linear& task, Linear& linear);

}  // namespace planish
