// A row of channels in shared memory, as lines of a matrix or as one run.
#pragma once

#include "fragments.cuh"

namespace planish {

// Lines of k channels, `stride` floats from one to the next. In one run both are the channels of the row.
struct RowLines {
    int k;
    int stride;
};

PLANISH_HD constexpr bool is_one_run(const RowLines& lines) { return lines.k == lines.stride; }

PLANISH_HD constexpr RowLines one_run(int channels) { return {channels, channels}; }

// Where channel i is.
PLANISH_HD constexpr int place_of(const RowLines& lines, int i) {
    return is_one_run(lines) ? i : i / lines.k * lines.stride + i % lines.k;
}

// Calls function(i, place of channel i) for a thread's channels of a row. A warp takes a line, so that no channel asks
// for a division.
template <class Function>
PLANISH_HD void each_channel(const RowLines& lines, int channels, float* row, int thread, int threads,
                             Function function) {
    if (is_one_run(lines)) {
        for (int i = thread; i < channels; i += threads) function(i, row[i]);
        return;
    }
    for (int line = thread / kLanes; line * lines.k < channels; line += threads / kLanes) {
        for (int j = thread % kLanes; j < lines.k; j += kLanes) {
            function(line * lines.k + j, row[line * lines.stride + j]);
        }
    }
}

struct Octet {
    float value[8];
};

// Some channels of a row, in the order in which their codes are stored.
struct RowPart {
    const float* row;  // a multiple of 16 bytes
    RowLines lines;
    const int32_t* permutation;  // stored channel i is channel permutation[i]; null leaves them in order
    int first;
    int channels;
};

// Eight channels of a part, zeros behind the last. Where they lie in one run they are two loads of 16 bytes: a lane's
// octet begins 32 bytes behind its neighbour's, and eight loads of a float would each ask four banks for eight words.
PLANISH_HD Octet load_octet(const RowPart& part, int octet) {
    Octet loaded;
    const int i = part.first + 8 * octet, left = part.channels - 8 * octet;
    const bool whole =
        !part.permutation && left >= 8 && part.first % 8 == 0 && (is_one_run(part.lines) || part.lines.k % 8 == 0);
    if (whole) {
        const auto* quads = reinterpret_cast<const Quad*>(part.row + place_of(part.lines, i));
        PLANISH_UNROLL
        for (int half = 0; half < 2; ++half) {
            const Quad words = quads[half];
            PLANISH_UNROLL
            for (int j = 0; j < 4; ++j) loaded.value[4 * half + j] = float_of_bits(words.word[j]);
        }
        return loaded;
    }
    PLANISH_UNROLL
    for (int j = 0; j < 8; ++j) {
        loaded.value[j] =
            j < left ? part.row[place_of(part.lines, part.permutation ? part.permutation[i + j] : i + j)] : 0.0f;
    }
    return loaded;
}

}  // namespace planish
