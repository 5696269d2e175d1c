// The launcher of kv_append.cuh: a warp for each row, or for kMappedRows rows where there is a key map and more than
// one token.

#include "kv_append.cuh"
#include "kv_launch.cuh"

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

int check(const planish_append& task) {
    const planish_kv_cache& cache = task.cache;
    const int kv_heads = cache.kv_heads, head_dim = cache.head_dim;
    if (task.heads < 0 || task.heads % kv_heads) {
        return fail(PLANISH_BAD_ARGUMENT, "%d query heads cannot share %d KV heads", task.heads, kv_heads);
    }
    for (const float clip : {task.key_clip, task.value_clip}) {
        if (!(clip > 0 && clip <= 1)) {
            return fail(PLANISH_BAD_ARGUMENT, "a clip of %g: it is above 0 and at most 1", static_cast<double>(clip));
        }
    }
    if (!task.cosines != !task.sines) return fail(PLANISH_BAD_ARGUMENT, "cosines without sines, or the reverse");
    if (task.heads && !task.key_map != !task.query_map) {
        return fail(PLANISH_BAD_ARGUMENT, "keys are mapped and queries are not, or the reverse");
    }
    if ((task.key_map || task.query_map) && task.map_count != 1 && task.map_count != kv_heads) {
        return fail(PLANISH_BAD_ARGUMENT, "%d key maps for %d heads", task.map_count, kv_heads);
    }
    if (!aligned(task.cosines) || !aligned(task.sines) || !aligned(task.key_map) || !aligned(task.query_map)) {
        return fail(PLANISH_BAD_ARGUMENT, "cosines, sines and maps begin at multiples of 16 bytes");
    }
    if (const int status = check_vectors("keys", task.keys, task.type, kv_heads, head_dim, task.stride)) return status;
    if (const int status = check_vectors("values", task.values, task.type, kv_heads, head_dim, task.stride)) {
        return status;
    }
    if (!task.heads) return PLANISH_OK;
    if (const int status = check_vectors("queries", task.queries, task.type, task.heads, head_dim, task.stride)) {
        return status;
    }
    return check_vectors("rotated queries", task.rotated, task.type, task.heads, head_dim,
                         int64_t{task.heads} * head_dim);
}

Grid grid_of(float clip, int bits) { return {static_cast<float>((1 << bits) - 1) / clip, (1.0f - clip) / 2.0f}; }

}  // namespace
}  // namespace planish

extern "C" int planish_append_kv(const planish_append* given, void* stream) {
    using namespace planish;
    Append task = {};
    if (const int status = read_cache(given->cache, task.cache)) return status;
    if (const int status = read_tokens(given->news, task.news)) return status;
    if (const int status = check(*given)) return status;
    task.queries = given->queries;
    task.keys = given->keys;
    task.values = given->values;
    task.stride = given->stride;
    task.type = static_cast<FloatType>(given->type);
    task.rotated = given->rotated;
    task.heads = given->heads;
    task.cosines = given->cosines;
    task.sines = given->sines;
    task.key_map = {given->key_map, given->map_count};
    task.query_map = {given->query_map, given->map_count};
    task.key_grid = grid_of(given->key_clip, given->cache.key_bits);
    task.value_grid = grid_of(given->value_clip, given->cache.value_bits);
    const auto on = static_cast<cudaStream_t>(stream);
    return with_head_dim(task.cache.head_dim, [&](auto head_dim) {
        constexpr int kD = decltype(head_dim)::value;
        if (!given->key_map) return launch<kD, 1, false>(task, on);
        return task.news.tokens == 1 ? launch<kD, 1, true>(task, on) : launch<kD, kMappedRows, true>(task, on);
    });
}
