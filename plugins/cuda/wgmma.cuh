// Hopper's MMA of a warpgroup, on the GPU or emulated.
//
// wgmma m64nNk32 multiplies 64 rows, 16 to each of four warps, whose codes are in registers, with N tokens, whose codes
// are in shared memory. To a warp its part is an m16nNk32: the fragments of A and C are those of m16n8k32 (PTX ISA,
// "Register Fragments for wgmma.mma_async.m64nNk32"). So both are written as what one warp does.
//
// It is u8 x u8, not u8 x s8: stored codes of weights are unsigned, and making them signed would take an instruction
// for every four, while the algebra of zero points (zero_points.cuh) takes one for every output.
//
// A descriptor (PTX ISA, "Matrix Descriptor") says where tokens lie in shared memory. Rows here are 64 bytes, a tile of
// one token, and the 16-byte chunks of eight rows are swizzled, so that both the copies that fill them and the MMA find
// all banks: bits 4 and 5 of an address are its own, exclusive-or bits 7 and 8.
#pragma once

#include "warp.cuh"

namespace planish {

// Bytes of a row, and of the eight rows after which the pattern of the swizzle begins again.
constexpr int kSwizzleRow = 64;
constexpr int kSwizzleAtom = 8 * kSwizzleRow;

PLANISH_HD constexpr uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x30); }

// The descriptor of rows that begin at the shared address `address`, a multiple of kSwizzleAtom, at byte `k` of each.
PLANISH_HD constexpr uint64_t row_descriptor(uint32_t address, int k) {
    constexpr uint64_t kUnit = 16, kSwizzle64 = 2, kLeading = 1;  // the leading offset is not used by a swizzled layout
    return (address + static_cast<uint32_t>(k)) / kUnit | kLeading << 16 | kSwizzleAtom / kUnit << 32 |
           kSwizzle64 << 62;
}

#if defined(__CUDACC__)

// To be compiled for sm_90a alone.
struct DeviceWgmma {
    template <class T>
    using PerLane = DeviceWarp::PerLane<T>;

    // Keeps the compiler from moving what reads or writes these registers to the other side of this line: MMAs use them
    // behind its back.
    template <class Fragment, int COUNT>
    static __device__ __forceinline__ void settle(PerLane<Fragment> (&fragments)[COUNT]) {
        PLANISH_UNROLL
        for (int i = 0; i < COUNT; ++i) {
            PLANISH_UNROLL
            for (int reg = 0; reg < 4; ++reg) asm volatile("" : "+r"(fragments[i].value.reg[reg])::"memory");
        }
    }

    // Orders what a thread wrote into registers before the MMAs that follow.
    static __device__ __forceinline__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

    static __device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

