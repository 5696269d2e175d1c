// The C interface of the kernels on the host, in float32 and one loop after the other: what the plugin library is
// tested with where there is no GPU. "Device" memory is memory. Whatever a call would enqueue is done when it returns.
// What the kernels refuse is refused: their own checks come first.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "arguments.cu"
#include "kv_arguments.cu"
#include "launch.h"
#include "repack.cuh"

namespace {

int fail(const char* what) { return planish::fail(PLANISH_BAD_ARGUMENT, "%s", what); }

// Where the code of a channel lies among its stored eight, even ones first.
int64_t stored_place(int64_t channel) { return channel / 8 * 8 + channel % 2 * 4 + channel % 8 / 2; }

// x + residual, which is stored, behind the norm.
std::vector<float> normed(const planish_quantize& task, int64_t token) {
    const int64_t first = token * task.channels;
    const float* x = static_cast<const float*>(task.x) + first;
    std::vector<float> row(x, x + task.channels);
    if (task.residual) {
        for (int i = 0; i < task.channels; ++i) {
            row[i] += static_cast<const float*>(task.residual)[first + i];
            static_cast<float*>(task.sum)[first + i] = row[i];
        }
    }
    if (task.gain) {
        float squares = 0;
        for (const float each : row) squares += each * each;
        const float size = std::sqrt(squares / static_cast<float>(task.channels) + task.epsilon);
        for (int i = 0; i < task.channels; ++i) row[i] = row[i] / size * task.gain[i];
    }
    return row;
}

std::vector<float> transformed(const planish_quantize& task, int64_t token, std::vector<float> row) {
    std::vector<float> made(row.size());
    const int m = task.m, k = task.k;
    if (task.right) {
        for (int i = 0; i < m; ++i) {
            const float* right = task.right + (task.right_count == 1 ? 0 : i * k * k);
            for (int j = 0; j < k; ++j) {
                float sum = 0;
                for (int l = 0; l < k; ++l) sum += row[i * k + l] * right[l * k + j];
                made[i * k + j] = sum;
            }
        }
        if (task.workspace && task.right_count > 1 && task.tokens <= PLANISH_SPREAD_TOKENS) {
            std::copy(made.begin(), made.end(), task.workspace + token * task.channels);
        }
        row = made;
    }
    if (task.left) {
        for (int i = 0; i < m; ++i) {
            for (int j = 0; j < k; ++j) {
                float sum = 0;
                for (int l = 0; l < m; ++l) sum += task.left[l * m + i] * row[l * k + j];
                made[i * k + j] = sum;
            }
        }
        row = made;
    }
    if (task.permutation) {
        for (int i = 0; i < task.channels; ++i) made[i] = row[task.permutation[i]];
        row = made;
    }
    return row;
}

// Adds the products of one segment to y [rows].
void add_segment(const planish_linear& task, const planish_weight_segment& weights, int bits, int64_t token, int s,
                 int segments, int64_t first, std::vector<float>& y) {
    std::vector<uint8_t> codes(static_cast<size_t>(task.rows * weights.channels));
    const auto unpack = bits == 2   ? planish::unpack_matrix<2>
                        : bits == 3 ? planish::unpack_matrix<3>
                                    : planish::unpack_matrix<4>;
    unpack(weights.words, task.rows, weights.channels, codes.data());
    const uint8_t* tokens = task.codes + token * task.stride + first;
    const int64_t at = token * segments + s;
    for (int64_t row = 0; row < task.rows; ++row) {
        int32_t sum = 0;
        for (int64_t c = 0; c < weights.channels; ++c) {
            const int32_t weight = codes[static_cast<size_t>(row * weights.channels + c)] - (1 << (bits - 1));
            sum += weight * (tokens[stored_place(c)] - task.token_zero_sums[2 * at]);
        }
        y[static_cast<size_t>(row)] += static_cast<float>(sum) * weights.scales[row] * task.token_scales[at];
    }
}

int linear(const planish_linear& task) {
    planish::Linear read;
    if (const int status = planish::read_linear(task, read)) return status;
    if (task.type != PLANISH_FLOAT32) return fail("emulated in float32 only");
    const int segments = task.high.channels ? 2 : 1;
    for (int64_t token = 0; token < task.tokens; ++token) {
        std::vector<float> y(static_cast<size_t>(task.rows));
        if (segments == 2) add_segment(task, task.high, 4, token, 0, 2, 0, y);
        add_segment(task, task.low, task.low_bits, token, segments - 1, segments, task.high.channels, y);
        if (task.gated) {
            for (int64_t i = 0; i < task.rows / 2; ++i) {
                const auto at = static_cast<size_t>(i / 8 * 16 + i % 8);
                y[static_cast<size_t>(i)] = y[at] / (1 + std::exp(-y[at])) * y[at + 8];
            }
            y.resize(static_cast<size_t>(task.rows / 2));
        }
        std::copy(y.begin(), y.end(), static_cast<float*>(task.y) + token * static_cast<int64_t>(y.size()));
    }
    return PLANISH_OK;
}

// The place of a code in a row of packing.pack: its byte and lowest bit, or those of its three bits.
uint32_t packed_code(const uint8_t* row, int bits, int n, int i) {
    const int chunk = n / 8;
    if (bits == 8) return row[i];
    if (bits == 4) return row[i % (4 * chunk)] >> i / (4 * chunk) * 4 & 15;
    if (bits == 2) return row[i % (2 * chunk)] >> i / (2 * chunk) * 2 & 3;
    if (i < 6 * chunk) return row[i % (3 * chunk)] >> i / (3 * chunk) * 4 & 7;
    uint32_t code = 0;
    for (int j = 0; j < 3; ++j) code |= (row[j * chunk + i % chunk] >> (i / chunk == 6 ? 3 : 7) & 1u) << j;
    return code;
}

void pack_code(uint8_t* row, int bits, int n, int i, uint32_t code) {
    const int chunk = n / 8;
    const auto add = [](uint8_t& byte, uint32_t value) { byte = static_cast<uint8_t>(byte | value); };
    if (bits == 8) return add(row[i], code);
    if (bits == 4) return add(row[i % (4 * chunk)], code << i / (4 * chunk) * 4);
    if (bits == 2) return add(row[i % (2 * chunk)], code << i / (2 * chunk) * 2);
    if (i < 6 * chunk) return add(row[i % (3 * chunk)], code << i / (3 * chunk) * 4);
    for (int j = 0; j < 3; ++j) add(row[j * chunk + i % chunk], (code >> j & 1u) << (i / chunk == 6 ? 3 : 7));
}

// The keys, or the values, of a cache.
struct Rows {
    uint8_t* codes;
    _Float16* grids;
    int bits;
};

Rows keys_of(const planish_kv_cache& cache) {
    return {cache.keys, reinterpret_cast<_Float16*>(cache.key_scales), cache.key_bits};
}

Rows values_of(const planish_kv_cache& cache) {
    return {cache.values, reinterpret_cast<_Float16*>(cache.value_scales), cache.value_bits};
}

int64_t row_of(const planish_kv_cache& cache, int b, int head, int token) {
    return (int64_t{b} * cache.kv_heads + head) * cache.capacity + token;
}

void append_row(const planish_kv_cache& cache, const Rows& rows, float clip, const float* x, int64_t row) {
    const int n = cache.head_dim;
    const float levels = static_cast<float>((1 << rows.bits) - 1);
    const float most = *std::max_element(x, x + n), least = *std::min_element(x, x + n), span = most - least;
    const auto scale = static_cast<_Float16>(std::max(span / (levels / clip), 0x1p-14f));
    const auto zero = static_cast<_Float16>(least + span * ((1 - clip) / 2));
    const int bytes = n * rows.bits / 8;
    std::memset(rows.codes + row * bytes, 0, static_cast<size_t>(bytes));
    for (int i = 0; i < n; ++i) {
        const float code = std::rint((x[i] - static_cast<float>(zero)) / static_cast<float>(scale));
        pack_code(rows.codes + row * bytes, rows.bits, n, i, static_cast<uint32_t>(std::clamp(code, 0.0f, levels)));
    }
    rows.grids[2 * row] = scale;
    rows.grids[2 * row + 1] = zero;
}

float stored(const planish_kv_cache& cache, const Rows& rows, int64_t row, int i) {
    const int n = cache.head_dim;
    const _Float16* grid = rows.grids + 2 * row;
    const auto code = static_cast<float>(packed_code(rows.codes + row * (n * rows.bits / 8), rows.bits, n, i));
    return code * static_cast<float>(grid[0]) + static_cast<float>(grid[1]);
}

}  // namespace

