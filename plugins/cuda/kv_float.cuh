// Floats that are the same on the GPU and on the host: float16 as its bits, and arithmetic rounded step by step.
//
// Compilers may join a product and a sum into one operation that rounds once. Codes of the cache must be those of
// PlanishAppendKv, whose steps are rounded one by one, so the steps are spelled here.
#pragma once

#include <cmath>
#include <cstring>

#include "halves.cuh"

namespace planish {

// The bits of a float16.
using Half = uint16_t;

// 2^n, -126 <= n <= 127.
PLANISH_HD float power_of_two(int n) { return float_of_bits(static_cast<uint32_t>(n + 127) << 23); }

PLANISH_HD float float_of_half(Half half) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(half));
#else
    return half_value(half);
#endif
}

// To nearest, halves to even; beyond the largest float16 it is infinite.
PLANISH_HD Half half_of_float(float value) {
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(value));
#else
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return static_cast<Half>(sign | 0x7E00u);
    if (magnitude >= 0x477FF000u) return static_cast<Half>(sign | 0x7C00u);
    if (magnitude < 0x38800000u) {
        // Subnormal: adding 0.5 leaves the steps of a float16 as the last bits of the mantissa, rounded.
        return static_cast<Half>(sign | (bits_of(float_of_bits(magnitude) + 0.5f) - bits_of(0.5f)));
    }
    return static_cast<Half>(sign | ((magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13));
#endif
}

// Two float16 in a register, `low` in its low half.
PLANISH_HD uint32_t half_pair(Half low, Half high) { return low | static_cast<uint32_t>(high) << 16; }

// 1 / x of a normal x, to one unit in the last place: without the steps that round it and the subroutine for the rest.
PLANISH_HD float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1 / x;
#endif
}

// 2^x, to two units in the last place; 0 below 2^-126.
PLANISH_HD float power2(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return x < -126 ? 0.0f : std::exp2(x);
#endif
}

// log2 x of a positive x, to 2^-22 absolute.
PLANISH_HD float log2_of(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return std::log2(x);
#endif
}

}  // namespace planish
