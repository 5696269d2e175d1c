// What lets one header compile for the GPU and for the host.
//
// Everything that decides where a bit lies is written once, as functions marked PLANISH_HD. nvcc compiles them into the
// kernels; a C++17 compiler compiles the same lines into the packer that Python calls and into unit tests that need no
// GPU.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PLANISH_HD __host__ __device__ __forceinline__
#else
#define PLANISH_HD inline
#endif

#if defined(__CUDA_ARCH__)
#define PLANISH_UNROLL _Pragma("unroll")
#define PLANISH_ROLLED _Pragma("unroll 1")
#else
#define PLANISH_UNROLL
#define PLANISH_ROLLED
#endif

namespace planish {

// A float as its bits, and back.
PLANISH_HD uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
#endif
}

PLANISH_HD float float_of_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
#endif
}

// Products, sums and quotients that are rounded one by one. nvcc joins x * y + z into one operation with one rounding,
// a C++ compiler for x86 does not, and neither does ONNX Runtime; where results are to be equal, these are used.
PLANISH_HD float product_of(float x, float y) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(x, y);
#else
    return x * y;
#endif
}

PLANISH_HD float sum_of(float x, float y) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(x, y);
#else
    return x + y;
#endif
}

PLANISH_HD float quotient_of(float x, float y) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(x, y);
#else
    return x / y;
#endif
}

// Four words that a lane reads or writes as one: the widest access a GPU has.
struct alignas(16) Quad {
    uint32_t word[4];
};

template <class Integer>
PLANISH_HD constexpr Integer ceil_div(Integer n, Integer divisor) {
    return (n + divisor - 1) / divisor;
}

}  // namespace planish
