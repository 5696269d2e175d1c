/* The C interface of the kernels of the packed KV cache; the rules of planish_kernels.h hold. */
#ifndef PLANISH_KV_KERNELS_H
#define PLANISH_KV_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Keys, or values: codes [batch][kv_heads][capacity][head_dim * bits / 8], rows in the layout of plugins/packing.py;
 * grids float16 [batch][kv_heads][capacity][2], scale then zero. */
struct planish_kv_rows {
    uint8_t* codes;
    void* grids;
    int32_t bits; /* 2, 3, 4 or 8 */
    float clip;   /* share of a row's range that its grid spans; read by append alone */
};

struct planish_kv_cache {
    struct planish_kv_rows keys;
    struct planish_kv_rows values;
    int32_t batch;
    int32_t kv_heads;
    int32_t head_dim; /* 64, 96 or 128 */
    int32_t capacity; /* tokens that a sequence has room for, a multiple of 16 */
};

/* New tokens: those of sequence b are new_lengths[b] of `tokens`, behind past_lengths[b] that the cache has. */
struct planish_kv_tokens {
    const int32_t* past_lengths; /* [batch] */
    const int32_t* new_lengths;  /* [batch] */
    int32_t tokens;
    int32_t type; /* enum planish_type, of keys, values, queries and y */
};

struct planish_append_kv {
    struct planish_kv_cache cache;
    struct planish_kv_tokens news;
    const void* keys;   /* [batch][tokens][kv_heads][head_dim] */
    const void* values; /* likewise */
};

/* Query i of sequence b attends to the tokens up to past_lengths[b] + i, which the cache has already. */
struct planish_attend_kv {
    struct planish_kv_cache cache;
    struct planish_kv_tokens news;
    const void* queries; /* [batch][tokens][heads][head_dim] */
    void* y;             /* likewise */
    int32_t heads;
    void* workspace; /* planish_attend_kv_workspace bytes */
};

int planish_append_kv_tokens(const struct planish_append_kv* task, void* stream);
int planish_attend_kv_tokens(const struct planish_attend_kv* task, void* stream);

/* Bytes, for a task of these sizes; pointers are not read. */
int64_t planish_attend_kv_workspace(const struct planish_attend_kv* task);

#ifdef __cplusplus
}
#endif

#endif
