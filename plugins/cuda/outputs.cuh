// Where a linear's outputs go: their type, and the product of gate and up.
#pragma once

#include <cmath>

#include "fragments.cuh"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace planish {

enum class OutputType : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// y [tokens][rows], or gated [tokens][rows / 2] = silu(gate) * up. Then rows come in sixteens, eight of gate before
// eight of up, so that the lane which holds an output of gate in an MMA's registers holds that of up beside it.
struct Outputs {
    void* y;
    OutputType type;
    bool gated;
    int64_t rows;
};

// Rows of gate before those of up.
constexpr int kGateRows = kTileRows / 2;

// The output that row `row` of gate, in the first half of a tile, and row + kGateRows of up give.
PLANISH_HD constexpr int64_t gated_output(int64_t row) { return row / kTileRows * kGateRows + row % kTileRows; }

// silu(gate) * up. Where exp overflows the quotient is 0, as it should be.
PLANISH_HD float gate(float gate, float up) {
#if defined(__CUDA_ARCH__)
    return quotient_of(gate, 1 + expf(-gate)) * up;
#else
    return quotient_of(gate, 1 + std::exp(-gate)) * up;
#endif
}

// Stores an output of a token: that of a row, or of gated_output.
PLANISH_HD void store_output(const Outputs& outputs, int64_t token, int64_t output, float value) {
    const int64_t at = token * (outputs.gated ? outputs.rows / 2 : outputs.rows) + output;
#if defined(__CUDA_ARCH__)
    if (outputs.type == OutputType::kFloat16) {
        static_cast<__half*>(outputs.y)[at] = __float2half_rn(value);
        return;
    }
    if (outputs.type == OutputType::kBfloat16) {
        static_cast<__nv_bfloat16*>(outputs.y)[at] = __float2bfloat16_rn(value);
        return;
    }
#endif
    static_cast<float*>(outputs.y)[at] = value;
}

// Stores a thread's outputs of a block of ROWS rows and `tokens` tokens; `row_output(token, row)` gives one of them,
// both counted within the block. Neighbouring threads store neighbouring outputs.
template <int ROWS, class RowOutput>
PLANISH_HD void store_block(const Outputs& outputs, int64_t first_token, int tokens, int64_t first_row, int thread,
                            int threads, RowOutput row_output) {
    if (outputs.gated) {
        for (int i = thread; i < tokens * (ROWS / 2); i += threads) {
            const int token = i / (ROWS / 2), row = i % (ROWS / 2) / kGateRows * kTileRows + i % kGateRows;
            if (first_row + row >= outputs.rows) continue;
            const float up = row_output(token, row + kGateRows);
            store_output(outputs, first_token + token, gated_output(first_row + row), gate(row_output(token, row), up));
        }
        return;
    }
    for (int i = thread; i < tokens * ROWS; i += threads) {
        const int token = i / ROWS, row = i % ROWS;
        if (first_row + row >= outputs.rows) continue;
        store_output(outputs, first_token + token, first_row + row, row_output(token, row));
    }
}

}  // namespace planish
