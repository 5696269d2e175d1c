// Every map between codes, words, registers and MMA operands, on random tiles. Prints nothing and returns 0, or says
// what differs and returns 1.

#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "mixing_factor.cuh"
#include "product.cuh"
#include "repack.cuh"

using namespace planish;

namespace {

std::mt19937_64 random_bits(20240607);

int below(int n) { return static_cast<int>(random_bits() % static_cast<uint64_t>(n)); }

void expect(bool holds, const char* what, int bits = 0) {
    if (holds) return;
    std::printf("%s (%d bits)\n", what, bits);
    std::exit(1);
}

// The weights of a tile and the codes of eight tokens over its channels.
struct Tile {
    uint8_t weights[kTileRows][kTileChannels];
    uint8_t tokens[kTileTokens][kTileChannels];
    int32_t products[kTileRows][kTileTokens];
};

// `extreme` makes all codes the largest or zero, where a field that leaks into its neighbour shows most.
Tile random_tile(int bits, int token_bits, bool extreme) {
    Tile tile;
    const auto code = [&](int width) {
        return static_cast<uint8_t>(extreme ? below(2) * ((1 << width) - 1) : below(1 << width));
    };
    for (auto& row : tile.weights)
        for (auto& w : row) w = code(bits);
    for (auto& token : tile.tokens)
        for (auto& a : token) a = code(token_bits);
    for (int r = 0; r < kTileRows; ++r) {
        for (int t = 0; t < kTileTokens; ++t) {
            int64_t sum = 0;
            for (int k = 0; k < kTileChannels; ++k) sum += int64_t{tile.weights[r][k]} * tile.tokens[t][k];
            tile.products[r][t] = static_cast<int32_t>(sum);
        }
    }
    return tile;
}

Nibbles nibbles_of(const Tile& tile, int lane) {
    Nibbles nibbles = {};
    for (int i = 0; i < 4; ++i) {
        for (int m = 0; m < 8; ++m) {
            nibbles.n[i] |= uint32_t{tile.weights[nibble_row(lane, i)][nibble_channel(lane, i) + m]} << 4 * m;
        }
    }
    return nibbles;
}

template <int BITS>
void words_give_back_nibbles() {
    for (int trial = 0; trial < 20000; ++trial) {
        Nibbles nibbles;
        for (uint32_t& n : nibbles.n) {
            n = static_cast<uint32_t>(random_bits()) & 0x11111111u * ((1u << BITS) - 1);
        }
        uint32_t words[BITS];
        pack_nibbles<BITS>(nibbles, words);
        const Nibbles back = unpack_nibbles<BITS>(words);
        for (int i = 0; i < 4; ++i)
            expect(back.n[i] == nibbles.n[i], "unpack_nibbles does not undo pack_nibbles", BITS);
    }
}

// A permutation of all words of a group, in which lanes lie side by side in 128-bit loads.
template <int BITS>
void words_of_a_group_fill_it() {
    std::set<int> seen;
    for (int tile = 0; tile < group_tiles(BITS); ++tile) {
        for (int w = 0; w < BITS; ++w) {
            for (int lane = 0; lane < kLanes; ++lane) {
                const int offset = word_offset(BITS, tile, w, lane);
                expect(offset >= 0 && offset < group_words(BITS), "word_offset leaves the group", BITS);
                expect(offset / 4 % kLanes == lane, "word_offset gives a lane another lane's load", BITS);
                seen.insert(offset);
            }
        }
    }
    expect(static_cast<int64_t>(seen.size()) == group_words(BITS), "word_offset gives two words one place", BITS);
}

void every_code_has_one_owner() {
    std::set<std::pair<int, int>> seen;
    for (int lane = 0; lane < kLanes; ++lane) {
        for (int i = 0; i < 4; ++i) {
            for (int m = 0; m < 8; ++m) seen.insert({nibble_row(lane, i), nibble_channel(lane, i) + m});
        }
    }
    expect(seen.size() == kTileRows * kTileChannels, "some code of the tile has no lane, or two");
}

void stored_order_of_8_bit_codes() {
    for (int64_t channel = 0; channel < 256; ++channel) {
        expect(u8_channel(u8_position(channel)) == channel, "u8_channel does not undo u8_position");
        expect(u8_position(channel) / 8 == channel / 8, "u8_position leaves the eight channels");
    }
}

// The 4-bit view: nibble registers as they are, tokens in natural order.
template <int BITS>
void tile_by_4_bit_mma(bool extreme) {
    const Tile tile = random_tile(BITS, 4, extreme);
    HostWarp::PerLane<FragmentA> a;
    HostWarp::PerLane<FragmentB> b;
    HostWarp::PerLane<FragmentC> c = {};
    HostWarp::each([&](int lane) {
        uint32_t words[BITS];
        pack_nibbles<BITS>(nibbles_of(tile, lane), words);
        const Nibbles nibbles = unpack_nibbles<BITS>(words);
        for (int reg = 0; reg < 4; ++reg) a[lane].reg[reg] = nibbles.n[reg];
        for (int reg = 0; reg < 2; ++reg) {
            b[lane].reg[reg] = gather_nibbles(&tile.tokens[lane / 4][16 * (lane % 4) + 8 * reg]);
        }
    });
    HostWarp::mma_u4(c, a, b);
    HostWarp::each([&](int lane) {
        for (int reg = 0; reg < 4; ++reg) {
            expect(c[lane].reg[reg] == tile.products[c_row(lane, reg)][c_token(lane, reg)], "4-bit MMA", BITS);
        }
    });
}

// The mainloops, over one group whose first tile is `tile` and whose other tiles are zero.
template <int BITS>
void tile_by_mainloops(bool extreme) {
    const Tile tile = random_tile(BITS, 8, extreme);
    std::vector<uint8_t> codes(static_cast<size_t>(kTileRows * group_channels(BITS)));
    std::vector<uint8_t> stored(static_cast<size_t>(kTileTokens * group_channels(BITS)));
    const int place = below(group_tiles(BITS)) * kTileChannels;
    for (int k = 0; k < kTileChannels; ++k) {
        for (int r = 0; r < kTileRows; ++r) codes[r * group_channels(BITS) + place + k] = tile.weights[r][k];
        for (int t = 0; t < kTileTokens; ++t) {
            stored[t * group_channels(BITS) + u8_position(place + k)] = tile.tokens[t][k];
        }
    }
    std::vector<Quad> words(group_words(BITS) / 4);
    pack_row_tile<BITS>(codes.data(), group_channels(BITS), 1, words[0].word);
    std::vector<Quad> aligned(stored.size() / 16);
    std::memcpy(aligned.data(), stored.data(), stored.size());
    const Tokens tokens = {reinterpret_cast<const uint8_t*>(aligned.data()), group_channels(BITS), kTileTokens};

    HostWarp::PerLane<FragmentC> c[1][1] = {};
    multiply_mma<BITS, HostWarp, 1, 1>(c, words[0].word, {0}, 1, 0, 1, tokens, 0);
    HostWarp::PerLane<DotSums<2>> sums = {};
    multiply_dot<BITS, HostWarp, 2>(sums, words[0].word, 0, 1, 0, 1, tokens, 0);
    int32_t dots[kTileRows][2] = {};
    HostWarp::each([&](int lane) {
        for (int reg = 0; reg < 4; ++reg) {
            expect(c[0][0][lane].reg[reg] == tile.products[c_row(lane, reg)][c_token(lane, reg)], "8-bit MMA", BITS);
        }
        for (int i = 0; i < 4; ++i) dots[lane / 4 + 8 * (i / 2)][i % 2] += sums[lane].row[i / 2][i % 2];
    });
    for (int r = 0; r < kTileRows; ++r) {
        for (int t = 0; t < 2; ++t) expect(dots[r][t] == tile.products[r][t], "dot products", BITS);
    }
}

// The lanes of a warp load a line each, or a token each, and a column, for operand A or B of an MMA of tf32: each lane
// from another of the 32 banks of shared memory.
void floats_of_an_mma_are_in_different_banks() {
    for (int m = 1; m <= 128; ++m) {
        for (int k = 8; k <= 1024; k += m % 8 ? 8 : 1) {
            const Factors factors = {nullptr, nullptr, m, m, k};
            std::set<int> lines, tokens, mixed;
            for (int lane = 0; lane < kLanes; ++lane) {
                const Place a = a_place<1>(lane, 0, 0), b = b_place<1>(lane, 0, 0);
                lines.insert((a.row * tiled_stride(k) + a.k) % 32);
                tokens.insert((b.row * floats_of_token(factors) + b.k) % 32);
                mixed.insert(mixed_place(factors, 0, 0, lane, 0) % 32);
            }
            expect(lines.size() == kLanes, "lines in the same bank", k);
            expect(tokens.size() == kLanes, "tokens in the same bank", k);
            expect(m < 4 || mixed.size() == kLanes, "mixed lines in the same bank", k);
        }
    }
}

template <int BITS>
void all(int trials) {
    words_give_back_nibbles<BITS>();
    words_of_a_group_fill_it<BITS>();
    for (int trial = 0; trial < trials; ++trial) {
        tile_by_4_bit_mma<BITS>(trial % 4 == 0);
        tile_by_mainloops<BITS>(trial % 4 == 0);
    }
}

}  // namespace

int main() {
    every_code_has_one_owner();
    stored_order_of_8_bit_codes();
    floats_of_an_mma_are_in_different_banks();
    constexpr int kTrials = 4000;
    all<2>(kTrials);
    all<3>(kTrials);
    all<4>(kTrials);
}
