// Attention to 16 tokens by one warp: scores, weights, and the weighted sums of values. Formulas in kv_attend.cuh.
//
// Lane = 4 g + t throughout. Scores leave the MMA with token g (and g + 8) in lane g and columns 2 t, 2 t + 1; as
// weights they go into the next one with column g and tokens 2 t, 2 t + 1 (+ 8), which takes two transpositions of
// 8 x 8 float16. Of the sums, accumulator row g of row tile i is channel channel(g, 2 i) of the values, row g + 8 is
// channel(g, 2 i + 1).
//
// Codes are unsigned, so that their sums grow with the tokens while what is meant by them, codes with their zeros,
// hardly does. A second MMA with the constant `middle` takes that many times the weights off again: sums stay small,
// and so does what an accumulator loses behind its last bit. The zero that is added at the end is the rest, z / s +
// middle.
#pragma once

#include "kv_attend.cuh"

namespace planish {

// Scale and zero of a token's key or value.
struct TokenGrid {
    float scale;
    float zero;
};

PLANISH_HD TokenGrid token_grid(uint32_t pair) {
    return {float_of_half(static_cast<Half>(pair)), float_of_half(static_cast<Half>(pair >> 16))};
}

// Words from row to row of values in a stage. Lanes read the rows 2 t at once: an odd number of 16 bytes puts the four
// into different banks of shared memory.
template <class R>
constexpr int kValueStride = R::kWords % 4 ? R::kWords : (R::kWords / 4 | 1) * 4;

// Sixteen tokens of the packed cache, in shared memory.
struct PackedTile {
    const uint32_t* keys;         // [16][words of a row]
    const uint32_t* values;       // [16][kValueStride]
    const uint32_t* key_grids;    // [16]
    const uint32_t* value_grids;  // [16]

    template <int BITS, int D>
    PLANISH_HD CodePairs<D> key_pairs(int lane, int row) const {
        using R = Row<BITS, D>;
        return unpack_pairs<BITS, D>(neighbouring_runs<R>(keys + row * R::kWords, lane % 4));
    }

    template <int BITS, int D>
    PLANISH_HD CodePairs<D> value_pairs(int lane, int row) const {
        using R = Row<BITS, D>;
        const uint32_t* first = values + row * kValueStride<R>;
        return unpack_pairs<BITS, D>(runs_of_two<R>(first, first + kValueStride<R>, lane / 4));
    }

    PLANISH_HD TokenGrid key_grid(int row) const { return token_grid(key_grids[row]); }
    PLANISH_HD TokenGrid value_grid(int row) const { return token_grid(value_grids[row]); }
};

// Sixteen of the first tokens, in float16: in the place of a code stands value * 2^(shift - kFirstExponent), and the
// grid has the scale that makes a value of it again. No shift is above that, so every float16 fits; what is lost is
// below 2^-18.
//
// There are few such tiles, and gathering their elements into registers would take more registers than all the rest: a
// lane puts them into shared memory of its own, one after the other, and reads them back.
struct FirstTile {
    static constexpr int kFirstExponent = 6;

    const Half* keys;  // [16][D]
    const Half* values;
    int existing;     // rows behind hold anything
    uint32_t* words;  // [2][D / 8][32], the lanes' own

    template <int BITS, int D>
    PLANISH_HD CodePairs<D> key_pairs(int lane, int row) const {
        const int run = 2 * (lane % 4);
        return gather<BITS, D>(keys, lane, row, run, row, run + 1);
    }

    template <int BITS, int D>
    PLANISH_HD CodePairs<D> value_pairs(int lane, int row) const {
        return gather<BITS, D>(values, lane, row, lane / 4, row + 1, lane / 4);
    }

    PLANISH_HD TokenGrid key_grid(int) const { return {power_of_two(kFirstExponent + kCodeExponent), 0}; }
    PLANISH_HD TokenGrid value_grid(int) const { return {power_of_two(kFirstExponent + kCodeExponent), 0}; }

