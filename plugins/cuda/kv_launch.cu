// The checks of what all kernels of the cache are given.

#include "kv_launch.cuh"

namespace planish {
namespace {

bool has_kernel(int bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; }

}  // namespace

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
        return fail(PLANISH_BAD_ARGUMENT, "pages of %d tokens cannot hold %d", kPageTokens, given.capacity);
    }
    if (given.first < 0 || given.first % kTokenTile || given.first > given.capacity) {
        return fail(PLANISH_BAD_ARGUMENT, "%d first tokens of %d in float16: a multiple of %d", given.first,
                    given.capacity, kTokenTile);
    }
    if (!given.keys || !given.key_scales || !given.values || !given.value_scales ||
        (given.first && (!given.first_keys || !given.first_values))) {
        return fail(PLANISH_BAD_ARGUMENT, "a cache lacks one of its arrays");
    }
    if (!aligned(given.keys) || !aligned(given.key_scales) || !aligned(given.values) || !aligned(given.value_scales) ||
        !aligned(given.first_keys) || !aligned(given.first_values)) {
        return fail(PLANISH_BAD_ARGUMENT, "the arrays of a cache begin at multiples of 16 bytes");
    }
    cache = {{given.keys, given.key_scales, given.key_bits},
             {given.values, given.value_scales, given.value_bits},
             given.pages,
             given.pages ? given.capacity / kPageTokens : 0,
             given.pages ? kPageTokens : given.capacity,
             given.capacity,
             given.first_keys,
             given.first_values,
             given.first,
             given.kv_heads,
             given.head_dim};
    return PLANISH_OK;
}

int read_tokens(const planish_kv_tokens& given, NewTokens& news) {
    if (given.batch < 1 || given.tokens < 1) {
        return fail(PLANISH_BAD_ARGUMENT, "%d new tokens of %d sequences", given.tokens, given.batch);
    }
    if (!given.past) return fail(PLANISH_BAD_ARGUMENT, "it is not given how many tokens the cache has");
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

}  // namespace planish
