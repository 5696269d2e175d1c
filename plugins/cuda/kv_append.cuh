// New keys and values into the packed cache, and the queries beside them: RoPE, key map, codes. One warp, some rows.
//
//     k' = (k cos + rotate_half(k) sin) K         queries likewise, with K^-T; values as they are
//     span = max k' - min k'
//     scale = float16(max(span / levels, 2^-14)),   zero = float16(min k' + span * margin)
//     code = clamp(round((k' - zero) / scale), 0, 2^bits - 1)
//
// with levels = (2^bits - 1) / clip and margin = (1 - clip) / 2. The last three lines are those of PlanishAppendKv,
// operation by operation, so that codes, scales and zeros are equal to its. Behind a key map they are equal up to the
// order in which its products are added.
//
// A lane owns four neighbouring channels. Their codes are one word, and the packed row is made of these words by
// shuffles: no shared memory. Bytes: 2 per value in float16 in, bits / 8 out. A map is D multiply-adds per value in
// float32 on the CUDA cores; a warp takes kMappedRows tokens of a head, so that an element of the map is loaded once
// for all of them, and their rows pass through shared memory.
#pragma once

#include "kv_cache.cuh"
#include "kv_io.cuh"
#include "kv_warp.cuh"

namespace planish {

constexpr int kMappedRows = 8;

// How keys, or values, become codes.
struct Grid {
    float levels;  // (2^bits - 1) / clip, a float32 quotient
    float margin;  // (1 - clip) / 2, likewise
};

// A matrix [head_dim][head_dim] for each KV head, or one for all.
struct HeadMap {
    const float* matrix;  // null is none
    int count;            // 1, or kv_heads
};

struct Append {
    KvCache cache;
    NewTokens news;
    const void* queries;   // [batch][tokens][heads][head_dim]; null is none
    const void* keys;      // [batch][tokens][kv_heads][head_dim]
    const void* values;    // likewise
    int64_t query_stride;  // elements from token to token of queries
    int64_t stride;        // likewise, of keys and of values
    FloatType type;
    void* rotated;         // queries on their way out, [batch][tokens][heads][head_dim], likewise `type`
    int heads;             // of queries; 0 where there are none
    const float* cosines;  // [positions][head_dim / 2]; null is no RoPE
    const float* sines;
    HeadMap key_map;
    HeadMap query_map;
    Grid key_grid;
    Grid value_grid;
};

// The rows of a warp: ROWS tokens of one head, of queries, keys or values in this order.
struct AppendWork {
    int sequence;
    int head;
    int first_token;
};

template <int ROWS>
PLANISH_HD int64_t append_warps(const Append& task) {
    const int64_t groups = ceil_div(task.news.tokens, ROWS);
    return groups * task.news.batch * (task.heads + 2 * task.cache.kv_heads);
}

// Neighbouring warps take neighbouring heads, which lie side by side.
template <int ROWS>
PLANISH_HD AppendWork append_work(const Append& task, int64_t warp) {
    const int heads = task.heads + 2 * task.cache.kv_heads, groups = ceil_div(task.news.tokens, ROWS);
    const auto group = static_cast<int>(warp / heads);
    return {group / groups, static_cast<int>(warp % heads), group % groups * ROWS};
}

template <int ROWS>
struct RowQuads {
    FloatQuad quad[ROWS];
};

// Four channels of a row behind RoPE (rotate_half: channel c turns with channel c +- D / 2).
template <int D>
PLANISH_HD FloatQuad load_rotated(const Append& task, const void* rows, int64_t row, int position, int channel) {
    FloatQuad x = load_quad(rows, task.type, row + channel);
    if (!task.cosines) return x;
    const bool lower = channel < D / 2;
    const FloatQuad other = load_quad(rows, task.type, row + (lower ? channel + D / 2 : channel - D / 2));
    const int64_t angle = int64_t{position} * (D / 2) + channel % (D / 2);
    const FloatQuad cosine = load_quad(task.cosines, FloatType::kFloat32, angle);
    const FloatQuad sine = load_quad(task.sines, FloatType::kFloat32, angle);
    PLANISH_UNROLL
    for (int i = 0; i < kQuad; ++i) {
        const float turned = product_of(other.value[i], sine.value[i]);
        x.value[i] = sum_of(product_of(x.value[i], cosine.value[i]), lower ? -turned : turned);
    }
    return x;
}

// The first channel of a lane. Lanes behind the last one have the channels of the first lanes again: what they compute
// changes no minimum and no maximum, and is not stored.
template <int D>
PLANISH_HD int lane_channel(int lane) {
    return lane % (D / kQuad) * kQuad;
}

// Replaces the rows by their products with a matrix. `shared` holds ROWS rows.
template <int D, int ROWS, class Warp>
PLANISH_HD void map_rows(const float* matrix, typename Warp::template PerLane<RowQuads<ROWS>>& rows, float* shared) {
    Warp::each([&](int lane) {
        PLANISH_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            if (lane < D / kQuad) store_quad(shared, FloatType::kFloat32, r * D + kQuad * lane, rows[lane].quad[r]);
            rows[lane].quad[r] = {};
        }
    });
    Warp::wait();
    Warp::each([&](int lane) {
        for (int l = 0; l < D; ++l) {
            const FloatQuad factor = load_quad(matrix, FloatType::kFloat32, l * D + lane_channel<D>(lane));
            PLANISH_UNROLL
            for (int r = 0; r < ROWS; ++r) {
                PLANISH_UNROLL
                for (int i = 0; i < kQuad; ++i) rows[lane].quad[r].value[i] += shared[r * D + l] * factor.value[i];
            }
        }
    });
}