extern "C" {

int planish_quantize_tokens(const planish_quantize* task, void*) {
    planish::RowQuantization read = {};
    if (const int status = planish::read_quantize(*task, read)) return status;
    if (task->type != PLANISH_FLOAT32) return fail("emulated in float32 only");
    for (int64_t token = 0; token < task->tokens; ++token) {
        const std::vector<float> row = transformed(*task, token, normed(*task, token));
        int64_t from = 0, to = token * task->stride;
        for (int s = 0; s < task->segment_count; ++s) {
            const planish_code_segment& segment = task->segments[s];
            const float zero = std::ldexp(1.0f, segment.bits - 1);
            float largest = 0;
            for (int c = 0; c < segment.channels; ++c) largest = std::max(largest, std::fabs(row[from + c]));
            const float scale = std::max(largest * (segment.clip / (zero - 1)), 1e-10f);
            int32_t sum = 0;
            for (int c = 0; c < segment.padded; ++c) {
                const float x = c < segment.channels ? row[from + c] / scale : 0;
                const float code = std::clamp(std::rint(x), -zero, zero - 1) + zero;
                task->codes[to + stored_place(c)] = static_cast<uint8_t>(code);
                sum += static_cast<int32_t>(code);
            }
            const int64_t at = token * task->segment_count + s;
            task->scales[at] = scale;
            task->zero_sums[2 * at] = static_cast<int32_t>(zero);
            task->zero_sums[2 * at + 1] = sum;
            from += segment.channels;
            to += segment.padded;
        }
    }
    return PLANISH_OK;
}

int planish_small_linear(const planish_linear* task, void*) {
    return task->tokens > PLANISH_SMALL_TOKENS ? fail("too many tokens for the small linear") : linear(*task);
}

int planish_large_linear(const planish_linear* task, void*) {
    return task->tokens <= PLANISH_SMALL_TOKENS ? fail("too few tokens for the large linear") : linear(*task);
}

int planish_best_order(int64_t, int32_t bits, int32_t* order) {
    *order = PLANISH_LANES;
    return bits < 2 || bits > 8 ? fail("there are no such codes") : PLANISH_OK;
}

int planish_append_kv(const planish_append* task, void*) {
    planish::Append read;
    if (const int status = planish::read_append(*task, read)) return status;
    if (task->type != PLANISH_FLOAT32) return fail("emulated in float32 only");
    const planish_kv_cache& cache = task->cache;
    for (int b = 0; b < task->news.batch; ++b) {
        for (int i = 0; i < task->news.counts[b]; ++i) {
            for (int head = 0; head < cache.kv_heads; ++head) {
                const int64_t row = row_of(cache, b, head, task->news.past[b] + i);
                const int64_t at = (int64_t{b} * task->news.tokens + i) * task->stride + head * cache.head_dim;
                append_row(cache, keys_of(cache), task->key_clip, static_cast<const float*>(task->keys) + at, row);
                append_row(cache, values_of(cache), task->value_clip, static_cast<const float*>(task->values) + at,
                           row);
            }
        }
    }
    return PLANISH_OK;
}

// Blocks of the GPU that splits are planned for: of more GPUs than one, for an engine may be run on another.
__attribute__((visibility("default"))) int planish_emulated_blocks = 500;

int planish_plan_attend(planish_attend* task) {
    planish::Attend read;
    if (const int status = planish::read_shapes(*task, read)) return status;
    planish::plan_attend(read, planish_emulated_blocks, *task);
    return PLANISH_OK;
}

int planish_attend_kv(const planish_attend* task, void*) {
    planish::Attend read;
    if (const int status = planish::read_attend(*task, read)) return status;
    if (task->type != PLANISH_FLOAT32) return fail("emulated in float32 only");
    const planish_kv_cache& cache = task->cache;
    const int n = cache.head_dim, group = task->heads / cache.kv_heads;
    auto* counters = static_cast<uint8_t*>(task->workspace);
    const int64_t zeroed = task->workspace_bytes ? PLANISH_ATTEND_COUNTER_BYTES : 0;
    if (std::any_of(counters, counters + zeroed, [](uint8_t each) { return each != 0; })) {
        return fail("the counters are not zeroed");
    }
    // As kernels do: all of the workspace that is planned for is written, and what the next call finds is not 0.
    if (zeroed) std::memset(counters + zeroed, 0x55, static_cast<size_t>(task->workspace_bytes - zeroed));
    std::vector<float> scores(static_cast<size_t>(cache.capacity));
    for (int b = 0; b < task->news.batch; ++b) {
        for (int i = 0; i < task->news.counts[b]; ++i) {
            for (int head = 0; head < task->heads; ++head) {
                const int64_t at = (int64_t{b} * task->news.tokens + i) * task->stride + head * n;
                const float* query = static_cast<const float*>(task->queries) + at;
                const int length = task->news.past[b] + i + 1;
                double total = 0;
                for (int t = 0; t < length; ++t) {
                    const int64_t row = row_of(cache, b, head / group, t);
                    double score = 0;
                    for (int c = 0; c < n; ++c) score += query[c] * stored(cache, keys_of(cache), row, c);
                    scores[t] = static_cast<float>(std::exp(score * task->score_scale));
                    total += scores[t];
                }
                for (int c = 0; c < n; ++c) {
                    double sum = 0;
                    for (int t = 0; t < length; ++t) {
                        sum += scores[t] * stored(cache, values_of(cache), row_of(cache, b, head / group, t), c);
                    }
                    static_cast<float*>(task->y)[at + c] = static_cast<float>(sum / total);
                }
            }
        }
    }
    return PLANISH_OK;
}

// The GPU that is pretended: an SM 90, unless a test says otherwise.
__attribute__((visibility("default"))) int planish_emulated_sm = 90;

}  // extern "C"

namespace planish::plugin {

std::string problem_of_device() {
    for (const int sm : kSms) {
        if (sm == planish_emulated_sm) return {};
    }
    return words("planish has no kernels for SM {sm}", {{"sm", spell(planish_emulated_sm)}});
}

int clear(void* to, size_t bytes, void*) {
    std::memset(to, 0, bytes);
    return PLANISH_OK;
}

int copy(void* to, const void* from, size_t bytes, void*) {
    std::memcpy(to, from, bytes);
    return PLANISH_OK;
}

}  // namespace planish::plugin
