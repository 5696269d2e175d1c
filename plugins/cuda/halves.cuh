// float16 in pairs, on the GPU or emulated bit by bit. The low half of a word comes first.
#pragma once

#include <cstring>

#include "portable.cuh"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace planish {

// The value of a float16, without the help of a compiler that knows the type.
inline float half_value(uint16_t bits) {
    const uint32_t sign = uint32_t{bits} >> 15 << 31, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 0) {
        const float magnitude = static_cast<float>(fraction) / (1 << 24);
        return sign ? -magnitude : magnitude;
    }
    const uint32_t word = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

// The float16 of a whole number up to 2048 in magnitude, which it holds exactly.
inline uint16_t half_of_integer(int value) {
    const uint32_t magnitude = static_cast<uint32_t>(value < 0 ? -value : value);
    if (magnitude == 0) return 0;
    int exponent = 0;
    while (magnitude >> (exponent + 1)) ++exponent;
    const uint32_t bits = static_cast<uint32_t>(exponent + 15) << 10 | ((magnitude << 10 >> exponent) & 1023);
    return static_cast<uint16_t>(bits | (value < 0 ? 0x8000u : 0u));
}

// Both halves of `word`, 1024 + SHIFT code each, as code - zero: exact, because all are whole numbers below 2048.
// SHIFT is 1, or 16 where the codes are the second nibbles of bytes.
template <int SHIFT>
PLANISH_HD uint32_t centred_halves(uint32_t word, int zero) {
#if defined(__CUDA_ARCH__)
    const __half2 biased = *reinterpret_cast<const __half2*>(&word);
    const __half2 bias = __float2half2_rn(static_cast<float>(-(1024 / SHIFT + zero)));
    const __half2 codes = SHIFT == 1 ? __hadd2(biased, bias) : __hfma2(biased, __float2half2_rn(1.0f / SHIFT), bias);
    return *reinterpret_cast<const uint32_t*>(&codes);
#else
    const auto one = [&](uint32_t bits) {
        const int value = static_cast<int>(half_value(static_cast<uint16_t>(bits)));
        return uint32_t{half_of_integer((value - 1024) / SHIFT - zero)};
    };
    return one(word & 0xFFFF) | one(word >> 16) << 16;
#endif
}

// The low or the high halves of two words.
PLANISH_HD uint32_t low_halves(uint32_t x, uint32_t y) {
#if defined(__CUDA_ARCH__)
    return __byte_perm(x, y, 0x5410);
#else
    return (x & 0xFFFF) | y << 16;
#endif
}

PLANISH_HD uint32_t high_halves(uint32_t x, uint32_t y) {
#if defined(__CUDA_ARCH__)
    return __byte_perm(x, y, 0x7632);
#else
    return x >> 16 | (y & 0xFFFF0000u);
#endif
}

}  // namespace planish
