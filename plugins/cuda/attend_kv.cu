// The launchers of kv_warps.cuh: attention of few queries with the tokens split over blocks, and of many.
//
// Few columns (at most 8: new tokens times queries of a KV head): a block of 4 warps for each split of a sequence and
// KV head, and as many splits as fill the GPU once. How many tokens a sequence has is read on the GPU, so the grid is
// that of the longest, and the splits of a short one are short. The block of a sequence and KV head that is done last
// merges the splits; it is found by counting.
//
// Registers: 128 at most for few columns, so that 16 warps are on a multiprocessor, each with 3 tiles under way: 80 KB
// at 3 bits and 128 channels, four times what the latency of memory takes.

#include "copy_async.cuh"
#include "kv_arguments.cuh"
#include "launch.cuh"

namespace planish {
namespace {

constexpr int kThreads = kAttendWarps * kLanes;
// Blocks of few columns on a multiprocessor at once, at least. For Blackwell nvcc needs more than 128 registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocks = 3;
#else
constexpr int kBlocks = 4;
#endif

struct AsyncCopy {
    __device__ __forceinline__ void bytes16(uint8_t* to, const uint8_t* from) { copy_async(to, from, true); }

    __device__ __forceinline__ void commit() { commit_copies(); }

    template <int PENDING>
    __device__ __forceinline__ void wait() {
        wait_for_copies<PENDING>();
    }
};

struct Workspace {
    float* parts;       // [batch][kv_heads][splits][columns][kPartFloats]
    unsigned* arrived;  // [batch][kv_heads] of kMostBlocks: blocks that are done; 0 between launches
};

template <int D>
__global__ void __launch_bounds__(kThreads, kBlocks)
    attend_few(const __grid_constant__ Attend task, const Workspace workspace) {
    extern __shared__ __align__(16) uint8_t shared[];
    __shared__ bool is_last;
    const int split = blockIdx.x, splits = gridDim.x, head = blockIdx.y, sequence = blockIdx.z;
    const int warp = KvDeviceWarp::index(), bytes = warp_bytes<D>(task.cache, 1);
    AsyncCopy copy;
    attend_split<KvDeviceWarp, D>(task, splits, sequence, head, split, warp, shared + warp * bytes, copy);
    __syncthreads();
    merge_warps<D>(task, splits, sequence, head, split, reinterpret_cast<const float*>(shared),
                   bytes / static_cast<int>(sizeof(float)), workspace.parts, threadIdx.x, kThreads);
    if (splits == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        // Wraps to 0 at the last one, for the next launch.
        unsigned* arrived = workspace.arrived + sequence * task.cache.kv_heads + head;
        is_last = atomicInc(arrived, splits - 1) == splits - 1;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    merge_splits<D>(task, splits, sequence, head, workspace.parts, threadIdx.x, kThreads);
}

template <int D>
__global__ void __launch_bounds__(kThreads) attend_many(const __grid_constant__ Attend task) {
    extern __shared__ __align__(16) uint8_t shared[];
    const int warp = KvDeviceWarp::index(), bytes = warp_bytes<D>(task.cache, kManyTiles);
    // The last columns attend to the most tokens: they begin first.
    const int block = gridDim.x - 1 - blockIdx.x;
    AsyncCopy copy;
    attend_columns<KvDeviceWarp, D>(task, blockIdx.z, blockIdx.y, (block * kAttendWarps + warp) * kManyTiles * kColumns,
                                    shared + warp * bytes, copy);
}

template <int D>
int launch_few(const Attend& task, int splits, const Workspace& workspace, cudaStream_t stream) {
    const int bytes = kAttendWarps * warp_bytes<D>(task.cache, 1);
    if (const int status = allow_shared(reinterpret_cast<const void*>(attend_few<D>), bytes)) return status;
    const dim3 grid(splits, task.cache.kv_heads, task.news.batch);
    attend_few<D><<<grid, kThreads, bytes, stream>>>(task, workspace);
    return launched("planish_attend_kv");
}

template <int D>
int launch_many(const Attend& task, cudaStream_t stream) {
    const int bytes = kAttendWarps * warp_bytes<D>(task.cache, kManyTiles);
    if (const int status = allow_shared(reinterpret_cast<const void*>(attend_many<D>), bytes)) return status;
    const dim3 grid(ceil_div(columns_of(task), kAttendWarps * kManyTiles * kColumns), task.cache.kv_heads,
                    task.news.batch);
    attend_many<D><<<grid, kThreads, bytes, stream>>>(task);
    return launched("planish_attend_kv");
}

}  // namespace
}  // namespace planish

extern "C" int planish_plan_attend(planish_attend* given) {
    using namespace planish;
    Attend task;
    if (const int status = read_shapes(*given, task)) return status;
    return with_head_dim(task.cache.head_dim, [&](auto head_dim) {
        constexpr int kD = decltype(head_dim)::value;
        const int bytes = kAttendWarps * warp_bytes<kD>(task.cache, 1);
        if (const int status = allow_shared(reinterpret_cast<const void*>(attend_few<kD>), bytes)) return status;
        int device = 0, multiprocessors = 0, blocks = 0;
        cudaError_t error = cudaGetDevice(&device);
        if (error == cudaSuccess) {
            error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
        }
        if (error == cudaSuccess) {
            error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, attend_few<kD>, kThreads, bytes);
        }
        if (error != cudaSuccess)
            return fail(PLANISH_CUDA_FAILED, "no GPU can be asked: %s", cudaGetErrorString(error));
        plan_attend(task, multiprocessors * blocks, *given);
        return static_cast<int>(PLANISH_OK);
    });
}

extern "C" int planish_attend_kv(const planish_attend* given, void* stream) {
    using namespace planish;
    Attend task;
    if (const int status = read_attend(*given, task)) return status;
    auto* counters = static_cast<unsigned*>(given->workspace);
    const Workspace workspace = {reinterpret_cast<float*>(counters + kMostBlocks), counters};
    const auto on = static_cast<cudaStream_t>(stream);
    return with_head_dim(task.cache.head_dim, [&](auto head_dim) {
        constexpr int kD = decltype(head_dim)::value;
        if (columns_of(task) > kColumns) return launch_many<kD>(task, on);
        return launch_few<kD>(task, given->splits, workspace, on);
    });
}
