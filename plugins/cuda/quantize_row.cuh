// A token on its way into a low-bit linear: residual addition, RMSNorm, transform, codes. A block of threads has one of
// them, or a few.
//
//     h = x + residual                        stored as the next residual, and read back as it was rounded
//     u = h / sqrt(mean(h^2) + epsilon) * gain
//     v = u P                                 apply_factors.cuh, tiled_factors.cuh, block_factors.cuh
//     scale = max(clip * max|v| / (2^(bits-1) - 1), 1e-10)
//     code = clamp(round(v / scale), -2^(bits-1), 2^(bits-1) - 1) + 2^(bits-1)
//
// The last two lines are those of PlanishQuantizeActivation, operation by operation, so that without a transform the
// codes and scales are equal to its. A permutation puts channels into the order of the weights; high-impact channels
// come first and have a scale and bits of their own.
//
// Bytes: x once, codes once, one byte per channel; factors from L2. Everything between is in shared memory.
#pragma once

#include "block_factors.cuh"
#include "zero_points.cuh"

namespace planish {

// A run of channels, in stored order, that share a scale.
struct CodeSegment {
    int channels;
    int padded;    // their count in the stored row
    int bits;      // 2 .. 8
    float factor;  // clip / (2^(bits-1) - 1), a float32 quotient
};

constexpr int kMaxSegments = 2;

// The scale of a token of zeros; see plugins/ops/quantize_activation.py.
constexpr float kSmallestScale = 1e-10f;

struct RowQuantization {
    int channels;
    const float* gain;  // [channels]; null leaves out the norm
    float epsilon;
    Factors factors;
    const int32_t* permutation;  // [channels]: stored channel i is channel permutation[i]; null leaves them in order
    CodeSegment segments[kMaxSegments];
    int segment_count;
    Order order;  // of the codes
};

// What one token gives: `codes` is the whole stored row, a multiple of 16 bytes, the others are one per segment.
struct RowOutput {
    uint8_t* codes;
    float* scales;
    TokenSum* sums;
};

PLANISH_HD float divide(float x, float y) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(x, y);
#else
    return x / y;
#endif
}

// Calls function(i, place of channel i) for a thread's channels of a row before its transform. TILED, it lies in padded
// lines; a warp then takes a line, so that no channel asks for a division.
template <bool TILED, class Function>
PLANISH_HD void each_channel(const RowQuantization& task, float* row, int thread, int threads, Function function) {
    if (!TILED) {
        for (int i = thread; i < task.channels; i += threads) function(i, row[i]);
        return;
    }
    const int k = task.factors.k, stride = tiled_stride(k);
    for (int i = thread / kLanes; i < task.factors.m; i += threads / kLanes) {
        for (int j = thread % kLanes; j < k; j += kLanes) function(i * k + j, row[i * stride + j]);
    }
}

// Sets to zero what is behind the channels of a line, where a step of a tile reads it.
template <class Block>
PLANISH_HD void clear_padding(const Factors& factors, float* row, Block& block) {
    const int k = factors.k, stride = tiled_stride(k), padding = stride - k;
    block.each([&](int thread) {
        for (int i = thread; i < factors.m * padding; i += block.threads()) {
            row[i / padding * stride + k + i % padding] = 0;
        }
    });
}

template <bool TILED, class Block>
PLANISH_HD void normalise_row(const RowQuantization& task, float* row, Block& block) {
    typename Block::template PerThread<float> squares;
    block.each([&](int thread) {
        float sum = 0;
        each_channel<TILED>(task, row, thread, block.threads(), [&](int, float& value) { sum += value * value; });
        squares[thread] = sum;
    });
    const float mean = divide(block.total(squares), static_cast<float>(task.channels));
    const float inverse = divide(1.0f, sqrtf(mean + task.epsilon));
    block.each([&](int thread) {
        each_channel<TILED>(task, row, thread, block.threads(),
                            [&](int i, float& value) { value = value * inverse * task.gain[i]; });
    });
}

