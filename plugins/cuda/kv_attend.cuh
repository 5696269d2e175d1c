// Attention over the packed cache: the arguments, and the queries as operands of an MMA.
//
// A *column* is one query: a new token and a query head of the KV head at hand, heads of a token side by side. Columns
// go through the MMA eight at a time, its n; keys and values are its left operand, so that their codes fill it at any
// number of columns. Query i of a sequence attends to the tokens up to its own place, past + i.
//
// Scale and zero of a token are outside of all inner products:
//
//     score = sm (q . (s c + z)) = sm (s (q . c) + z sum q)
//     y     = sum_t p_t (s_t c_t + z_t) / sum_t p_t
//           = (sum_t w_t c_t + sum_t w_t z_t / s_t) / sum_t w_t / s_t,      w_t = p_t s_t
//
// w_t is computed as one power of two, 2^(score log2 e + log2 s_t - most), with the largest exponent so far as `most`
// (the running softmax of FlashAttention, arXiv 2205.14135): it is at most 1 whatever the scales are, and is stored in
// float16 as 2^15 w. All three sums take the rounded w, so that rounding moves weights a little and leaves them
// weights.
//
// Queries are stored in float16 times a power of two that puts the largest of a column at 2^13, with the powers of two
// of kv_rows.cuh in them: exact for queries in float16 whose magnitudes span no more than 2^20.
#pragma once

#include "kv_cache.cuh"
#include "kv_io.cuh"
#include "kv_rows.cuh"
#include "kv_warp.cuh"

