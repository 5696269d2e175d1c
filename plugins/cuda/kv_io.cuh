// Four neighbouring channels at a time from and to memory, in any of the types of the C interface.
#pragma once

#include "kv_float.cuh"

namespace planish {

// The values of enum planish_type.
enum class FloatType : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

constexpr int kQuad = 4;

struct FloatQuad {
    float value[kQuad];
};

PLANISH_HD Half bfloat16_of_float(float value) {
    const uint32_t bits = bits_of(value);
    return static_cast<Half>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// Loads and stores of 16 or 8 bytes: `index` is a multiple of 4.
PLANISH_HD FloatQuad load_quad(const void* from, FloatType type, int64_t index) {
    FloatQuad quad;
    if (type == FloatType::kFloat32) {
        const Quad words = *reinterpret_cast<const Quad*>(static_cast<const float*>(from) + index);
        PLANISH_UNROLL
        for (int i = 0; i < kQuad; ++i) quad.value[i] = float_of_bits(words.word[i]);
        return quad;
    }
    const uint64_t four = *reinterpret_cast<const uint64_t*>(static_cast<const Half*>(from) + index);
    PLANISH_UNROLL
    for (int i = 0; i < kQuad; ++i) {
        const auto half = static_cast<Half>(four >> 16 * i);
        quad.value[i] = type == FloatType::kFloat16 ? float_of_half(half) : float_of_bits(uint32_t{half} << 16);
    }
    return quad;
}

PLANISH_HD void store_quad(void* to, FloatType type, int64_t index, const FloatQuad& quad) {
    if (type == FloatType::kFloat32) {
        Quad words;
        PLANISH_UNROLL
        for (int i = 0; i < kQuad; ++i) words.word[i] = bits_of(quad.value[i]);
        *reinterpret_cast<Quad*>(static_cast<float*>(to) + index) = words;
        return;
    }
    uint64_t four = 0;
    PLANISH_UNROLL
    for (int i = 0; i < kQuad; ++i) {
        const Half half = type == FloatType::kFloat16 ? half_of_float(quad.value[i]) : bfloat16_of_float(quad.value[i]);
        four |= static_cast<uint64_t>(half) << 16 * i;
    }
    *reinterpret_cast<uint64_t*>(static_cast<Half*>(to) + index) = four;
}

}  // namespace planish
