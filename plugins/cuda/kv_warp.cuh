// What the lanes of a warp do together in the kernels of the cache, on the GPU or emulated; see warp.cuh.
//
// The emulated MMA adds exactly and then rounds towards zero, as tensor cores do with what is behind the last bit of an
// accumulator (Fasi, Higham, Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor cores, PeerJ CS 2021).
#pragma once

#include "kv_float.cuh"
#include "warp.cuh"

namespace planish {

// Two floats that a lane holds, one for each of the columns 2 (lane % 4) and 2 (lane % 4) + 1 of an MMA.
struct Two {
    float value[2];
};

#if defined(__CUDACC__)

struct KvDeviceWarp : DeviceWarp {
    // What is computed from the lane is computed where it is used: kept from tile to tile, the addresses of every width
    // of codes would take more registers than there are.
    template <class Function>
    static __device__ __forceinline__ void each(Function function) {
        int lane = static_cast<int>(threadIdx.x) % kLanes;
        asm volatile("" : "+r"(lane));
        __builtin_assume(lane >= 0 && lane < kLanes);
        function(lane);
    }

    // Transposes an 8 x 8 matrix of float16: lane 4 g + t holds columns 2 t and 2 t + 1 of row g.
    static __device__ __forceinline__ PerLane<uint32_t> transpose(const PerLane<uint32_t>& matrix) {
        PerLane<uint32_t> transposed;
        asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed.value) : "r"(matrix.value));
        return transposed;
    }

    // Gives every lane the value of lane source(lane).
    template <class Source>
    static __device__ __forceinline__ PerLane<uint32_t> shuffle(const PerLane<uint32_t>& values, Source source) {
        return {__shfl_sync(0xFFFFFFFFu, values.value, source(static_cast<int>(threadIdx.x) % kLanes))};
    }

    // Replaces the value of each lane by combine(value, value of lane ^ step), for steps `first`, first / 2, ...
    // `last`.
    template <class Combine>
    static __device__ __forceinline__ void reduce(PerLane<float>& values, int first, int last, Combine combine) {
        PLANISH_UNROLL
        for (int step = first; step >= last; step /= 2) {
            values.value = combine(values.value, __shfl_xor_sync(0xFFFFFFFFu, values.value, step));
        }
    }

    static __device__ __forceinline__ bool any(const PerLane<bool>& values) {
        return __any_sync(0xFFFFFFFFu, values.value);
    }

    // Makes what lanes wrote to memory visible to the other lanes.
    static __device__ __forceinline__ void wait() { __syncwarp(); }
};

#endif  // __CUDACC__

struct KvHostWarp : HostWarp {
    static void mma_f16(PerLane<FragmentF>& c, const PerLane<FragmentA>& a, const PerLane<FragmentB>& b) {
        float left[kTileRows][16], right[kTileTokens][16];
        for (int lane = 0; lane < kLanes; ++lane) {
            for (int field = 0; field < 2; ++field) {
                for (int reg = 0; reg < 4; ++reg) {
                    const Place at = a_place<2>(lane, reg, field);
                    left[at.row][at.k] = float_of_half(static_cast<Half>(a[lane].reg[reg] >> 16 * field));
                }
                for (int reg = 0; reg < 2; ++reg) {
                    const Place at = b_place<2>(lane, reg, field);
                    right[at.row][at.k] = float_of_half(static_cast<Half>(b[lane].reg[reg] >> 16 * field));
                }
            }
        }
        for (int lane = 0; lane < kLanes; ++lane) {
            for (int reg = 0; reg < 4; ++reg) {
                const float* x = left[c_row(lane, reg)];
                const float* y = right[c_token(lane, reg)];
                double sum = c[lane].reg[reg];
                for (int k = 0; k < 16; ++k) sum += static_cast<double>(x[k]) * y[k];
                c[lane].reg[reg] = towards_zero(sum);
            }
        }
    }

    static PerLane<uint32_t> transpose(const PerLane<uint32_t>& matrix) {
        PerLane<uint32_t> transposed;
        for (int lane = 0; lane < kLanes; ++lane) {
            transposed[lane] = 0;
            for (int half = 0; half < 2; ++half) {
                const int row = 2 * (lane % 4) + half, column = lane / 4;
                const uint32_t pair = matrix[4 * row + column / 2];
                transposed[lane] |= (pair >> 16 * (column % 2) & 0xFFFFu) << 16 * half;
            }
        }
        return transposed;
    }

    template <class Source>
    static PerLane<uint32_t> shuffle(const PerLane<uint32_t>& values, Source source) {
        PerLane<uint32_t> shuffled;
        for (int lane = 0; lane < kLanes; ++lane) shuffled[lane] = values[source(lane) % kLanes];
        return shuffled;
    }

    template <class Combine>
    static void reduce(PerLane<float>& values, int first, int last, Combine combine) {
        for (int step = first; step >= last; step /= 2) {
            const PerLane<float> before = values;
            for (int lane = 0; lane < kLanes; ++lane) values[lane] = combine(before[lane], before[lane ^ step]);
        }
    }

    static bool any(const PerLane<bool>& values) {
        bool found = false;
        for (int lane = 0; lane < kLanes; ++lane) found = found || values[lane];
        return found;
    }

    static void wait() {}

  private:
    static float towards_zero(double value) {
        const float nearest = static_cast<float>(value);
        return std::fabs(static_cast<double>(nearest)) > std::fabs(value) ? std::nextafterf(nearest, 0.0f) : nearest;
    }
};

}  // namespace planish