// The words of a packed row, of which lane i gets word i. `codes` are four codes of each lane, one to a byte.
template <int D, class Warp>
PLANISH_HD typename Warp::template PerLane<uint32_t> pack_row(const typename Warp::template PerLane<uint32_t>& codes,
                                                              int bits) {
    using Words = typename Warp::template PerLane<uint32_t>;
    constexpr int kChunk = D / 32;  // lanes of an eighth of the row
    Words words = codes;
    const auto add = [&](int lanes, int left) {
        const Words others = Warp::shuffle(codes, [&](int lane) { return (lane + lanes) % kLanes; });
        Warp::each([&](int lane) { words[lane] |= others[lane] << left; });
    };
    if (bits == 4) {
        add(4 * kChunk, 4);
    } else if (bits == 2) {
        PLANISH_UNROLL
        for (int i = 1; i < 4; ++i) add(2 * kChunk * i, 2 * i);
    } else if (bits == 3) {
        add(3 * kChunk, 4);
        const Words low = Warp::shuffle(codes, [](int lane) { return 6 * kChunk + lane % kChunk; });
        const Words high = Warp::shuffle(codes, [](int lane) { return 7 * kChunk + lane % kChunk; });
        Warp::each([&](int lane) {
            const int plane = lane / kChunk;
            words[lane] |= (low[lane] >> plane & 0x01010101u) << 3 | (high[lane] >> plane & 0x01010101u) << 7;
        });
    }
    return words;
}

