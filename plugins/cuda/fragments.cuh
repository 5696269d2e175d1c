// Which code of a tile each lane, register and field holds.
//
// Two kinds of maps meet here. The first say what an MMA instruction does with the registers of its lanes; they are
// from the PTX ISA ("Matrix Fragments for mma.m16n8k32", "... mma.m16n8k64"). The second say which channel planish puts
// where. A product is right when the left and the right operand put the same channel at the same k of the instruction,
// and every channel of the tile occurs once; which channel meets which k is free, and chosen so that
//
//   - a lane owns 16 consecutive channels, so that its part of a token is one 128-bit load;
//   - the same weight words feed the 4-bit MMA as they are and the 8-bit MMA after one mask and one shift.
//
// Lane = 4 g + t throughout, g = 0 .. 7, t = 0 .. 3.
#pragma once

#include "portable.cuh"

namespace planish {

constexpr int kLanes = 32;
constexpr int kTileRows = 16;      // output channels of a tile: m of the MMA
constexpr int kTileChannels = 64;  // input channels of a tile: k of one 4-bit or of two 8-bit MMAs
constexpr int kTileTokens = 8;     // tokens of an MMA: its n

// Where an element stands in an operand of an MMA: for A a row and k, for B a column and k.
struct Place {
    int row;
    int k;
};

// --- the instructions, with FIELDS elements in a register: 1 float (m16n8k8), 2 halves (m16n8k16), 4 bytes (m16n8k32)
// or 8 nibbles (m16n8k64) ---

// Element `field` of register a[reg], reg = 0 .. 3.
template <int FIELDS>
PLANISH_HD Place a_place(int lane, int reg, int field) {
    return {lane / 4 + 8 * (reg & 1), 4 * FIELDS * (reg >> 1) + FIELDS * (lane % 4) + field};
}

// Element `field` of register b[reg], reg = 0 .. 1; `row` is the column of B, a token.
template <int FIELDS>
PLANISH_HD Place b_place(int lane, int reg, int field) {
    return {lane / 4, 4 * FIELDS * reg + FIELDS * (lane % 4) + field};
}

// The row of register c[reg], reg = 0 .. 3, within the tile.
PLANISH_HD int c_row(int lane, int reg) { return lane / 4 + 8 * (reg >> 1); }

// The token of register c[reg] among the eight of the MMA.
PLANISH_HD int c_token(int lane, int reg) { return 2 * (lane % 4) + (reg & 1); }

// --- the weights of a tile ---

// The output channel that nibble register n[i] of a lane belongs to, within the tile.
PLANISH_HD int nibble_row(int lane, int i) { return lane / 4 + 8 * (i & 1); }

// The first of the eight consecutive input channels that nibble register n[i] holds, lowest nibble first.
PLANISH_HD int nibble_channel(int lane, int i) { return 16 * (lane % 4) + 8 * (i >> 1); }

// 4-bit MMA: register a[reg] is n[reg].
//
// 8-bit MMA: MMA h = 0, 1 takes the even and the odd nibbles of n[2 h] and n[2 h + 1]; a[reg] is o[u8_register(h,
// reg)].
PLANISH_HD constexpr int u8_register(int h, int reg) { return 4 * h + 2 * (reg & 1) + (reg >> 1); }

// --- the activations of a token, stored in the order in which they are loaded ---

enum class Order : int32_t { kLanes = 0, kColumns = 1, kNibbles = 2 };

// kLanes, one code to a byte: sorted within every eight channels, the even ones first, as the even and odd nibbles of
// the weights come apart. Lane (g, t) reads 16 bytes, and b[reg] of MMA h is word 2 h + reg of them.
//
// kColumns, one code to a byte: the words of kLanes, four channels each, transposed within every 64 channels. A wgmma
// reads 32 consecutive bytes as its k, so word t of the 16 bytes 2 h + reg is what b[reg] of MMA h is in lane (g, t).
//
// kNibbles, two codes to a byte, the even channel low: natural order. Lane (g, t) reads the 8 bytes of its 16 channels,
// and b[reg] of the 4-bit MMA is word reg of them.

// The byte of a token at which the code of a channel is stored in kLanes.
PLANISH_HD constexpr int64_t u8_position(int64_t channel) {
    return (channel & ~int64_t{7}) + 4 * (channel & 1) + ((channel & 7) >> 1);
}

// The channel whose code is stored at byte `position` of a token in kLanes.
PLANISH_HD constexpr int64_t u8_channel(int64_t position) {
    return (position & ~int64_t{7}) + 2 * (position & 3) + ((position & 7) >> 2);
}

// Where kColumns has the word that kLanes has at byte `position`, a multiple of 4.
PLANISH_HD constexpr int64_t column_position(int64_t position) {
    return (position & ~int64_t{63}) + ((position & 12) << 2) + ((position & 48) >> 2);
}

// Bytes of `channels` codes, a multiple of 64 of them.
PLANISH_HD constexpr int64_t stored_bytes(int64_t channels, Order order) {
    return order == Order::kNibbles ? channels / 2 : channels;
}

// Stores the codes of eight channels, given as kLanes has them; `octet` counts from `codes`.
PLANISH_HD void store_octet(uint8_t* codes, int octet, Order order, uint64_t bytes) {
    const auto low = static_cast<uint32_t>(bytes), high = static_cast<uint32_t>(bytes >> 32);
    auto* words = reinterpret_cast<uint32_t*>(codes);
    if (order == Order::kLanes) {
        reinterpret_cast<uint64_t*>(codes)[octet] = bytes;
    } else if (order == Order::kColumns) {
        words[column_position(8 * octet) / 4] = low;
        words[column_position(8 * octet + 4) / 4] = high;
    } else {
        words[octet] = low | high << 4;
    }
}

}  // namespace planish
