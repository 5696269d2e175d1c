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

/* How codes of tokens lie in memory: as the kernel that multiplies them loads them. */
enum planish_order {
    PLANISH_LANES = 0,   /* a byte each: every linear, every GPU */
    PLANISH_COLUMNS = 1, /* a byte each: the large linear on compute capability 9.0 */
    PLANISH_NIBBLES = 2  /* half a byte each, up to 4 bits: the large linear on compute capability 8.x */
};

/* Channels, in stored order, that share a scale: the whole token, or its high-impact channels and then the others. */
struct planish_code_segment {
    int32_t channels;
    int32_t padded; /* their count in a stored token, by the bits of the weights behind */
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
    int32_t order;         /* enum planish_order, of codes */
    int32_t channels;      /* at most 16384 */
    int64_t tokens;
    uint8_t* codes;     /* [tokens][stride] */
    int64_t stride;     /* bytes from token to token, a multiple of 16 */
    float* scales;      /* [tokens][segment_count] */
    int32_t* zero_sums; /* [tokens][segment_count][2]: zero point, sum of codes with padding */
    float* workspace;   /* [tokens][channels] for up to PLANISH_SPREAD_TOKENS tokens: where right_count is m, a token's
                           map is spread over the GPU in a launch of its own; null is one launch. `sum` is then neither
                           x nor residual */
};

/* The weights of one segment, in kernel layout; see planish.plugins.kernel_layout. */
struct planish_weight_segment {
    const uint32_t* words;
    const float* scales;     /* [rows] */
    const int32_t* row_sums; /* [rows, padded to a multiple of 16] */
    int32_t channels;        /* 0 where the linear has no such segment */
};

/* y [tokens][rows] = codes times weights, with all scales applied.
 *
 * Gated, y [tokens][rows / 2] is silu(gate) * up: of every 16 rows the first eight are of gate, the others of up, and
 * rows is a multiple of 16.
 */
struct planish_linear {
    struct planish_weight_segment high; /* 4 bits, a multiple of 64 channels, the first of the token */
    struct planish_weight_segment low;  /* all others */
    int32_t low_bits;                   /* 2, 3 or 4 */
    int32_t type;                       /* enum planish_type, of y */
    int32_t order;                      /* enum planish_order, of codes */
    int32_t gated;                      /* 0 or 1 */
    int64_t rows;
    int64_t tokens;
    const uint8_t* codes;
    int64_t stride;
    const float* token_scales;      /* [tokens][segments], as planish_quantize wrote them */
    const int32_t* token_zero_sums; /* [tokens][segments][2] */
    void* y;
};

/* y [tokens][rows] = float16 activations times weights with one scale to a row; gated as above. */
struct planish_weight_only {
    const uint32_t* words;
    const float* scales; /* [rows] */
    int32_t bits;        /* 2, 3 or 4 */
    int32_t type;        /* enum planish_type, of y */
    int32_t gated;       /* 0 or 1 */
    int32_t channels;    /* a multiple of 8 */
    int64_t rows;
    int64_t tokens;
    const void* x;  /* float16 [tokens][stride] */
    int64_t stride; /* elements from token to token, a multiple of 8, channels at least */
    void* y;
};

/* The most tokens whose block-diagonal map is spread. */
#define PLANISH_SPREAD_TOKENS 32

/* The most tokens that planish_small_linear takes; it takes them in the order PLANISH_LANES. */
#define PLANISH_SMALL_TOKENS 16

/* Writes the order in which products of `tokens` tokens, whose codes have up to `bits` bits, are fastest on the
 * calling thread's GPU. */
int planish_best_order(int64_t tokens, int32_t bits, int32_t* order);

int planish_quantize_tokens(const struct planish_quantize* task, void* stream);
int planish_small_linear(const struct planish_linear* task, void* stream);
int planish_large_linear(const struct planish_linear* task, void* stream);
int planish_weight_only_linear(const struct planish_weight_only* task, void* stream);

/* Never null; "" before the first failure of this thread. Valid until the thread's next failure. */
const char* planish_last_error(void);

#ifdef __cplusplus
}
#endif

#endif
