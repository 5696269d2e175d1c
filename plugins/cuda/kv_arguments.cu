// Every check of what the kernels of the cache are given, each with its message.

#include "kv_arguments.cuh"

namespace planish {
namespace {

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool has_kernel(int bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; }

int read_cache(const planish_kv_cache& given, KvCache& cache) {
    if (given.head_dim != 64 && given.head_dim != 96 && given.head_dim != 128) {
        return fail(PLANISH_BAD_ARGUMENT, "heads of %d channels have no kernel; those of 64, 96 and 128 have",
                    given.head_dim);
    }
    if (!has_kernel(given.key_bits) || !has_kernel(given.value_bits)) {
        return fail(PLANISH_BAD_ARGUMENT, "a cache of %d-bit keys and %d-bit values has no kernel; 2, 3, 4 and 8 have",
                    given.key_bits, given.value_bits);
    }
    if (given.kv_heads < 1 || given.capacity < 1 || given.capacity % kTokenTile) {
        return fail(PLANISH_BAD_ARGUMENT, "a cache of %d heads with room for %d tokens: a multiple of %d",
                    given.kv_heads, given.capacity, kTokenTile);
    }
    if (given.pages && given.capacity % kPageTokens) {
        return fail(PLANISH_BAD_ARGUMENT, "pages of %u tokens cannot hold %d", kPageTokens, given.capacity);
    }
    if (given.first < 0 || given.first % kTokenTile || given.first > given.capacity) {
        return fail(PLANISH_BAD_ARGUMENT, "%d first tokens of %d in float16: a multiple of %d", given.first,
                    given.capacity, kTokenTile);
    }
    cache = {{given.keys, given.key_scales, given.key_bits},
             {given.values, given.value_scales, given.value_bits},
             given.pages,
             given.pages ? given.capacity / static_cast<int>(kPageTokens) : 0,
             given.pages ? static_cast<int>(kPageTokens) : given.capacity,
             given.capacity,
             given.first_keys,
             given.first_values,
             given.first,
             given.kv_heads,
             given.head_dim};
    return PLANISH_OK;
}

int check_arrays(const planish_kv_cache& given, const planish_kv_tokens& news) {
    if (!given.keys || !given.key_scales || !given.values || !given.value_scales ||
        (given.first && (!given.first_keys || !given.first_values))) {
        return fail(PLANISH_BAD_ARGUMENT, "a cache lacks one of its arrays");
    }
    if (!aligned(given.keys) || !aligned(given.key_scales) || !aligned(given.values) || !aligned(given.value_scales) ||
        !aligned(given.first_keys) || !aligned(given.first_values)) {
        return fail(PLANISH_BAD_ARGUMENT, "the arrays of a cache begin at multiples of 16 bytes");
    }
    if (!news.past) return fail(PLANISH_BAD_ARGUMENT, "it is not given how many tokens the cache has");
    return PLANISH_OK;
}

int read_tokens(const planish_kv_tokens& given, NewTokens& news) {
    if (given.batch < 1 || given.tokens < 1) {
        return fail(PLANISH_BAD_ARGUMENT, "%d new tokens of %d sequences", given.tokens, given.batch);
    }
    news = {given.batch, given.tokens, given.past, given.counts};
    return PLANISH_OK;
}

int check_vectors(const char* name, const void* vectors, int type, int heads, int head_dim, int64_t stride) {
    if (type < PLANISH_FLOAT32 || type > PLANISH_BFLOAT16) {
        return fail(PLANISH_BAD_ARGUMENT, "there is no type %d", type);
    }
    if (!vectors || !aligned(vectors)) {
        return fail(PLANISH_BAD_ARGUMENT, "%s are missing, or do not begin at a multiple of 16 bytes", name);
    }
    if (stride < int64_t{heads} * head_dim || stride % 8) {
        return fail(PLANISH_BAD_ARGUMENT, "%s of %d heads are %lld elements apart: a multiple of 8, and not less", name,
                    heads, static_cast<long long>(stride));
    }
    return PLANISH_OK;
}

Grid grid_of(float clip, int bits) { return {static_cast<float>((1 << bits) - 1) / clip, (1.0f - clip) / 2.0f}; }

int check_append(const planish_append& task) {
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
    if (const int status = check_vectors("queries", task.queries, task.type, task.heads, head_dim, task.query_stride)) {
        return status;
    }
    return check_vectors("rotated queries", task.rotated, task.type, task.heads, head_dim,
                         int64_t{task.heads} * head_dim);
}

}  // namespace

int read_shapes(const planish_attend& given, Attend& task) {
    task = {};
    if (const int status = read_cache(given.cache, task.cache)) return status;
    if (const int status = read_tokens(given.news, task.news)) return status;
    if (given.heads < 1 || given.heads % given.cache.kv_heads) {
        return fail(PLANISH_BAD_ARGUMENT, "%d query heads cannot share %d KV heads", given.heads, given.cache.kv_heads);
    }
    if (!(given.score_scale > 0))
        return fail(PLANISH_BAD_ARGUMENT, "scores times %g", static_cast<double>(given.score_scale));
    task.queries = given.queries;
    task.stride = given.stride;
    task.type = static_cast<FloatType>(given.type);
    task.y = given.y;
    task.heads = given.heads;
    task.score_scale = given.score_scale * 1.4426950408889634f;
    return PLANISH_OK;
}

int read_append(const planish_append& given, Append& task) {
    task = {};
    if (const int status = read_cache(given.cache, task.cache)) return status;
    if (const int status = read_tokens(given.news, task.news)) return status;
    if (const int status = check_arrays(given.cache, given.news)) return status;
    if (const int status = check_append(given)) return status;
    task.queries = given.queries;
    task.keys = given.keys;
    task.values = given.values;
    task.query_stride = given.query_stride;
    task.stride = given.stride;
    task.type = static_cast<FloatType>(given.type);
    task.rotated = given.rotated;
    task.heads = given.heads;
    task.cosines = given.cosines;
    task.sines = given.sines;
    task.key_map = {given.key_map, given.map_count};
    task.query_map = {given.query_map, given.map_count};
    task.key_grid = grid_of(given.key_clip, given.cache.key_bits);
    task.value_grid = grid_of(given.value_clip, given.cache.value_bits);
    return PLANISH_OK;
}

void plan_attend(const Attend& task, int blocks, planish_attend& given) {
    const int heads = task.news.batch * task.cache.kv_heads;
    const int most = ceil_div(task.cache.capacity, kSplitTokens);
    const int wanted = (blocks < kMostBlocks ? blocks : kMostBlocks) / heads;
    const bool few = columns_of(task) <= kColumns;
    given.splits = !few || wanted < 1 ? 1 : wanted < most ? wanted : most;
    given.workspace_bytes = given.splits > 1 ? PLANISH_ATTEND_COUNTER_BYTES + part_bytes(task, given.splits) : 0;
}

int read_attend(const planish_attend& given, Attend& task) {
    if (const int status = read_shapes(given, task)) return status;
    if (const int status = check_arrays(given.cache, given.news)) return status;
    const int head_dim = task.cache.head_dim;
    if (const int status = check_vectors("queries", given.queries, given.type, given.heads, head_dim, given.stride)) {
        return status;
    }
    if (const int status =
            check_vectors("outputs", given.y, given.type, given.heads, head_dim, int64_t{given.heads} * head_dim)) {
        return status;
    }
    const int64_t bytes = PLANISH_ATTEND_COUNTER_BYTES + part_bytes(task, given.splits);
    const int heads = task.news.batch * task.cache.kv_heads;
    if (given.splits < 1 ||
        (given.splits > 1 && (!given.workspace || given.workspace_bytes < bytes || heads > kMostBlocks))) {
        return fail(PLANISH_BAD_ARGUMENT,
                    "%d splits in a workspace of %lld bytes: planish_plan_attend says what it takes", given.splits,
                    static_cast<long long>(given.workspace ? given.workspace_bytes : 0));
    }
    return PLANISH_OK;
}

}  // namespace planish

extern "C" int planish_attend_workspace(const planish_attend* given, int64_t* bytes) {
    using namespace planish;
    Attend task;
    if (const int status = read_shapes(*given, task)) return status;
    // A block stores the columns of its split, and there are kMostBlocks of them at most, or one to a head and no
    // parts.
    const int64_t most = ceil_div(task.cache.capacity, kSplitTokens);
    const int64_t splits = int64_t{task.news.batch} * task.cache.kv_heads * most;
    const int64_t column = (kPartNumbers + task.cache.head_dim) * static_cast<int64_t>(sizeof(float));
    const int64_t blocks = splits < kMostBlocks ? splits : kMostBlocks;
    *bytes = most > 1 && 2 * task.cache.kv_heads <= kMostBlocks
                 ? PLANISH_ATTEND_COUNTER_BYTES + blocks * kColumns * column
                 : 0;
    return PLANISH_OK;
}
