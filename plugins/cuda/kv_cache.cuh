// Where the tokens of the cache are.
//
// Codes are uint8 [blocks][kv_heads][block_tokens][row bytes], rows in the layout of plugins/packing.py; scales are
// float16 [blocks][kv_heads][block_tokens][2], scale then zero. A block is a sequence, or a page of kPageTokens tokens
// that a table assigns to one. Attention reads tiles of 16 tokens, which lie in one block, one behind the other.
#pragma once

#include "kv_float.cuh"

namespace planish {

constexpr int kTokenTile = 16;
constexpr unsigned kPageTokens = 64;

// One of the two packed tensors.
struct PackedRows {
    uint8_t* codes;
    Half* scales;
    int bits;
};

struct KvCache {
    PackedRows keys;
    PackedRows values;
    const int32_t* pages;  // [batch][pages_per_sequence]; null where each sequence is a block
    int pages_per_sequence;
    int block_tokens;    // kPageTokens, or the tokens that a sequence has room for, a multiple of kTokenTile
    int capacity;        // tokens that a sequence has room for
    Half* first_keys;    // [batch][kv_heads][first][head_dim]: the first tokens in float16, in place of the packed
    Half* first_values;  // ones
    int first;           // 0 is none; a multiple of kTokenTile
    int kv_heads;
    int head_dim;
};

// New tokens of every sequence: `counts` of them, at most `tokens`, behind `past` that the cache has.
struct NewTokens {
    int batch;
    int tokens;
    const int32_t* past;    // [batch]
    const int32_t* counts;  // [batch]; null where all have `tokens`
};

// Tokens of a sequence: `past` that the cache has, `count` new ones behind them.
struct Lengths {
    int past;
    int count;
};

PLANISH_HD int clamped(int x, int most) { return x < 0 ? 0 : x < most ? x : most; }

// What is given, as far as there is room. Lengths lie in memory of the GPU, where no launcher checks them, and whoever
// times a kernel on made-up numbers, as a builder of engines may, gives any.
PLANISH_HD Lengths lengths_of(const KvCache& cache, const NewTokens& news, int sequence) {
    const int past = clamped(news.past[sequence], cache.capacity), room = cache.capacity - past;
    const int most = news.tokens < room ? news.tokens : room;
    return {past, news.counts ? clamped(news.counts[sequence], most) : most};
}

// The row of a token, counted over a tensor of the cache.
PLANISH_HD int64_t row_of(const KvCache& cache, int sequence, int head, int token) {
    // Unsigned: dividing it by a power of two takes one instruction.
    const auto at = static_cast<unsigned>(token);
    const int block = cache.pages ? cache.pages[sequence * cache.pages_per_sequence + at / kPageTokens] : sequence;
    return (int64_t{block} * cache.kv_heads + head) * cache.block_tokens + (cache.pages ? at % kPageTokens : at);
}

PLANISH_HD int row_bytes(const KvCache& cache, const PackedRows& rows) { return cache.head_dim * rows.bits / 8; }

// The float16 row of one of the first tokens.
PLANISH_HD int64_t first_row_of(const KvCache& cache, int sequence, int head, int token) {
    return (int64_t{sequence} * cache.kv_heads + head) * cache.first + token;
}

}  // namespace planish