  private:
    template <int BITS, int D>
    PLANISH_HD CodePairs<D> gather(const Half* rows, int lane, int low_row, int low_run, int high_row,
                                   int high_run) const {
        using R = Row<BITS, D>;
        uint32_t* own = words + low_row / 8 * R::kRunCodes * kLanes + lane;
        const auto element = [&](int row, int run, int e) -> Half {
            if (row >= existing) return 0;
            const float value = float_of_half(rows[row * D + R::channel(run, e)]);
            return half_of_float(value * power_of_two(R::shift(e) - kFirstExponent));
        };
        PLANISH_ROLLED
        for (int e = 0; e < R::kRunCodes; ++e) {
            own[e * kLanes] = half_pair(element(low_row, low_run, e), element(high_row, high_run, e));
        }
        CodePairs<D> pairs;
        PLANISH_UNROLL
        for (int e = 0; e < R::kRunCodes; ++e) pairs.pair[e] = own[e * kLanes];
        return pairs;
    }
};

// What a warp keeps of eight columns from tile to tile.
template <class Warp, int D>
struct ColumnSums {
    typename Warp::template PerLane<Two> most;    // the largest exponent so far, the same for all lanes of a column
    typename Warp::template PerLane<Two> weight;  // sum of w / s over the lane's tokens
    typename Warp::template PerLane<Two> zero;    // sum of w (z / s + middle), likewise
    typename Warp::template PerLane<FragmentF>
        out[D / kTileRows];  // sum of w (c - middle), times 2^(kCodeExponent + shift)
};

template <class Warp, int D>
PLANISH_HD void clear(ColumnSums<Warp, D>& sums) {
    Warp::each([&](int lane) {
        sums.most[lane] = {{kNoScore, kNoScore}};
        sums.weight[lane] = sums.zero[lane] = {{0, 0}};
        PLANISH_UNROLL
        for (int i = 0; i < D / kTileRows; ++i) sums.out[i][lane] = {{0, 0, 0, 0}};
    });
}

// Accumulators of q . c. Two for each, so that no MMA waits for the one before it.
template <class Warp>
struct Scores {
    typename Warp::template PerLane<FragmentF> even;
    typename Warp::template PerLane<FragmentF> odd;
};

template <class Warp, int D, int TILES, class Tile>
PLANISH_HD void multiply_keys(int bits, const Tile& tile, const Queries<Warp, D> (&queries)[TILES],
                              Scores<Warp> (&scores)[TILES]) {
    with_bits(bits, [&](auto width) {
        typename Warp::template PerLane<CodePairs<D>> low, high;
        Warp::each([&](int lane) {
            low[lane] = tile.template key_pairs<decltype(width)::value, D>(lane, lane / 4);
            high[lane] = tile.template key_pairs<decltype(width)::value, D>(lane, lane / 4 + 8);
        });
        PLANISH_UNROLL
        for (int i = 0; i < D / 16; ++i) {
            typename Warp::template PerLane<FragmentA> a;
            Warp::each([&](int lane) {
                a[lane] = {{low[lane].pair[2 * i], high[lane].pair[2 * i], low[lane].pair[2 * i + 1],
                            high[lane].pair[2 * i + 1]}};
            });
            PLANISH_UNROLL
            for (int n = 0; n < TILES; ++n) {
                typename Warp::template PerLane<FragmentB> b;
                Warp::each([&](int lane) {
                    b[lane] = {{queries[n].pairs[lane].pair[2 * i], queries[n].pairs[lane].pair[2 * i + 1]}};
                });
                Warp::mma_f16(i % 2 ? scores[n].odd : scores[n].even, a, b);
            }
        }
    });
}

// What a lane knows of its two tokens, g and g + 8 of the tile. Behind the last token of the cache memory may hold
// anything: the grids there are made harmless, as weights are 0.
struct TokenNumbers {
    TokenGrid key[2];
    float exponent[2];  // log2 of the value's scale
    float inverse[2];   // 1 / scale
    float zero[2];      // zero / scale + middle
};

template <class Tile>
PLANISH_HD TokenNumbers token_numbers(const Tile& tile, int row, int first_token, int limit, float middle) {
    TokenNumbers numbers;
    PLANISH_UNROLL
    for (int r = 0; r < 2; ++r) {
        const bool exists = first_token + row + 8 * r < limit;
        const TokenGrid value = exists ? tile.value_grid(row + 8 * r) : TokenGrid{1, 0};
        numbers.key[r] = exists ? tile.key_grid(row + 8 * r) : TokenGrid{0, 0};
        numbers.exponent[r] = log2_of(value.scale);
        numbers.inverse[r] = reciprocal(value.scale);
        numbers.zero[r] = value.zero * numbers.inverse[r] + middle;
    }
    return numbers;
}

// Exponents of eight columns in the places of an accumulator, and the weights they become: operand B of the values,
// and the same with the other sign.
template <class Warp, int D>
PLANISH_HD void weigh(const Queries<Warp, D>& queries, const Scores<Warp>& scores,
                      const typename Warp::template PerLane<TokenNumbers>& tokens, int first_token,
                      ColumnSums<Warp, D>& sums, typename Warp::template PerLane<FragmentB>& weights,
                      typename Warp::template PerLane<FragmentB>& negative) {
    typename Warp::template PerLane<FragmentF> exponents;
    typename Warp::template PerLane<float> most[2];
    Warp::each([&](int lane) {
        const ColumnNumbers& columns = queries.numbers[lane];
        PLANISH_UNROLL
        for (int reg = 0; reg < 4; ++reg) {
            const int r = reg / 2, i = reg % 2, token = first_token + lane / 4 + 8 * r;
            const float product = scores.even[lane].reg[reg] + scores.odd[lane].reg[reg];
            const float exponent = product * columns.factor[i] * tokens[lane].key[r].scale +
                                   tokens[lane].key[r].zero * columns.zero[i] + tokens[lane].exponent[r];
            exponents[lane].reg[reg] = token > columns.last[i] ? -INFINITY : exponent;
        }
        PLANISH_UNROLL
        for (int i = 0; i < 2; ++i) most[i][lane] = fmaxf(exponents[lane].reg[i], exponents[lane].reg[2 + i]);
    });
    typename Warp::template PerLane<bool> grew;
    PLANISH_UNROLL
    for (int i = 0; i < 2; ++i) Warp::reduce(most[i], 16, 4, [](float a, float b) { return fmaxf(a, b); });
    Warp::each([&](int lane) {
        grew[lane] = most[0][lane] > sums.most[lane].value[0] || most[1][lane] > sums.most[lane].value[1];
    });
    if (Warp::any(grew)) {
        Warp::each([&](int lane) {
            PLANISH_UNROLL
            for (int i = 0; i < 2; ++i) {
                const float before = sums.most[lane].value[i], now = fmaxf(before, most[i][lane]);
                const float factor = power2(before - now);
                sums.most[lane].value[i] = now;
                sums.weight[lane].value[i] *= factor;
                sums.zero[lane].value[i] *= factor;
                PLANISH_UNROLL
                for (int row = 0; row < D / kTileRows; ++row) {
                    sums.out[row][lane].reg[i] *= factor;
                    sums.out[row][lane].reg[2 + i] *= factor;
                }
            }
        });
    }
    PLANISH_UNROLL
    for (int r = 0; r < 2; ++r) {
        typename Warp::template PerLane<uint32_t> pairs;
        Warp::each([&](int lane) {
            Half half[2];
            PLANISH_UNROLL
            for (int i = 0; i < 2; ++i) {
                half[i] =
                    half_of_float(power2(exponents[lane].reg[2 * r + i] - sums.most[lane].value[i] + kWeightExponent));
                const float weight = float_of_half(half[i]);
                sums.weight[lane].value[i] += weight * tokens[lane].inverse[r];
                sums.zero[lane].value[i] += weight * tokens[lane].zero[r];
            }
            pairs[lane] = half_pair(half[0], half[1]);
        });
        const auto transposed = Warp::transpose(pairs);
        Warp::each([&](int lane) {
            weights[lane].reg[r] = transposed[lane];
            negative[lane].reg[r] = transposed[lane] ^ 0x80008000u;
        });
    }
}

template <class Warp, int D, int TILES, class Tile>
PLANISH_HD void add_values(int bits, const Tile& tile,
                           const typename Warp::template PerLane<FragmentB> (&weights)[TILES],
                           const typename Warp::template PerLane<FragmentB> (&negative)[TILES],
                           ColumnSums<Warp, D> (&sums)[TILES]) {
    with_bits(bits, [&](auto width) {
        constexpr int kBits = decltype(width)::value;
        constexpr uint32_t kMiddle = (1u << (kBits - 1)) * 0x10001u;
        using R = Row<kBits, D>;
        typename Warp::template PerLane<CodePairs<D>> low, high;
        Warp::each([&](int lane) {
            low[lane] = tile.template value_pairs<kBits, D>(lane, 2 * (lane % 4));
            high[lane] = tile.template value_pairs<kBits, D>(lane, 2 * (lane % 4) + 8);
        });
        PLANISH_UNROLL
        for (int i = 0; i < D / kTileRows; ++i) {
            typename Warp::template PerLane<FragmentA> a, middle;
            Warp::each([&](int lane) {
                const uint32_t even = kMiddle << R::shift(2 * i), odd = kMiddle << R::shift(2 * i + 1);
                a[lane] = {{low[lane].pair[2 * i], low[lane].pair[2 * i + 1], high[lane].pair[2 * i],
                            high[lane].pair[2 * i + 1]}};
                middle[lane] = {{even, odd, even, odd}};
            });
            PLANISH_UNROLL
            for (int n = 0; n < TILES; ++n) {
                Warp::mma_f16(sums[n].out[i], a, weights[n]);
                Warp::mma_f16(sums[n].out[i], middle, negative[n]);
            }
        }
    });
}

// Adds the 16 tokens from `first_token` on to the sums of 8 TILES columns. The cache has `limit` tokens.
template <class Warp, int D, int TILES, class Tile>
PLANISH_HD void attend_tile(const KvCache& cache, const Tile& tile, int first_token, int limit,
                            const Queries<Warp, D> (&queries)[TILES], ColumnSums<Warp, D> (&sums)[TILES]) {
    Scores<Warp> scores[TILES] = {};
    multiply_keys<Warp, D>(cache.keys.bits, tile, queries, scores);
    typename Warp::template PerLane<TokenNumbers> tokens;
    const float middle = power_of_two(cache.values.bits - 1);
    Warp::each([&](int lane) { tokens[lane] = token_numbers(tile, lane / 4, first_token, limit, middle); });
    typename Warp::template PerLane<FragmentB> weights[TILES], negative[TILES];
    PLANISH_UNROLL
    for (int n = 0; n < TILES; ++n) {
        weigh<Warp, D>(queries[n], scores[n], tokens, first_token, sums[n], weights[n], negative[n]);
    }
    add_values<Warp, D>(cache.values.bits, tile, weights, negative, sums);
}

}  // namespace planish