template <class Block>
PLANISH_HD void quantize_segment(const CodeSegment& segment, Order order, const int32_t* permutation, int first,
                                 const float* row, uint8_t* codes, float* scale_out, TokenSum* sum_out, Block& block) {
    const auto value = [&](int i) { return row[permutation ? permutation[first + i] : first + i]; };
    typename Block::template PerThread<float> magnitudes;
    block.each([&](int thread) {
        float most = 0;
        for (int i = thread; i < segment.channels; i += block.threads()) most = fmaxf(most, fabsf(value(i)));
        magnitudes[thread] = most;
    });
    const float scale = fmaxf(block.largest(magnitudes) * segment.factor, kSmallestScale);
    const int32_t zero = zero_point(segment.bits);
    typename Block::template PerThread<int32_t> sums;
    block.each([&](int thread) {
        int32_t sum = 0;
        // Eight channels at a time, which fragments.cuh sorts among themselves.
        for (int octet = thread; octet < segment.padded / 8; octet += block.threads()) {
            uint64_t stored = 0;
            PLANISH_UNROLL
            for (int i = 0; i < 8; ++i) {
                const int channel = 8 * octet + i;
                int32_t code = zero;
                if (channel < segment.channels) {
                    const float rounded = rintf(divide(value(channel), scale));
                    code += static_cast<int32_t>(
                        fminf(fmaxf(rounded, static_cast<float>(-zero)), static_cast<float>(zero - 1)));
                }
                sum += code;
                stored |= static_cast<uint64_t>(code) << 8 * u8_position(i);
            }
            store_octet(codes, octet, order, stored);
        }
        sums[thread] = sum;
    });
    const int32_t sum = block.total(sums);
    block.each([&](int thread) {
        if (thread != 0) return;
        *scale_out = scale;
        *sum_out = {zero, sum};
    });
}

// Floats of shared memory that a row takes.
template <bool TILED>
PLANISH_HD int row_floats(const RowQuantization& task) {
    return TILED ? tiled_floats(task.factors) : task.channels;
}

// Codes of a row as it is.
template <class Block>
PLANISH_HD void quantize_segments(const RowQuantization& task, const float* row, const RowOutput& out, Block& block) {
    int first = 0;
    uint8_t* codes = out.codes;
    for (int s = 0; s < task.segment_count; ++s) {
        quantize_segment(task.segments[s], task.order, task.permutation, first, row, codes, out.scales + s,
                         out.sums + s, block);
        first += task.segments[s].channels;
        codes += stored_bytes(task.segments[s].padded, task.order);
    }
}

// `row` is shared memory that holds the token, where each_channel<TILED> has put it: row_floats of them. A thread has
// VALUES results of a factor.
template <int VALUES, bool TILED, class Block>
PLANISH_HD void quantize_row(const RowQuantization& task, float* row, const RowOutput& out, Block& block) {
    if (TILED && task.factors.k % kFactorDepth) clear_padding(task.factors, row, block);
    if (task.gain) normalise_row<TILED>(task, row, block);
    if (TILED) {
        apply_tiled<VALUES / 4>(task.factors, row, block);
    } else {
        if (task.factors.right) apply_factor<VALUES, false>(task.factors, row, block);
        if (task.factors.left) apply_factor<VALUES, true>(task.factors, row, block);
    }
    quantize_segments(task, row, out, block);
}

// The same of a few tokens, for factors that threads_of_blocks knows; `output_of(token)` says where to.
template <class Block, class OutputOf>
PLANISH_HD void quantize_rows(const RowQuantization& task, const TokenRows& rows, OutputOf output_of, Block& block) {
    for (int token = 0; task.gain && token < rows.count; ++token) {
        normalise_row<true>(task, rows.first + token * rows.floats, block);
    }
    apply_blocks(task.factors, rows, block);
    for (int token = 0; token < rows.count; ++token) {
        quantize_segments(task, rows.first + token * rows.floats, output_of(token), block);
    }
}

}  // namespace planish
