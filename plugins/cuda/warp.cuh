// A warp, on the GPU or emulated: the code of a kernel is written once, for the lanes of either.
//
// What lanes do on their own is a lambda given to `each`, and what they keep in registers a `PerLane`. What they do
// together is an MMA. On the GPU both cost nothing: `each` runs the lambda for the calling lane and `PerLane` is one
// value. HostWarp runs the lambda 32 times and multiplies by the fragment maps of the PTX ISA, one lane after the
// other.
//
// Both codes of an MMA are unsigned and the accumulator is int32, or both are float16 or tf32 and it is float32;
// D = A B + D.
#pragma once

#include "fragments.cuh"
#include "halves.cuh"

namespace planish {

struct FragmentA {
    uint32_t reg[4];
};

struct alignas(8) FragmentB {
    uint32_t reg[2];
};

struct FragmentC {
    int32_t reg[4];
};

// Sums of an MMA of floats, in the places of FragmentC.
struct FragmentF {
    float reg[4];
};

#if defined(__CUDACC__)

struct DeviceWarp {
    // The index of the calling lane's warp in its block. Taken from lane 0, so that the compiler knows it to be the
    // same for all lanes and what a warp loops over needs no care for lanes that leave early.
    static __device__ __forceinline__ int index() {
        return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / kLanes, 0);
    }

    template <class T>
    struct PerLane {
        T value;
        __device__ __forceinline__ T& operator[](int) { return value; }
        __device__ __forceinline__ const T& operator[](int) const { return value; }
    };

    template <class Function>
    static __device__ __forceinline__ void each(Function function) {
        function(static_cast<int>(threadIdx.x) % kLanes);
    }

    // m16n8k32, native from sm_80 on to sm_121.
    static __device__ __forceinline__ void mma_u8(PerLane<FragmentC>& c, const PerLane<FragmentA>& a,
                                                  const PerLane<FragmentB>& b) {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(c.value.reg[0]), "+r"(c.value.reg[1]), "+r"(c.value.reg[2]), "+r"(c.value.reg[3])
            : "r"(a.value.reg[0]), "r"(a.value.reg[1]), "r"(a.value.reg[2]), "r"(a.value.reg[3]), "r"(b.value.reg[0]),
              "r"(b.value.reg[1]));
    }

    // m16n8k16 of float16.
    static __device__ __forceinline__ void mma_f16(PerLane<FragmentF>& c, const PerLane<FragmentA>& a,
                                                   const PerLane<FragmentB>& b) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c.value.reg[0]), "+f"(c.value.reg[1]), "+f"(c.value.reg[2]), "+f"(c.value.reg[3])
            : "r"(a.value.reg[0]), "r"(a.value.reg[1]), "r"(a.value.reg[2]), "r"(a.value.reg[3]), "r"(b.value.reg[0]),
              "r"(b.value.reg[1]));
    }

    // m16n8k8 of tf32: floats whose last 13 bits are zero.
    static __device__ __forceinline__ void mma_tf32(PerLane<FragmentF>& c, const PerLane<FragmentA>& a,
                                                    const PerLane<FragmentB>& b) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c.value.reg[0]), "+f"(c.value.reg[1]), "+f"(c.value.reg[2]), "+f"(c.value.reg[3])
            : "r"(a.value.reg[0]), "r"(a.value.reg[1]), "r"(a.value.reg[2]), "r"(a.value.reg[3]), "r"(b.value.reg[0]),
              "r"(b.value.reg[1]));
    }

    // m16n8k64, native from sm_80 on to sm_89, a subroutine on later ones.
    static __device__ __forceinline__ void mma_u4(PerLane<FragmentC>& c, const PerLane<FragmentA>& a,
                                                  const PerLane<FragmentB>& b) {
        asm("mma.sync.aligned.m16n8k64.row.col.s32.u4.u4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(c.value.reg[0]), "+r"(c.value.reg[1]), "+r"(c.value.reg[2]), "+r"(c.value.reg[3])
            : "r"(a.value.reg[0]), "r"(a.value.reg[1]), "r"(a.value.reg[2]), "r"(a.value.reg[3]), "r"(b.value.reg[0]),
              "r"(b.value.reg[1]));
    }
};

#endif  // __CUDACC__

struct HostWarp {
    template <class T>
    struct PerLane {
        T values[kLanes];
        T& operator[](int lane) { return values[lane]; }
        const T& operator[](int lane) const { return values[lane]; }
    };

    template <class Function>
    static void each(Function function) {
        for (int lane = 0; lane < kLanes; ++lane) function(lane);
    }

    static void mma_u8(PerLane<FragmentC>& c, const PerLane<FragmentA>& a, const PerLane<FragmentB>& b) {
        multiply<4, int32_t>(c, a, b, [](uint32_t field) { return static_cast<int32_t>(field); });
    }

    // m16n8k64.
    static void mma_u4(PerLane<FragmentC>& c, const PerLane<FragmentA>& a, const PerLane<FragmentB>& b) {
        multiply<8, int32_t>(c, a, b, [](uint32_t field) { return static_cast<int32_t>(field); });
    }

    // m16n8k16 of float16.
    static void mma_f16(PerLane<FragmentF>& c, const PerLane<FragmentA>& a, const PerLane<FragmentB>& b) {
        multiply<2, float>(c, a, b, [](uint32_t field) { return half_value(static_cast<uint16_t>(field)); });
    }

    // m16n8k8 of tf32. What an operand has behind the bits of tf32 is not there.
    static void mma_tf32(PerLane<FragmentF>& c, const PerLane<FragmentA>& a, const PerLane<FragmentB>& b) {
        multiply<1, float>(c, a, b, [](uint32_t field) { return float_of_bits(field & 0xFFFFE000u); });
    }

  private:
    // FIELDS elements to a register: gather both operands as matrices, multiply, and hand the sums out to the lanes.
    template <int FIELDS, class Number, class Sums, class Value>
    static void multiply(Sums& c, const PerLane<FragmentA>& a, const PerLane<FragmentB>& b, Value value) {
        constexpr int kWidth = 32 / FIELDS;
        constexpr uint32_t kMask = 0xFFFFFFFFu >> (32 - kWidth);
        Number left[kTileRows][8 * FIELDS], right[kTileTokens][8 * FIELDS];
        for (int lane = 0; lane < kLanes; ++lane) {
            for (int field = 0; field < FIELDS; ++field) {
                for (int reg = 0; reg < 4; ++reg) {
                    const Place at = a_place<FIELDS>(lane, reg, field);
                    left[at.row][at.k] = value(a[lane].reg[reg] >> field * kWidth & kMask);
                }
                for (int reg = 0; reg < 2; ++reg) {
                    const Place at = b_place<FIELDS>(lane, reg, field);
                    right[at.row][at.k] = value(b[lane].reg[reg] >> field * kWidth & kMask);
                }
            }
        }
        for (int lane = 0; lane < kLanes; ++lane) {
            for (int reg = 0; reg < 4; ++reg) {
                const Number* x = left[c_row(lane, reg)];
                const Number* y = right[c_token(lane, reg)];
                Number sum = 0;
                for (int k = 0; k < 8 * FIELDS; ++k) sum += x[k] * y[k];
                c[lane].reg[reg] += sum;
            }
        }
    }
};

}  // namespace planish
