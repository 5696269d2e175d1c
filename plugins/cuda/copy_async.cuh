// Copies to shared memory in the background.
#pragma once

#include <cstdint>

namespace planish {

// 16 bytes, or zeros.
__device__ __forceinline__ void copy_async(uint8_t* to, const uint8_t* from, bool valid) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until no more than the newest COUNT groups of copies are under way.
template <int COUNT>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(COUNT) : "memory");
}

}  // namespace planish
