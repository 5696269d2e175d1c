// What the launchers of the cache's kernels share: the checks of its arguments, and asynchronous copies.
#pragma once

#include "kv_cache.cuh"
#include "kv_rows.cuh"
#include "launch.cuh"

namespace planish {

// Copies of 16 bytes from global to shared memory that go on while the warp computes.
struct AsyncCopy {
    __device__ __forceinline__ void bytes16(void* to, const void* from) {
        asm volatile(
            "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
            "l"(from)
            : "memory");
    }

    __device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

    // Waits for all groups but the last PENDING ones.
    template <int PENDING>
    __device__ __forceinline__ void wait() {
        asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
    }
};

// Checks the cache and its new tokens, and turns them into the form that kernels take.
int read_cache(const planish_kv_cache& given, KvCache& cache);
int read_tokens(const planish_kv_tokens& given, NewTokens& news);

// Checks the vectors of tokens, `name` of `heads` heads, whose tokens are `stride` elements apart.
int check_vectors(const char* name, const void* vectors, int type, int heads, int head_dim, int64_t stride);

// Calls function(Constant<head_dim>{}); read_cache has checked it.
template <class Function>
int with_head_dim(int head_dim, Function function) {
    if (head_dim == 64) return function(Constant<64>{});
    if (head_dim == 96) return function(Constant<96>{});
    return function(Constant<128>{});
}

}  // namespace planish