    // Waits until no more than the newest COUNT groups of MMAs are under way.
    template <int COUNT>
    static __device__ __forceinline__ void wait() {
        asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(COUNT) : "memory");
    }

    static __device__ __forceinline__ void multiply(PerLane<FragmentC> (&c)[8], const PerLane<FragmentA>& a,
                                                    uint64_t descriptor) {
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.u8 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
            "{%32, %33, %34, %35}, %36, 1;"
            : "+r"(c[0].value.reg[0]), "+r"(c[0].value.reg[1]), "+r"(c[0].value.reg[2]), "+r"(c[0].value.reg[3]),
              "+r"(c[1].value.reg[0]), "+r"(c[1].value.reg[1]), "+r"(c[1].value.reg[2]), "+r"(c[1].value.reg[3]),
              "+r"(c[2].value.reg[0]), "+r"(c[2].value.reg[1]), "+r"(c[2].value.reg[2]), "+r"(c[2].value.reg[3]),
              "+r"(c[3].value.reg[0]), "+r"(c[3].value.reg[1]), "+r"(c[3].value.reg[2]), "+r"(c[3].value.reg[3]),
              "+r"(c[4].value.reg[0]), "+r"(c[4].value.reg[1]), "+r"(c[4].value.reg[2]), "+r"(c[4].value.reg[3]),
              "+r"(c[5].value.reg[0]), "+r"(c[5].value.reg[1]), "+r"(c[5].value.reg[2]), "+r"(c[5].value.reg[3]),
              "+r"(c[6].value.reg[0]), "+r"(c[6].value.reg[1]), "+r"(c[6].value.reg[2]), "+r"(c[6].value.reg[3]),
              "+r"(c[7].value.reg[0]), "+r"(c[7].value.reg[1]), "+r"(c[7].value.reg[2]), "+r"(c[7].value.reg[3])
            : "r"(a.value.reg[0]), "r"(a.value.reg[1]), "r"(a.value.reg[2]), "r"(a.value.reg[3]), "l"(descriptor));
    }

    static __device__ __forceinline__ void multiply(PerLane<FragmentC> (&c)[16], const PerLane<FragmentA>& a,
                                                    uint64_t descriptor) {
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.u8 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
            "{%64, %65, %66, %67}, %68, 1;"
            : "+r"(c[0].value.reg[0]), "+r"(c[0].value.reg[1]), "+r"(c[0].value.reg[2]), "+r"(c[0].value.reg[3]),
              "+r"(c[1].value.reg[0]), "+r"(c[1].value.reg[1]), "+r"(c[1].value.reg[2]), "+r"(c[1].value.reg[3]),
              "+r"(c[2].value.reg[0]), "+r"(c[2].value.reg[1]), "+r"(c[2].value.reg[2]), "+r"(c[2].value.reg[3]),
              "+r"(c[3].value.reg[0]), "+r"(c[3].value.reg[1]), "+r"(c[3].value.reg[2]), "+r"(c[3].value.reg[3]),
              "+r"(c[4].value.reg[0]), "+r"(c[4].value.reg[1]), "+r"(c[4].value.reg[2]), "+r"(c[4].value.reg[3]),
              "+r"(c[5].value.reg[0]), "+r"(c[5].value.reg[1]), "+r"(c[5].value.reg[2]), "+r"(c[5].value.reg[3]),
              "+r"(c[6].value.reg[0]), "+r"(c[6].value.reg[1]), "+r"(c[6].value.reg[2]), "+r"(c[6].value.reg[3]),
              "+r"(c[7].value.reg[0]), "+r"(c[7].value.reg[1]), "+r"(c[7].value.reg[2]), "+r"(c[7].value.reg[3]),
              "+r"(c[8].value.reg[0]), "+r"(c[8].value.reg[1]), "+r"(c[8].value.reg[2]), "+r"(c[8].value.reg[3]),
              "+r"(c[9].value.reg[0]), "+r"(c[9].value.reg[1]), "+r"(c[9].value.reg[2]), "+r"(c[9].value.reg[3]),
              "+r"(c[10].value.reg[0]), "+r"(c[10].value.reg[1]), "+r"(c[10].value.reg[2]), "+r"(c[10].value.reg[3]),
              "+r"(c[11].value.reg[0]), "+r"(c[11].value.reg[1]), "+r"(c[11].value.reg[2]), "+r"(c[11].value.reg[3]),
              "+r"(c[12].value.reg[0]), "+r"(c[12].value.reg[1]), "+r"(c[12].value.reg[2]), "+r"(c[12].value.reg[3]),
              "+r"(c[13].value.reg[0]), "+r"(c[13].value.reg[1]), "+r"(c[13].value.reg[2]), "+r"(c[13].value.reg[3]),
              "+r"(c[14].value.reg[0]), "+r"(c[14].value.reg[1]), "+r"(c[14].value.reg[2]), "+r"(c[14].value.reg[3]),
              "+r"(c[15].value.reg[0]), "+r"(c[15].value.reg[1]), "+r"(c[15].value.reg[2]), "+r"(c[15].value.reg[3])
            : "r"(a.value.reg[0]), "r"(a.value.reg[1]), "r"(a.value.reg[2]), "r"(a.value.reg[3]), "l"(descriptor));
    }
};

#endif  // __CUDACC__

// One warp of a warpgroup. Shared addresses are offsets into `memory`.
struct HostWgmma {
    template <class T>
    using PerLane = HostWarp::PerLane<T>;

    const uint8_t* memory;

    template <class Fragment, int COUNT>
    static void settle(PerLane<Fragment> (&)[COUNT]) {}
    static void begin() {}
    static void commit() {}
    template <int COUNT>
    static void wait() {}

    // Reads the tokens as the descriptor says, eight at a time, into fragments of B, for an m16n8k32 each. The swizzle
    // is written here a second time: row r of eight has chunk c of 16 bytes at place c xor r / 2.
    template <int TOKEN_TILES>
    void multiply(PerLane<FragmentC> (&c)[TOKEN_TILES], const PerLane<FragmentA>& a, uint64_t descriptor) const {
        const auto start = static_cast<uint32_t>(descriptor & 0x3FFF) * 16;
        const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) * 16;
        for (int j = 0; j < TOKEN_TILES; ++j) {
            PerLane<FragmentB> b = {};
            for (int lane = 0; lane < kLanes; ++lane) {
                for (int reg = 0; reg < 2; ++reg) {
                    for (int field = 0; field < 4; ++field) {
                        const Place at = b_place<4>(lane, reg, field);
                        const uint32_t address = start + static_cast<uint32_t>(j) * stride +
                                                 static_cast<uint32_t>(at.row * kSwizzleRow + at.k);
                        const uint32_t chunk = address / 16 % 4, row = descriptor >> 62 == 2 ? address / 64 % 8 : 0;
                        const uint32_t at_byte = address - 16 * chunk + 16 * (chunk ^ row / 2);
                        b[lane].reg[reg] |= uint32_t{memory[at_byte]} << 8 * field;
                    }
                }
            }
            HostWarp::mma_u8(c[j], a, b);
        }
    }
};

}  // namespace planish