namespace planish {

constexpr int kColumns = kTileTokens;  // of an MMA
constexpr int kQueryExponent = 13;
constexpr float kWeightExponent = 15;
// Below every score: the largest exponent before the first token.
constexpr float kNoScore = -1e30f;

struct Attend {
    KvCache cache;
    NewTokens news;       // of which the queries are; the cache has them already
    const void* queries;  // [batch][tokens][heads][head_dim]
    int64_t stride;       // elements from token to token
    FloatType type;       // of queries and y
    void* y;              // [batch][tokens][heads][head_dim]
    int heads;
    float score_scale;  // sm log2 e, with sm = 1 / sqrt(head_dim) as a rule
};

PLANISH_HD int group_of(const Attend& task) { return task.heads / task.cache.kv_heads; }

// Columns of a sequence and KV head.
PLANISH_HD int columns_of(const Attend& task) { return task.news.tokens * group_of(task); }

// Where column `column` of a KV head has its query and its y: elements from the first one of the sequence.
PLANISH_HD int64_t query_offset(const Attend& task, int kv_head, int column, int64_t stride) {
    const int group = group_of(task);
    return column / group * stride + int64_t{kv_head * group + column % group} * task.cache.head_dim;
}

// What a lane knows of its two columns, 2 (lane % 4) and the next.
struct ColumnNumbers {
    float factor[2];  // makes an accumulator of codes a score: score_scale 2^-(exponents of query and codes)
    float zero[2];    // score_scale sum q
    int last[2];      // the last token that the column attends to; -1 is none
};

// Operand B: column lane / 4, code e of runs 2 (lane % 4) and 2 (lane % 4) + 1.
template <class Warp, int D>
struct Queries {
    typename Warp::template PerLane<CodePairs<D>> pairs;
    typename Warp::template PerLane<ColumnNumbers> numbers;
};

// Calls function(Constant<bits>{}) and function(Constant<head_dim>{}); both have been checked.
template <class Function>
PLANISH_HD void with_bits(int bits, Function function) {
    if (bits == 2) return function(Constant<2>{});
    if (bits == 3) return function(Constant<3>{});
    if (bits == 4) return function(Constant<4>{});
    function(Constant<8>{});
}

template <class Function>
auto with_head_dim(int head_dim, Function function) {
    if (head_dim == 64) return function(Constant<64>{});
    if (head_dim == 96) return function(Constant<96>{});
    return function(Constant<128>{});
}

// A lane's share of a query: code e of its two runs at 2 e and 2 e + 1.
template <int D>
struct LaneQueries {
    float value[D / 4];
};

// Loads the share that `channel_of(i)` says of the vector that begins at element `at`. All elements are asked for
// before one is waited for.
template <int D, class ChannelOf>
PLANISH_HD LaneQueries<D> load_query(const void* queries, FloatType type, int64_t at, ChannelOf channel_of) {
    LaneQueries<D> query;
    if (type == FloatType::kFloat32) {
        PLANISH_UNROLL
        for (int i = 0; i < D / 4; ++i) query.value[i] = static_cast<const float*>(queries)[at + channel_of(i)];
        return query;
    }
    Half half[D / 4];
    PLANISH_UNROLL
    for (int i = 0; i < D / 4; ++i) half[i] = static_cast<const Half*>(queries)[at + channel_of(i)];
    PLANISH_UNROLL
    for (int i = 0; i < D / 4; ++i) {
        query.value[i] = type == FloatType::kFloat16 ? float_of_half(half[i]) : float_of_bits(uint32_t{half[i]} << 16);
    }
    return query;
}

// Queries of the columns first_column .. first_column + 7; those that do not exist are zeros and attend to nothing.
template <class Warp, int D>
PLANISH_HD void load_queries(const Attend& task, int sequence, int kv_head, int first_column,
                             Queries<Warp, D>& queries) {
    const Lengths lengths = lengths_of(task.cache, task.news, sequence);
    const int group = group_of(task), past = lengths.past, existing = lengths.count * group;
    const int64_t first = int64_t{sequence} * task.news.tokens * task.stride;
    typename Warp::template PerLane<float> most, sum;
    with_bits(task.cache.keys.bits, [&](auto bits) {
        using R = Row<decltype(bits)::value, D>;
        typename Warp::template PerLane<LaneQueries<D>> values;
        Warp::each([&](int lane) {
            const int column = first_column + lane / 4;
            const bool exists = column < existing;
            // Where there is no such column, one that can be read.
            const int64_t at = first + query_offset(task, kv_head, exists ? column : 0, task.stride);
            values[lane] = load_query<D>(task.queries, task.type, at,
                                         [&](int i) { return R::channel(2 * (lane % 4) + i % 2, i / 2); });
            most[lane] = sum[lane] = 0;
            PLANISH_UNROLL
            for (int i = 0; i < D / 4; ++i) {
                if (!exists) values[lane].value[i] = 0;
                most[lane] = fmaxf(most[lane], fabsf(values[lane].value[i]));
                sum[lane] += values[lane].value[i];
            }
        });
        // The four lanes of a column.
        Warp::reduce(most, 2, 1, [](float a, float b) { return fmaxf(a, b); });
        Warp::reduce(sum, 2, 1, [](float a, float b) { return a + b; });
        Warp::each([&](int lane) {
            const int exponent = (static_cast<int>(bits_of(most[lane]) >> 23) & 255) - 127;
            const int kept = exponent < -100 ? -100 : exponent;
            const float factor = power_of_two(kQueryExponent - kept);
            most[lane] = power_of_two(kept - kQueryExponent - kCodeExponent);
            PLANISH_UNROLL
            for (int e = 0; e < R::kRunCodes; ++e) {
                const float scale = factor * power_of_two(-R::shift(e));
                queries.pairs[lane].pair[e] = half_pair(half_of_float(values[lane].value[2 * e] * scale),
                                                        half_of_float(values[lane].value[2 * e + 1] * scale));
            }
        });
    });
    const auto of_column = [&](const typename Warp::template PerLane<float>& values, int i) {
        typename Warp::template PerLane<uint32_t> bits;
        Warp::each([&](int lane) { bits[lane] = bits_of(values[lane]); });
        return Warp::shuffle(bits, [i](int lane) { return 4 * (2 * (lane % 4) + i); });
    };
    PLANISH_UNROLL
    for (int i = 0; i < 2; ++i) {
        const auto factor = of_column(most, i), total = of_column(sum, i);
        Warp::each([&](int lane) {
            const int column = first_column + 2 * (lane % 4) + i;
            queries.numbers[lane].factor[i] = task.score_scale * float_of_bits(factor[lane]);
            queries.numbers[lane].zero[i] = task.score_scale * float_of_bits(total[lane]);
            queries.numbers[lane].last[i] = column < existing ? past + column / group : -1;
        });
    }
}

}  // namespace planish
