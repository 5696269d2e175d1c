// The launcher of kv_append.cuh: a warp for each row, or for kMappedRows rows where there is a key map and more than
// one token.

#include "kv_arguments.cuh"
#include "launch.cuh"

namespace planish {
namespace {

constexpr int kAppendWarps = 4;

template <int D, int ROWS, bool MAPPED>
__global__ void __launch_bounds__(kAppendWarps* kLanes) append_kv(const __grid_constant__ Append task) {
    __shared__ __align__(16) float rows[MAPPED ? kAppendWarps * ROWS * D : 4];
    const int warp = KvDeviceWarp::index();
    const int64_t index = int64_t{blockIdx.x} * kAppendWarps + warp;
    if (index >= append_warps<ROWS>(task)) return;
    append_rows<D, ROWS, KvDeviceWarp>(task, append_work<ROWS>(task, index), rows + (MAPPED ? warp * ROWS * D : 0));
}

template <int D, int ROWS, bool MAPPED>
int launch(const Append& task, cudaStream_t stream) {
    const int64_t blocks = ceil_div<int64_t>(append_warps<ROWS>(task), kAppendWarps);
    append_kv<D, ROWS, MAPPED><<<static_cast<unsigned>(blocks), kAppendWarps * kLanes, 0, stream>>>(task);
    return launched("planish_append_kv");
}

}  // namespace
}  // namespace planish

extern "C" int planish_append_kv(const planish_append* given, void* stream) {
    using namespace planish;
    Append task;
    if (const int status = read_append(*given, task)) return status;
    const auto on = static_cast<cudaStream_t>(stream);
    return with_head_dim(task.cache.head_dim, [&](auto head_dim) {
        constexpr int kD = decltype(head_dim)::value;
        if (!task.key_map.matrix) return launch<kD, 1, false>(task, on);
        return task.news.tokens == 1 ? launch<kD, 1, true>(task, on) : launch<kD, kMappedRows, true>(task, on);
    });
}
