/* The C interface of the packed cache's kernels; what planish_kernels.h says of all functions holds for these.
 *
 * Lengths are read on the GPU, so a captured call serves every length. What is given there is not checked: pages are
 * blocks that there are. Lengths are taken as far as the cache has room: tokens beyond its capacity are neither stored
 * nor attended to.
 */
#ifndef PLANISH_KV_H
#define PLANISH_KV_H

#include "planish_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The packed cache, uint8 [blocks][kv_heads][block tokens][head_dim * bits / 8] in the layout of
 * planish.plugins.packing, with float16 [blocks][kv_heads][block tokens][2], scale then zero, beside it. A block is a
 * sequence with room for `capacity` tokens, or a page of 64 tokens. */
struct planish_kv_cache {
    uint8_t* keys;
    uint16_t* key_scales;
    uint8_t* values;
    uint16_t* value_scales;
    const int32_t* pages; /* [batch][capacity / 64], the block of each page; null where sequences are blocks */
    uint16_t* first_keys; /* float16 [batch][kv_heads][first][head_dim]: read in place of the first packed tokens */
    uint16_t* first_values;
    int32_t first;    /* tokens, a multiple of 16; 0 is none */
    int32_t capacity; /* a multiple of 16, with pages of 64; tokens beyond it are not stored */
    int32_t kv_heads;
    int32_t head_dim; /* 64, 96 or 128 */
    int32_t key_bits; /* 2, 3, 4 or 8 */
    int32_t value_bits;
};

/* New tokens at the end of each sequence. */
struct planish_kv_tokens {
    int32_t batch;
    int32_t tokens;        /* of a sequence, at most */
    const int32_t* past;   /* [batch], tokens that come before them; a token's position is its place in the cache */
    const int32_t* counts; /* [batch], at most `tokens`; null where every sequence has so many */
};

/* RoPE, key map and quantisation of new keys and values, into the cache; kv_append.cuh has the formulas. */
struct planish_append {
    struct planish_kv_cache cache;
    struct planish_kv_tokens news;
    const void* queries; /* [batch][tokens][heads][head_dim] of `type`; null where heads is 0 */
    const void* keys;    /* [batch][tokens][kv_heads][head_dim], likewise */
    const void* values;
    int64_t query_stride; /* elements from token to token of queries, a multiple of 8 */
    int64_t stride;       /* likewise, of keys and of values */
    void* rotated;        /* [batch][tokens][heads][head_dim] of `type`: queries behind RoPE and query map */
    int32_t heads;
    int32_t type;         /* enum planish_type */
    const float* cosines; /* [positions][head_dim / 2]; null is no RoPE */
    const float* sines;
    const float* key_map;   /* [map_count][head_dim][head_dim], k' = k K; null is none */
    const float* query_map; /* likewise, K^-T: query heads have that of their KV head */
    int32_t map_count;      /* 1, or kv_heads */
    float key_clip;         /* share of the range that the grid spans, 0 < clip <= 1 */
    float value_clip;
};

/* Attention over the packed cache, the new tokens included; kv_attend.cuh has the formulas. A query attends to the
 * tokens up to its own place. Queries behind a sequence's count give zeros. */
struct planish_attend {
    struct planish_kv_cache cache;
    struct planish_kv_tokens news;
    const void* queries; /* [batch][tokens][heads][head_dim] of `type` */
    int64_t stride;      /* elements from token to token, a multiple of 8 */
    void* y;             /* [batch][tokens][heads][head_dim] of `type` */
    int32_t heads;
    int32_t type;            /* enum planish_type */
    float score_scale;       /* 1 / sqrt(head_dim) as a rule */
    int32_t splits;          /* set by planish_plan_attend */
    int64_t workspace_bytes; /* set by planish_plan_attend; 0 is none */
    void* workspace;         /* its first PLANISH_ATTEND_COUNTER_BYTES are zero before its first use; a call leaves it
                                fit for the next one on its stream, whatever that one's shapes */
};

enum { PLANISH_ATTEND_COUNTER_BYTES = 4096 };

int planish_append_kv(const struct planish_append* task, void* stream);
/* Sets splits and workspace_bytes for the current GPU: from the shapes alone, so a plan holds for all lengths. */
int planish_plan_attend(struct planish_attend* task);
/* Sets `bytes` to what calls over such a cache take at most, of up to news.batch sequences, on any GPU; it asks none.
 */
int planish_attend_workspace(const struct planish_attend* task, int64_t* bytes);
int planish_attend_kv(const struct planish_attend* task, void* stream);

#ifdef __cplusplus
}
#endif

#endif
