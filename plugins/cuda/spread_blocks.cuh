// The block-diagonal map of a few tokens, spread over a GPU: a block of threads has some lines of one token.
//
// The map of 4096 channels in blocks of 64 is 1 MB. Where tokens come one by one, one multiprocessor would read it in
// some 10 us, half of what the linears of a whole layer of LLaMA-2-7B take; 64 of them read it in less time than a
// launch takes. The norm is over all channels: every block sums their squares for itself, out of L2. What it makes, in
// float32, is quantised by a second launch, of quantize_row.cuh, which mixes the lines too where there is a left
// factor.
#pragma once

#include "quantize_row.cuh"

namespace planish {

// Blocks of threads that all tokens together should have.
constexpr int kSpreadBlocks = 128;
constexpr int kFewestSpreadWarps = 8;

// Some lines of a token.
struct LineShare {
    int first;
    int count;
};

// The map of those lines.
PLANISH_HD constexpr Factors factors_of(const Factors& factors, const LineShare& share) {
    const int64_t first = static_cast<int64_t>(share.first) * factors.k * factors.k;
    return {factors.right + first, nullptr, share.count, share.count, factors.k};
}

// Lines of a block; 0 where this is no block-diagonal map that block_factors.cuh knows.
PLANISH_HD constexpr int lines_of_share(const Factors& factors, int64_t tokens) {
    if (!factors.right || factors.right_count < 2 || !warps_of_blocks(factors)) return 0;
    const auto lines = static_cast<int>(ceil_div<int64_t>(factors.m * tokens, kSpreadBlocks));
    return lines < factors.m ? lines : factors.m;
}

// As many however few lines a block has: they sum the squares in an order that the width alone decides.
PLANISH_HD constexpr int threads_of_share(const Factors& factors) {
    const int warps = warps_of_blocks(factors);
    return (warps > kFewestSpreadWarps ? warps : kFewestSpreadWarps) * kLanes;
}

PLANISH_HD constexpr LineShare share_of(const Factors& factors, int lines, int part) {
    const int first = part * lines, left = factors.m - first;
    return {first, left < lines ? left : lines};
}

// Writes the lines of a share of a token, normed and multiplied, into `out`, the row of that token. `row` is shared
// memory, floats_of_token of the share's factors; read(i) gives channel i with its residual, and sum(i, value) takes
// it.
template <class Block, class Read, class Sum>
PLANISH_HD void spread_lines(const RowQuantization& task, const LineShare& share, float* row, float* out, Read read,
                             Sum sum, Block& block) {
    const Factors factors = factors_of(task.factors, share);
    const RowLines lines = lines_of_blocks(factors);
    const int first = share.first * factors.k, channels = share.count * factors.k;
    typename Block::template PerThread<float> squares;
    block.each([&](int thread) {
        float total = 0;
        for (int i = thread; task.gain && i < task.channels; i += block.threads()) {
            const float value = read(i);
            total += value * value;
        }
        squares[thread] = total;
        each_channel(lines, channels, row, thread, block.threads(), [&](int i, float& place) {
            place = read(first + i);
            sum(first + i, place);
        });
    });
    if (task.gain) {
        const float inverse = inverse_size(task, block.total(squares));
        block.each([&](int thread) {
            each_channel(lines, channels, row, thread, block.threads(),
                         [&](int i, float& place) { place = place * inverse * task.gain[first + i]; });
        });
    }
    apply_blocks(factors, {row, floats_of_token(factors), 1}, block);
    block.each([&](int thread) {
        each_channel(lines, channels, row, thread, block.threads(),
                     [&](int i, float& place) { out[first + i] = place; });
    });
}

// What is left to do with the rows that spread_lines makes.
PLANISH_HD RowQuantization behind_spread(RowQuantization task) {
    task.gain = nullptr;
    task.factors.right = nullptr;
    task.factors.right_count = 0;
    return task;
}

}  // namespace planish
