// The tokens of a warp one tile after the other, and what the warps of a block and the blocks of a sequence give
// together.
//
// Tiles go from memory into shared memory by asynchronous copies, kStages deep. Every warp has stages of its own and
// waits for no other one. Copies are 16 bytes a lane, of whole tiles, which are contiguous.
//
// Few columns (decode): the tokens of a sequence are shared out to `splits` blocks and their warps, and what these give
// is merged in the order of the tokens, whichever block is done last: results do not depend on the course of events.
// Many columns (prefill): a warp has columns of its own, and all tokens that they attend to.
#pragma once

#include "kv_tile.cuh"
#include "segments.cuh"

namespace planish {

constexpr int kAttendWarps = 4;
constexpr int kStages = 4;
constexpr int kCopyBytes = 16;
// Column tiles of a warp where there are many columns.
constexpr int kManyTiles = 2;

// Where the parts of a tile are in a stage, in bytes. Scales come last: lanes may read a word behind the rows.
struct StageLayout {
    int values;
    int key_grids;
    int value_grids;
    int bytes;
};

template <int D>
PLANISH_HD StageLayout stage_layout(const KvCache& cache) {
    StageLayout layout = {};
    layout.values = kTokenTile * row_bytes(cache, cache.keys);
    with_bits(cache.values.bits, [&](auto bits) {
        layout.key_grids = layout.values + kTokenTile * 4 * kValueStride<Row<decltype(bits)::value, D>>;
    });
    layout.value_grids = layout.key_grids + kTokenTile * 4;
    layout.bytes = layout.value_grids + kTokenTile * 4;
    return layout;
}

// A column that is done, or a part of it: most, sum of w / s, and sums of w (c + z / s) for each channel.
constexpr int kPartNumbers = 2;

template <int D>
constexpr int kPartFloats = kPartNumbers + D;

// Bytes of shared memory of a warp: stages, which the results of its columns take over in the end.
template <int D>
PLANISH_HD int warp_bytes(const KvCache& cache, int tiles) {
    const int stages = kStages * stage_layout<D>(cache).bytes;
    const int parts = tiles * kColumns * kPartFloats<D> * static_cast<int>(sizeof(float));
    return stages > parts ? stages : ceil_div(parts, kCopyBytes) * kCopyBytes;
}

// Calls move(chunk) for a lane's chunks of CHUNKS, which neighbouring lanes take side by side.
template <int CHUNKS, class Move>
PLANISH_HD void each_chunk(int lane, Move move) {
    PLANISH_UNROLL
    for (int i = 0; i < CHUNKS; i += kLanes) {
        if (i + kLanes <= CHUNKS || i + lane < CHUNKS) move(i + lane);
    }
}

// Copies a tile, the 16 rows from `row` on. `copy.bytes16(to, from)` moves 16 bytes.
template <int D, class Warp, class Copy>
PLANISH_HD void fill_stage(const KvCache& cache, const StageLayout& layout, int64_t row, uint8_t* stage, Copy& copy) {
    Warp::each([&](int lane) {
        with_bits(cache.keys.bits, [&](auto bits) {
            using R = Row<decltype(bits)::value, D>;
            const uint8_t* from = cache.keys.codes + row * (R::kWords * 4);
            each_chunk<kTokenTile * R::kWords * 4 / kCopyBytes>(
                lane, [&](int c) { copy.bytes16(stage + c * kCopyBytes, from + c * kCopyBytes); });
        });
        with_bits(cache.values.bits, [&](auto bits) {
            using R = Row<decltype(bits)::value, D>;
            constexpr int kChunks = kTokenTile * R::kWords * 4 / kCopyBytes;
            // Chunks of a row, or of all rows where they are not padded.
            constexpr unsigned kRun = kValueStride<R> == R::kWords ? kChunks : R::kWords / 4;
            const uint8_t* from = cache.values.codes + row * (R::kWords * 4);
            each_chunk<kChunks>(lane, [&](unsigned c) {
                const unsigned to = c / kRun * 4 * kValueStride<R> + c % kRun * kCopyBytes;
                copy.bytes16(stage + layout.values + to, from + c * kCopyBytes);
            });
        });
        constexpr int kGridChunks = kTokenTile * 4 / kCopyBytes;
        if (lane < 2 * kGridChunks) {
            const bool is_value = lane >= kGridChunks;
            const int at = lane % kGridChunks * kCopyBytes;
            const Half* scales = is_value ? cache.values.scales : cache.keys.scales;
            copy.bytes16(stage + (is_value ? layout.value_grids : layout.key_grids) + at,
                         reinterpret_cast<const uint8_t*>(scales + 2 * row) + at);
        }
    });
}

// Adds the tiles begin, begin + step, ... below `end` to the sums of a warp's columns.
template <class Warp, int D, int TILES, class Copy>
PLANISH_HD void attend_tiles(const Attend& task, int sequence, int kv_head, int begin, int end, int step,
                             const Queries<Warp, D> (&queries)[TILES], ColumnSums<Warp, D> (&sums)[TILES],
                             uint8_t* stages, Copy& copy) {
    const KvCache& cache = task.cache;
    const Lengths lengths = lengths_of(cache, task.news, sequence);
    const int limit = lengths.past + lengths.count;
    int tile = begin;
    for (; tile < end && tile * kTokenTile < cache.first; tile += step) {
        const int64_t at = first_row_of(cache, sequence, kv_head, tile * kTokenTile) * D;
        const FirstTile first = {cache.first_keys + at, cache.first_values + at, limit - tile * kTokenTile,
                                 reinterpret_cast<uint32_t*>(stages)};
        attend_tile<Warp, D>(cache, first, tile * kTokenTile, limit, queries, sums);
    }
    // First tiles go through the memory of the stages, which other lanes fill from here on.
    Warp::wait();
    const StageLayout layout = stage_layout<D>(cache);
    const auto fill = [&](int filled, int stage) {
        if (filled < end) {
            const int64_t row = row_of(cache, sequence, kv_head, filled * kTokenTile);
            fill_stage<D, Warp>(cache, layout, row, stages + stage * layout.bytes, copy);
        }
        // Every tile is a group of copies, an empty one behind the last: so the number under way is known.
        copy.commit();
    };
    for (int ahead = 0; ahead < kStages - 1; ++ahead) fill(tile + ahead * step, ahead);
    for (int stage = 0; tile < end; tile += step, stage = (stage + 1) % kStages) {
        copy.template wait<kStages - 2>();
        Warp::wait();
        // The stage before this one: all lanes have read it, or they would not be here.
        fill(tile + (kStages - 1) * step, (stage + kStages - 1) % kStages);
        const uint8_t* base = stages + stage * layout.bytes;
        const PackedTile packed = {reinterpret_cast<const uint32_t*>(base),
                                   reinterpret_cast<const uint32_t*>(base + layout.values),
                                   reinterpret_cast<const uint32_t*>(base + layout.key_grids),
                                   reinterpret_cast<const uint32_t*>(base + layout.value_grids)};
        attend_tile<Warp, D>(cache, packed, tile * kTokenTile, limit, queries, sums);
    }
    // The stages are free for something else once every lane is here.
    Warp::wait();
}

// Writes eight columns to `parts`, [8][kPartFloats].
template <class Warp, int D>
PLANISH_HD void store_parts(const KvCache& cache, ColumnSums<Warp, D>& sums, float* parts) {
    typename Warp::template PerLane<float> weight[2], zero[2];
    PLANISH_UNROLL
    for (int i = 0; i < 2; ++i) {
        Warp::each([&](int lane) {
            weight[i][lane] = sums.weight[lane].value[i];
            zero[i][lane] = sums.zero[lane].value[i];
        });
        const auto add = [](float a, float b) { return a + b; };
        Warp::reduce(weight[i], 16, 4, add);
        Warp::reduce(zero[i], 16, 4, add);
    }
    with_bits(cache.values.bits, [&](auto bits) {
        using R = Row<decltype(bits)::value, D>;
        Warp::each([&](int lane) {
            PLANISH_UNROLL
            for (int i = 0; i < 2; ++i) {
                float* part = parts + (2 * (lane % 4) + i) * kPartFloats<D>;
                if (lane < 4) {
                    part[0] = sums.most[lane].value[i];
                    part[1] = weight[i][lane];
                }
                PLANISH_UNROLL
                for (int e = 0; e < R::kRunCodes; ++e) {
                    const float codes = sums.out[e / 2][lane].reg[2 * (e % 2) + i];
                    part[kPartNumbers + R::channel(lane / 4, e)] =
                        codes * power_of_two(-kCodeExponent - R::shift(e)) + zero[i][lane];
                }
            }
        });
    });
}

// Parts of one column, `stride` floats apart, in the order in which they are added.
struct ColumnParts {
    const float* first;
    int count;
    int64_t stride;
};

struct Merged {
    float most;
    float weight;
    float value;  // of one channel
};

PLANISH_HD Merged merge_parts(const ColumnParts& parts, int channel) {
    Merged merged = {kNoScore, 0, 0};
    for (int i = 0; i < parts.count; ++i) merged.most = fmaxf(merged.most, parts.first[i * parts.stride]);
    for (int i = 0; i < parts.count; ++i) {
        const float* part = parts.first + i * parts.stride;
        const float factor = power2(part[0] - merged.most);
        merged.weight += factor * part[1];
        merged.value += factor * part[kPartNumbers + channel];
    }
    return merged;
}

PLANISH_HD void store_y(const Attend& task, int64_t index, const Merged& merged) {
    // A column that attends to nothing gives zeros.
    const float y = merged.weight > 0 ? merged.value * reciprocal(merged.weight) : 0.0f;
    if (task.type == FloatType::kFloat32) {
        static_cast<float*>(task.y)[index] = y;
    } else {
        static_cast<Half*>(task.y)[index] = task.type == FloatType::kFloat16 ? half_of_float(y) : bfloat16_of_float(y);
    }
}

// A thread's share of y for `columns` columns of a KV head from `first_column` on; part p of column c is
// parts.first[p * parts.stride + c * kPartFloats].
template <int D>
PLANISH_HD void store_columns(const Attend& task, int sequence, int kv_head, int first_column, int columns,
                              const ColumnParts& parts, int thread, int threads) {
    const int64_t stride = int64_t{task.heads} * D;
    for (int i = thread; i < columns * D; i += threads) {
        const int column = i / D, channel = i % D;
        const Merged merged = merge_parts({parts.first + column * kPartFloats<D>, parts.count, parts.stride}, channel);
        const int64_t at = query_offset(task, kv_head, first_column + column, stride) + channel;
        store_y(task, int64_t{sequence} * task.news.tokens * stride + at, merged);
    }
}

// --- few columns ---

// The part of a split in the workspace, [batch][kv_heads][splits][columns][kPartFloats].
template <int D>
PLANISH_HD int64_t part_offset(const Attend& task, int splits, int sequence, int kv_head, int split) {
    const int64_t head = int64_t{sequence} * task.cache.kv_heads + kv_head;
    return (head * splits + split) * columns_of(task) * kPartFloats<D>;
}

// Phase 1, a warp: its tiles of a split. `shared` is the warp's.
template <class Warp, int D, class Copy>
PLANISH_HD void attend_split(const Attend& task, int splits, int sequence, int kv_head, int split, int warp,
                             uint8_t* shared, Copy& copy) {
    const Lengths lengths = lengths_of(task.cache, task.news, sequence);
    const auto tiles = static_cast<int64_t>(ceil_div(lengths.past + lengths.count, kTokenTile));
    Queries<Warp, D> queries[1];
    ColumnSums<Warp, D> sums[1];
    load_queries<Warp, D>(task, sequence, kv_head, 0, queries[0]);
    clear<Warp, D>(sums[0]);
    attend_tiles<Warp, D>(task, sequence, kv_head, static_cast<int>(share_begin(tiles, splits, split)) + warp,
                          static_cast<int>(share_begin(tiles, splits, split + 1)), kAttendWarps, queries, sums, shared,
                          copy);
    store_parts<Warp, D>(task.cache, sums[0], reinterpret_cast<float*>(shared));
}

// Phase 2, a thread: merges what the warps of a block have, `stride` floats apart, into y or into the workspace.
template <int D>
PLANISH_HD void merge_warps(const Attend& task, int splits, int sequence, int kv_head, int split, const float* shared,
                            int64_t stride, float* workspace, int thread, int threads) {
    const int columns = columns_of(task);
    if (splits == 1) {
        return store_columns<D>(task, sequence, kv_head, 0, columns, {shared, kAttendWarps, stride}, thread, threads);
    }
    float* part = workspace + part_offset<D>(task, splits, sequence, kv_head, split);
    for (int i = thread; i < columns * D; i += threads) {
        const int column = i / D, channel = i % D;
        const Merged merged = merge_parts({shared + column * kPartFloats<D>, kAttendWarps, stride}, channel);
        float* to = part + column * kPartFloats<D>;
        to[kPartNumbers + channel] = merged.value;
        if (channel > 0) continue;
        to[0] = merged.most;
        to[1] = merged.weight;
    }
}

// Phase 3, a thread of the block that is done last: merges the splits of a sequence and KV head into y.
template <int D>
PLANISH_HD void merge_splits(const Attend& task, int splits, int sequence, int kv_head, const float* workspace,
                             int thread, int threads) {
    const float* first = workspace + part_offset<D>(task, splits, sequence, kv_head, 0);
    const int columns = columns_of(task);
    store_columns<D>(task, sequence, kv_head, 0, columns, {first, splits, int64_t{columns} * kPartFloats<D>}, thread,
                     threads);
}

// --- many columns ---

// A warp: its columns, from the first token to the last one they attend to.
template <class Warp, int D, class Copy>
PLANISH_HD void attend_columns(const Attend& task, int sequence, int kv_head, int first_column, uint8_t* shared,
                               Copy& copy) {
    constexpr int kWarpColumns = kManyTiles * kColumns;
    const int columns = columns_of(task) - first_column;
    if (columns <= 0) return;
    const int mine = columns < kWarpColumns ? columns : kWarpColumns;
    const Lengths lengths = lengths_of(task.cache, task.news, sequence);
    const int existing = lengths.count * group_of(task) - first_column;
    const int last = (existing < mine ? existing : mine) - 1;
    const int tokens = last < 0 ? 0 : lengths.past + (first_column + last) / group_of(task) + 1;
    Queries<Warp, D> queries[kManyTiles];
    ColumnSums<Warp, D> sums[kManyTiles];
    PLANISH_UNROLL
    for (int n = 0; n < kManyTiles; ++n) {
        load_queries<Warp, D>(task, sequence, kv_head, first_column + n * kColumns, queries[n]);
        clear<Warp, D>(sums[n]);
    }
    attend_tiles<Warp, D>(task, sequence, kv_head, 0, ceil_div(tokens, kTokenTile), 1, queries, sums, shared, copy);
    auto* parts = reinterpret_cast<float*>(shared);
    PLANISH_UNROLL
    for (int n = 0; n < kManyTiles; ++n) {
        store_parts<Warp, D>(task.cache, sums[n], parts + n * kColumns * kPartFloats<D>);
    }
    Warp::wait();
    Warp::each(
        [&](int lane) { store_columns<D>(task, sequence, kv_head, first_column, mine, {parts, 1, 0}, lane, kLanes); });
}

}  // namespace planish