// Codes, scale and zero of one row, stored at row `row` of the packed rows.
template <int D, class Warp>
PLANISH_HD void store_codes(const PackedRows& packed, const Grid& grid,
                            const typename Warp::template PerLane<FloatQuad>& x, int64_t row) {
    typename Warp::template PerLane<float> most, least;
    Warp::each([&](int lane) {
        most[lane] = least[lane] = x[lane].value[0];
        PLANISH_UNROLL
        for (int i = 1; i < kQuad; ++i) {
            most[lane] = fmaxf(most[lane], x[lane].value[i]);
            least[lane] = fminf(least[lane], x[lane].value[i]);
        }
    });
    Warp::reduce(most, 16, 1, [](float a, float b) { return fmaxf(a, b); });
    Warp::reduce(least, 16, 1, [](float a, float b) { return fminf(a, b); });
    typename Warp::template PerLane<uint32_t> codes, grids;
    const auto highest = static_cast<float>((1 << packed.bits) - 1);
    Warp::each([&](int lane) {
        const float span = sum_of(most[lane], -least[lane]);
        const float step = fmaxf(quotient_of(span, grid.levels), 0x1p-14f);
        const Half scale = half_of_float(step);
        const Half zero = half_of_float(sum_of(least[lane], product_of(span, grid.margin)));
        grids[lane] = half_pair(scale, zero);
        codes[lane] = 0;
        PLANISH_UNROLL
        for (int i = 0; i < kQuad; ++i) {
            const float offset = sum_of(x[lane].value[i], -float_of_half(zero));
            const float rounded = rintf(quotient_of(offset, float_of_half(scale)));
            codes[lane] |= static_cast<uint32_t>(fminf(fmaxf(rounded, 0.0f), highest)) << 8 * i;
        }
    });
    const auto words = pack_row<D, Warp>(codes, packed.bits);
    const int row_words = D * packed.bits / 32;
    Warp::each([&](int lane) {
        if (lane < row_words) reinterpret_cast<uint32_t*>(packed.codes)[row * row_words + lane] = words[lane];
        if (lane == 0) reinterpret_cast<uint32_t*>(packed.scales)[row] = grids[lane];
    });
}

// A warp's rows. Tokens that a sequence does not have, or has no room for, are left out.
template <int D, int ROWS, class Warp>
PLANISH_HD void append_rows(const Append& task, const AppendWork& work, float* shared) {
    const KvCache& cache = task.cache;
    const int key_head = work.head - task.heads, value_head = key_head - cache.kv_heads;
    const bool is_query = key_head < 0, is_value = value_head >= 0;
    const int head = is_query ? work.head : is_value ? value_head : key_head;
    const int kv_head = is_query ? head / (task.heads / cache.kv_heads) : head;
    const int64_t stride = is_query ? task.query_stride : task.stride;
    const void* source = is_query ? task.queries : is_value ? task.values : task.keys;
    const Lengths lengths = lengths_of(cache, task.news, work.sequence);
    const int past = lengths.past;
    const auto exists = [&](int r) { return work.first_token + r < lengths.count; };
    const auto token_at = [&](int r) { return int64_t{work.sequence} * task.news.tokens + work.first_token + r; };
    if (!exists(0)) return;

    typename Warp::template PerLane<RowQuads<ROWS>> rows;
    Warp::each([&](int lane) {
        const int channel = lane_channel<D>(lane);
        PLANISH_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            const int64_t row = token_at(exists(r) ? r : 0) * stride + head * D;
            const int position = past + work.first_token + (exists(r) ? r : 0);
            rows[lane].quad[r] = is_value ? load_quad(source, task.type, row + channel)
                                          : load_rotated<D>(task, source, row, position, channel);
        }
    });
    const HeadMap& map = is_query ? task.query_map : task.key_map;
    if (!is_value && map.matrix) {
        map_rows<D, ROWS, Warp>(map.matrix + (map.count == 1 ? 0 : int64_t{kv_head} * D * D), rows, shared);
    }
    PLANISH_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        if (!exists(r)) continue;
        typename Warp::template PerLane<FloatQuad> x;
        Warp::each([&](int lane) { x[lane] = rows[lane].quad[r]; });
        if (is_query) {
            Warp::each([&](int lane) {
                if (lane < D / kQuad) {
                    store_quad(task.rotated, task.type, (token_at(r) * task.heads + head) * D + kQuad * lane, x[lane]);
                }
            });
            continue;
        }
        const int token = past + work.first_token + r;
        const PackedRows& packed = is_value ? cache.values : cache.keys;
        store_codes<D, Warp>(packed, is_value ? task.value_grid : task.key_grid, x,
                             row_of(cache, work.sequence, head, token));
        if (token < cache.first) {
            Half* first = is_value ? cache.first_values : cache.first_keys;
            const int64_t at = first_row_of(cache, work.sequence, head, token) * D;
            Warp::each([&](int lane) {
                if (lane < D / kQuad) store_quad(first, FloatType::kFloat16, at + kQuad * lane, x[lane]);
            });
        }
    }
}

}  // namespace planish
