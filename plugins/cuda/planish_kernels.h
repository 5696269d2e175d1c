/* The C interface of the CUDA kernels.
 *
 * Every function enqueues its work on the given stream (a cudaStream_t) and returns at once. Nothing is allocated and
 * nothing is synchronised, so calls can be captured into a CUDA graph. All pointers are device memory, aligned to 16
 * bytes, and the caller's; results depend on the arguments alone, bit by bit.
 *
 * The result is PLANISH_OK or an error; planish_last_error() says in words what was wrong with the last call of this
 * thread that failed. Arguments are checked before anything is enqueued.
 */
#ifndef PLANISH_KERNELS_H
#define PLANISH_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum planish_status {
    PLANISH_OK = 0,
    PLANISH_BAD_ARGUMENT = 1, /* nothing was enqueued */
    PLANISH_CUDA_FAILED = 2   /* the launch failed: no kernel for this GPU, no such stream, an earlier error, ... */
};

enum planish_type { PLANISH_FLOAT32 = 0, PLANISH_FLOAT16 = 1, PLANISH_BFLOAT16 = 2 };

/* Channels, in stored order, that share a scale: the whole token, or its high-impact channels and then the others. */
struct planish_code_segment {
    int32_t channels;
    int32_t padded; /* bytes of them in a stored token: their padded count, by the bits of the weights behind */
    int32_t bits;   /* of a code, 2 .. 8 */
    float clip;     /* share of the largest magnitude that the grid spans, 0 < clip <= 1 */
};

/* Residual addition, RMSNorm, transform and quantisation of tokens; quantize_row.cuh has the formulas. */
struct planish_quantize {
    const void* x;        /* [tokens][channels] of `type` */
    const void* residual; /* added to x, likewise; null is none */
    void* sum;            /* x + residual, likewise; null where it is not wanted */
    const float* gain;    /* [channels], of the RMSNorm; null is no norm */
    float epsilon;
    const float* right;  /* [right_count][k][k]; null is none */
    const float* left;   /* [m][m]; null is none */
    int32_t right_count; /* 1, or m */
    int32_t m;           /* a token is read as m rows of k channels, m * k = channels; m = 1 where there is no factor */
    int32_t k;
    const int32_t* permutation; /* [channels]: stored channel i is channel permutation[i]; null is none */
    struct planish_code_segment segments[2];
    int32_t segment_count; /* 1 or 2 */
    int32_t type;          /* enum planish_type, of x, residual and sum */
    int32_t channels;      /* at most 16384 */
    int64_t tokens;
    uint8_t* codes;     /* [tokens][stride] */
    int64_t stride;     /* bytes from token to token, a multiple of 16 */
    float* scales;      /* [tokens][segment_count] */
    int32_t* zero_sums; /* [tokens][segment_count][2]: zero point, sum of codes with padding */
};

/* The weights of one segment, in kernel layout; see planish.plugins.kernel_layout. */
struct planish_weight_segment {
    const uint32_t* words;
    const float* scales;     /* [rows] */
    const int32_t* row_sums; /* [rows, padded to a multiple of 16] */
    int32_t channels;        /* 0 where the linear has no such segment */
};

/* y [tokens][rows] = codes times weights, with all scales applied. */
struct planish_linear {
    struct planish_weight_segment high; /* 4 bits, a multiple of 64 channels, the first of the token */
    struct planish_weight_segment low;  /* all others */
    int32_t low_bits;                   /* 2, 3 or 4 */
    int32_t type;                       /* enum planish_type, of y */
    int64_t rows;
    int64_t tokens;
    const uint8_t* codes;
    int64_t stride;
    const float* token_scales;      /* [tokens][segments], as planish_quantize wrote them */
    const int32_t* token_zero_sums; /* [tokens][segments][2] */
    void* y;
};

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
    int64_t stride; /* elements from token to token, of all three; a multiple of 8 */
    void* rotated;  /* [batch][tokens][heads][head_dim] of `type`: queries behind RoPE and query map */
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
    void* workspace;         /* zeroed once, before its first use; a call leaves it fit for the next one */
};

/* The most tokens that planish_small_linear takes. */
#define PLANISH_SMALL_TOKENS 16

int planish_quantize_tokens(const struct planish_quantize* task, void* stream);
int planish_small_linear(const struct planish_linear* task, void* stream);
int planish_large_linear(const struct planish_linear* task, void* stream);

int planish_append_kv(const struct planish_append* task, void* stream);
/* Chooses how the tokens are split for the current GPU: from the shapes alone, so a plan holds for all lengths. */
int planish_plan_attend(struct planish_attend* task);
int planish_attend_kv(const struct planish_attend* task, void* stream);

/* Never null; "" before the first failure of this thread. Valid until the thread's next failure. */
const char* planish_last_error(void);

#ifdef __cplusplus
}
#endif

#endif
