// Which bit of a packed row of the cache is which channel, and how a row becomes operands of an MMA.
//
// The cache has the portable layout of plugins/packing.py: no token shares a byte with another, and a token is appended
// by writing it. Kernels read it as it is, because an MMA does not care which channel meets which k as long as both of
// its operands agree. A row of D codes is read as fields:
//
//     bits   planes   fields of a plane   a field holds
//     2      1        D of 2 bits         a code
//     3      3        D / 4 of 4 bits     a code in the low three bits; the three spare bits of the same field of all
//                                         planes are a fourth code, the spread one
//     4      1        D of 4 bits         a code
//     8      1        D of 8 bits         a code
//
// The fields of a plane are cut into eight *runs*, one behind the other, with D / 8 codes in each. A lane takes two
// runs side by side, one in the low and one in the high half of each word: two runs of one token for keys, the same run
// of two tokens for values. Masking such a word leaves pairs of codes where an MMA wants pairs of float16.
//
// A masked code is a float16 as it is: bits 0 .. 9 are the mantissa of a subnormal number, so a code at bit s of its
// half has the value code * 2^(s - 24). Tensor cores multiply subnormal numbers exactly, and the factors, which are
// powers of two, go into the other operand or into the result. So there are no conversions, and no instruction per code
// but the mask: 0.63, 0.81 and 0.56 instructions per code at 4, 3 and 2 bits.
#pragma once

#include "portable.cuh"

namespace planish {

constexpr int kRuns = 8;

// The power of two that a code at bit 0 of a float16 is worth.
constexpr int kCodeExponent = -24;

// The row of D codes of BITS bits.
template <int BITS, int D>
struct Row {
    static_assert(BITS == 2 || BITS == 3 || BITS == 4 || BITS == 8, "a cache has 2, 3, 4 or 8 bits");
    static_assert(D % 32 == 0, "a row is whole words in every plane");

    static constexpr int kPlanes = BITS == 3 ? 3 : 1;
    static constexpr int kFieldBits = BITS == 3 ? 4 : BITS;
    static constexpr int kWords = D * BITS / 32;
    static constexpr int kPlaneWords = kWords / kPlanes;
    static constexpr int kRunCodes = D / kRuns;
    static constexpr int kRunBits = D * BITS / (kPlanes * kRuns);
    static constexpr int kRunFields = kRunBits / kFieldBits;
    // Halves of words that a run takes in each plane.
    static constexpr int kHalves = (kRunBits + 15) / 16;
    static constexpr int kHalfFields = 16 / kFieldBits;

    // Codes e = 0 .. kRunCodes - 1 of a run: by plane (3 is the spread code), then by field.
    static constexpr PLANISH_HD int field(int e) { return e % kRunFields; }
    static constexpr PLANISH_HD int plane(int e) { return e / kRunFields; }

    // The bit of its half at which code e lies once the word is shifted by `byte_shift`.
    static constexpr PLANISH_HD int byte_shift(int e) { return field(e) % kHalfFields * kFieldBits & 8; }
    static constexpr PLANISH_HD int shift(int e) { return field(e) % kHalfFields * kFieldBits & 7; }

