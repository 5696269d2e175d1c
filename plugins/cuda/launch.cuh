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

}  // namespace planish
