// A block of threads, on the GPU or emulated: the counterpart of warp.cuh for kernels whose threads meet at barriers.
//
// `each` runs a lambda for every thread and then waits for all of them; what threads keep between two of them in
// registers is a `PerThread`. `each_warp` and `PerWarp` are the same for warps (warp.cuh). `total` and `largest` give
// every thread the sum and the maximum over all of them. The order in which floats are added depends on nothing but the
// number of threads, so results repeat bit by bit.
#pragma once

#include <cmath>

#include "warp.cuh"

namespace planish {

constexpr int kMaxThreads = 1024;

#if defined(__CUDACC__)

class DeviceBlock {
  public:
    using Warp = DeviceWarp;

    template <class T>
    struct PerThread {
        T value;
        __device__ __forceinline__ T& operator[](int) { return value; }
        __device__ __forceinline__ const T& operator[](int) const { return value; }
    };

    template <class T>
    using PerWarp = PerThread<T>;

    // `scratch` is shared memory, one int per warp at least.
    __device__ __forceinline__ explicit DeviceBlock(int32_t* scratch) : scratch_(scratch) {}

    __device__ __forceinline__ int threads() const { return static_cast<int>(blockDim.x); }

    template <class Function>
    __device__ __forceinline__ void each(Function function) {
        function(static_cast<int>(threadIdx.x));
        __syncthreads();
    }

    template <class Function>
    __device__ __forceinline__ void each_warp(Function function) {
        function(Warp::index());
        __syncthreads();
    }

    __device__ __forceinline__ float total(const PerThread<float>& values) {
        return __int_as_float(combine(__float_as_int(values.value), [](int32_t a, int32_t b) {
            return __float_as_int(__int_as_float(a) + __int_as_float(b));
        }));
    }

    __device__ __forceinline__ int32_t total(const PerThread<int32_t>& values) {
        return combine(values.value, [](int32_t a, int32_t b) { return a + b; });
    }

    // Of magnitudes: the bits of floats that are not negative order as integers do.
    __device__ __forceinline__ float largest(const PerThread<float>& values) {
        return __int_as_float(
            combine(__float_as_int(values.value), [](int32_t a, int32_t b) { return a > b ? a : b; }));
    }

  private:
    // Zero is neutral for all three. Every warp reads the parts of all warps and combines them alike.
    template <class Operation>
    __device__ __forceinline__ int32_t combine(int32_t value, Operation operation) {
        for (int step = 16; step; step /= 2) value = operation(value, __shfl_xor_sync(0xFFFFFFFFu, value, step));
        const int lane = static_cast<int>(threadIdx.x) % 32, warps = threads() / 32;
        if (lane == 0) scratch_[threadIdx.x / 32] = value;
        __syncthreads();
        value = lane < warps ? scratch_[lane] : 0;
        for (int step = 16; step; step /= 2) value = operation(value, __shfl_xor_sync(0xFFFFFFFFu, value, step));
        __syncthreads();
        return value;
    }

    int32_t* scratch_;
};

#endif  // __CUDACC__

class HostBlock {
  public:
    using Warp = HostWarp;

    template <class T>
    struct PerThread {
        T values[kMaxThreads];
        T& operator[](int thread) { return values[thread]; }
        const T& operator[](int thread) const { return values[thread]; }
    };

    template <class T>
    struct PerWarp {
        T values[kMaxThreads / kLanes];
        T& operator[](int warp) { return values[warp]; }
    };

    explicit HostBlock(int threads) : threads_(threads) {}

    int threads() const { return threads_; }

    template <class Function>
    void each(Function function) {
        for (int thread = 0; thread < threads_; ++thread) function(thread);
    }

    template <class Function>
    void each_warp(Function function) {
        for (int warp = 0; warp < threads_ / kLanes; ++warp) function(warp);
    }

    template <class T>
    T total(const PerThread<T>& values) {
        T sum = 0;
        for (int thread = 0; thread < threads_; ++thread) sum += values[thread];
        return sum;
    }

    float largest(const PerThread<float>& values) {
        float most = 0;
        for (int thread = 0; thread < threads_; ++thread) most = values[thread] > most ? values[thread] : most;
        return most;
    }

  private:
    int threads_;
};

}  // namespace planish
