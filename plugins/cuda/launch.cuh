// What launchers share that needs CUDA.
#pragma once

#include <cuda_runtime.h>

#include "arguments.cuh"

namespace planish {

// The status of the launch that was made last.
int launched(const char* kernel);

// Reads the compute capability of the calling thread's GPU, as 90 for 9.0, into `capability`.
int read_capability(int& capability);

// Reads how much shared memory a block can have on the calling thread's GPU.
int read_shared_bytes(int& bytes);

// Lets launches of `kernel` ask for `bytes` of shared memory besides what the kernel declares. What it sets belongs to
// the kernel and not to a launch: it is always all that a block can have, so that host threads which launch with
// different sizes do not take it from each other.
int allow_shared(const void* kernel, size_t bytes);

}  // namespace planish
