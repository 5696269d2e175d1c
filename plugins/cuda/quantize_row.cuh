// A token on its way into a low-bit linear: residual addition, RMSNorm, transform, codes. A block of threads has one of
// them, or a few.
//
//     h = x + residual                        stored as the next residual, and read back as it was rounded
//     u = h / sqrt(mean(h^2) + epsilon) * gain
//     v = u P                                 by the files *_factor.cuh and *_factors.cuh
//     scale = max(clip * max|v| / (2^(bits-1) - 1), 1e-10)
//     code = clamp(round(v / scale), -2^(bits-1), 2^(bits-1) - 1) + 2^(bits-1)
//
// The last two lines are those of PlanishQuantizeActivation, operation by operation, so that without a transform the
// codes and scales are equal to its. A permutation puts channels into the order of the weights; high-impact channels
// come first and have a scale and bits of their own.
//
// Bytes: x once, codes once, one byte per channel; factors from L2. Everything between is in shared memory.
#pragma once

#include "mixing_factor.cuh"
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

// What the norm multiplies a token with, given the sum of its squares.
PLANISH_HD float inverse_size(const RowQuantization& task, float squares) {
    return quotient_of(1.0f, sqrtf(quotient_of(squares, static_cast<float>(task.channels)) + task.epsilon));
}

template <class Block>
PLANISH_HD void normalise_row(const RowQuantization& task, const RowLines& lines, float* row, Block& block) {
    typename Block::template PerThread<float> squares;
    block.each([&](int thread) {
        float sum = 0;
        each_channel(lines, task.channels, row, thread, block.threads(),
                     [&](int, float& value) { sum += value * value; });
        squares[thread] = sum;
    });
    const float inverse = inverse_size(task, block.total(squares));
    block.each([&](int thread) {
        each_channel(lines, task.channels, row, thread, block.threads(),
                     [&](int i, float& value) { value = value * inverse * task.gain[i]; });
    });
}

template <class Block>
PLANISH_HD void quantize_segment(const CodeSegment& segment, Order order, const RowPart& part, uint8_t* codes,
                                 float* scale_out, TokenSum* sum_out, Block& block) {
    typename Block::template PerThread<float> magnitudes;
    block.each([&](int thread) {
        float most = 0;
        for (int octet = thread; 8 * octet < segment.channels; octet += block.threads()) {
            const Octet x = load_octet(part, octet);
            PLANISH_UNROLL
            for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(x.value[i]));
        }
        magnitudes[thread] = most;
    });
    const float scale = fmaxf(block.largest(magnitudes) * segment.factor, kSmallestScale);
    const int32_t zero = zero_point(segment.bits);
    typename Block::template PerThread<int32_t> sums;
    block.each([&](int thread) {
        int32_t sum = 0;
        // Eight channels at a time, which fragments.cuh sorts among themselves. What is behind the last has the code of
        // zero.
        for (int octet = thread; octet < segment.padded / 8; octet += block.threads()) {
            const Octet x = load_octet(part, octet);
            uint64_t stored = 0;
            PLANISH_UNROLL
            for (int i = 0; i < 8; ++i) {
                const float rounded = rintf(quotient_of(x.value[i], scale));
                const int32_t code = zero + static_cast<int32_t>(fminf(fmaxf(rounded, static_cast<float>(-zero)),
                                                                       static_cast<float>(zero - 1)));
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

// How a row lies before its transform: TILED, in padded lines.
template <bool TILED>
PLANISH_HD RowLines lines_before(const RowQuantization& task) {
    if (!TILED) return one_run(task.channels);
    return {task.factors.k, tiled_stride(task.factors.k)};
}

// Floats of shared memory that a row takes.
template <bool TILED>
PLANISH_HD int row_floats(const RowQuantization& task) {
    return TILED ? tiled_floats(task.factors) : task.channels;
}

// Codes of a row as it is.
template <class Block>
PLANISH_HD void quantize_segments(const RowQuantization& task, const RowLines& lines, const float* row,
                                  const RowOutput& out, Block& block) {
    int first = 0;
    uint8_t* codes = out.codes;
    for (int s = 0; s < task.segment_count; ++s) {
        const CodeSegment& segment = task.segments[s];
        quantize_segment(segment, task.order, {row, lines, task.permutation, first, segment.channels}, codes,
                         out.scales + s, out.sums + s, block);
        first += segment.channels;
        codes += stored_bytes(segment.padded, task.order);
    }
}

// `row` is shared memory that holds the token, as lines_before<TILED> says: row_floats of them. A thread has VALUES
// results of a factor.
template <int VALUES, bool TILED, class Block>
PLANISH_HD void quantize_row(const RowQuantization& task, float* row, const RowOutput& out, Block& block) {
    if (TILED && task.factors.k % kFactorDepth) clear_padding(task.factors, row, block);
    if (task.gain) normalise_row(task, lines_before<TILED>(task), row, block);
    if (TILED) {
        apply_tiled<VALUES / 4>(task.factors, row, block);
    } else {
        if (task.factors.right) apply_factor<VALUES, false>(task.factors, row, block);
        if (task.factors.left) apply_factor<VALUES, true>(task.factors, row, block);
    }
    quantize_segments(task, one_run(task.channels), row, out, block);
}

// The same of a few tokens, for factors that threads_of_blocks knows; `output_of(token)` says where to.
template <class Block, class OutputOf>
PLANISH_HD void quantize_rows(const RowQuantization& task, const TokenRows& rows, OutputOf output_of, Block& block) {
    const RowLines lines = lines_of_blocks(task.factors);
    for (int token = 0; task.gain && token < rows.count; ++token) {
        normalise_row(task, lines, rows.first + token * rows.floats, block);
    }
    if (task.factors.right) apply_blocks(task.factors, rows, block);
    if (task.factors.left) apply_mixing(task.factors, rows, block);
    for (int token = 0; token < rows.count; ++token) {
        quantize_segments(task, lines, rows.first + token * rows.floats, output_of(token), block);
    }
}

}  // namespace planish