    // The channel of code e of a run.
    static constexpr PLANISH_HD int channel(int run, int e) {
        const int k = run * kRunFields + field(e);
        if (BITS == 8) return k;
        if (BITS == 4) return k % 2 * (D / 2) + k / 2;
        if (BITS == 2) return k % 4 * (D / 4) + k / 4;
        const int chunk = plane(e) < 3 ? plane(e) + 3 * (k % 2) : 6 + k % 2;
        return chunk * (D / 8) + k / 2;
    }
};

// Loads COUNT words at once as far as their alignment, that of COUNT words, allows.
template <int COUNT>
PLANISH_HD void load_words(const uint32_t* from, uint32_t* words) {
    struct alignas(8) Two {
        uint32_t word[2];
    };
    if constexpr (COUNT % 4 == 0) {
        PLANISH_UNROLL
        for (int i = 0; i < COUNT / 4; ++i) {
            const Quad quad = reinterpret_cast<const Quad*>(from)[i];
            PLANISH_UNROLL
            for (int j = 0; j < 4; ++j) words[4 * i + j] = quad.word[j];
        }
    } else if constexpr (COUNT % 2 == 0) {
        PLANISH_UNROLL
        for (int i = 0; i < COUNT / 2; ++i) {
            const Two two = reinterpret_cast<const Two*>(from)[i];
            PLANISH_UNROLL
            for (int j = 0; j < 2; ++j) words[2 * i + j] = two.word[j];
        }
    } else {
        PLANISH_UNROLL
        for (int i = 0; i < COUNT; ++i) words[i] = from[i];
    }
}

// 32 bits from bit `bit` of two words on.
PLANISH_HD uint32_t funnel(uint32_t low, uint32_t high, int bit) {
#if defined(__CUDA_ARCH__)
    return __funnelshift_r(low, high, bit);
#else
    return static_cast<uint32_t>((low | static_cast<uint64_t>(high) << 32) >> bit);
#endif
}

// BITS_READ bits of a plane, from bit `skip` of word[0] on; what is behind them is anything.
template <int BITS_READ>
struct PlaneBits {
    static constexpr int kWords = (BITS_READ + 31) / 32;
    uint32_t word[kWords];
    int skip;  // 0, or a multiple of 8 where the bits are a part of one word
};

// Reads the bits from `bit`, a multiple of BITS_READ, on. Where BITS_READ neither divides 32 nor is a multiple of it,
// up to one word behind them is read as well.
template <int BITS_READ>
PLANISH_HD PlaneBits<BITS_READ> read_bits(const uint32_t* plane, int bit) {
    PlaneBits<BITS_READ> bits = {};
    if constexpr (BITS_READ % 32 == 0) {
        load_words<BITS_READ / 32>(plane + bit / 32, bits.word);
    } else if constexpr (32 % BITS_READ == 0) {
        bits.word[0] = plane[bit / 32];
        bits.skip = bit % 32;
    } else {
        PLANISH_UNROLL
        for (int i = 0; i < bits.kWords; ++i) {
            bits.word[i] = funnel(plane[bit / 32 + i], plane[bit / 32 + i + 1], bit % 32);
        }
    }
    return bits;
}

// A word whose low half is what `low` holds from bit `low_bit` on, and whose high half what `high` holds from
// `high_bit` on; both multiples of 8. From bit 24 on only the lower byte of a half is defined.
PLANISH_HD uint32_t join_halves(uint32_t low, int low_bit, uint32_t high, int high_bit) {
#if defined(__CUDA_ARCH__)
    return __byte_perm(low, high, 0x5410 + low_bit / 8 * 0x11 + high_bit / 8 * 0x1100);
#else
    return (low >> low_bit & 0xFFFFu) | (high >> high_bit & 0xFFFFu) << 16;
#endif
}

// A word and a bit of it, a multiple of 8, from which 16 bits are wanted.
struct HalfAt {
    uint32_t word;
    int bit;
};

// The 16 bits at POSITION of what was read.
template <int POSITION, int BITS_READ>
PLANISH_HD HalfAt half_at(const PlaneBits<BITS_READ>& bits) {
    constexpr int kWord = POSITION / 32, kBit = POSITION % 32;
    if constexpr (kBit % 16 == 0) {
        return {bits.word[kWord], kBit + bits.skip};
    } else if constexpr (32 % BITS_READ == 0) {
        return {bits.word[kWord], kBit + bits.skip};
    } else if constexpr (kWord + 1 < PlaneBits<BITS_READ>::kWords) {
        return {funnel(bits.word[kWord], bits.word[kWord + 1], kBit), 0};
    } else {
        return {bits.word[kWord] >> kBit, 0};
    }
}

// Two runs, side by side: word plane * kHalves + half.
template <class R>
struct RunPair {
    uint32_t word[R::kPlanes * R::kHalves];
};

// A number as a type.
template <int VALUE>
struct Constant {
    static constexpr int value = VALUE;
};

// Calls function(Constant<0>{}), ... , function(Constant<COUNT - 1>{}).
template <int COUNT, int FIRST = 0, class Function>
PLANISH_HD void for_constants(Function function) {
    if constexpr (FIRST < COUNT) {
        function(Constant<FIRST>{});
        for_constants<COUNT, FIRST + 1>(function);
    }
}

// Runs 2 i and 2 i + 1 of one row: what lane 4 g + i takes of a key.
template <class R>
PLANISH_HD RunPair<R> neighbouring_runs(const uint32_t* row, int i) {
    RunPair<R> pair;
    for_constants<R::kPlanes>([&](auto plane) {
        constexpr int kPlane = decltype(plane)::value;
        const auto bits = read_bits<2 * R::kRunBits>(row + kPlane * R::kPlaneWords, 2 * i * R::kRunBits);
        for_constants<R::kHalves>([&](auto half) {
            constexpr int kHalf = decltype(half)::value;
            uint32_t& word = pair.word[kPlane * R::kHalves + kHalf];
            if constexpr (R::kRunBits == 16) {
                word = bits.word[0];
            } else {
                const HalfAt low = half_at<16 * kHalf>(bits), high = half_at<R::kRunBits + 16 * kHalf>(bits);
                word = join_halves(low.word, low.bit, high.word, high.bit);
            }
        });
    });
    return pair;
}

// The same run of two rows: what lane 4 run + t takes of two values.
template <class R>
PLANISH_HD RunPair<R> runs_of_two(const uint32_t* first, const uint32_t* second, int run) {
    RunPair<R> pair;
    for_constants<R::kPlanes>([&](auto plane) {
        constexpr int kPlane = decltype(plane)::value;
        const auto low = read_bits<R::kRunBits>(first + kPlane * R::kPlaneWords, run * R::kRunBits);
        const auto high = read_bits<R::kRunBits>(second + kPlane * R::kPlaneWords, run * R::kRunBits);
        for_constants<R::kHalves>([&](auto half) {
            constexpr int kHalf = decltype(half)::value;
            const HalfAt a = half_at<16 * kHalf>(low), b = half_at<16 * kHalf>(high);
            pair.word[kPlane * R::kHalves + kHalf] = join_halves(a.word, a.bit, b.word, b.bit);
        });
    });
    return pair;
}

// Pairs of codes as pairs of float16, code e of both runs: its value is code * 2^(kCodeExponent + R::shift(e)).
template <int D>
struct CodePairs {
    uint32_t pair[D / kRuns];
};

template <int BITS, int D>
PLANISH_HD CodePairs<D> unpack_pairs(const RunPair<Row<BITS, D>>& runs) {
    using R = Row<BITS, D>;
    constexpr uint32_t kMask = ((1u << BITS) - 1) * 0x10001u;
    CodePairs<D> codes;
    PLANISH_UNROLL
    for (int e = 0; e < R::kRunCodes; ++e) {
        const int half = R::field(e) / R::kHalfFields;
        uint32_t word;
        if (R::plane(e) < R::kPlanes) {
            word = runs.word[R::plane(e) * R::kHalves + half];
        } else {
            const uint32_t* w = runs.word + half;
            word =
                (w[0] >> 3 & 0x11111111u) | (w[R::kHalves] >> 2 & 0x22222222u) | (w[2 * R::kHalves] >> 1 & 0x44444444u);
        }
        codes.pair[e] = word >> R::byte_shift(e) & kMask << R::shift(e);
    }
    return codes;
}

}  // namespace planish
