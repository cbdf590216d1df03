#include "qcomm/block.h"

#include <algorithm>
#include <cstring>

namespace qcomm {
namespace {

constexpr int kWordBits = 16;
constexpr int kEmitBits = 2 * kWordBits;  // a lane writes a word when a codeword would bring it to 32 bits: 31 and a sentinel fit a u32

struct Lanes {
    std::uint32_t bits[kLanes] = {};
    std::uint32_t count[kLanes] = {};
};

// Pushes one step's codewords, lane 31 first. A word is stored every time and kept only where the lane is full: no branch to mispredict.
std::uint16_t* push_step(Lanes& lanes, const std::uint32_t* codewords, int live, std::uint16_t* words) {
    for (int j = live - 1; j >= 0; --j) {
        const std::uint32_t code = codewords[j] & 0xFFFFu, length = codewords[j] >> 16;
        std::uint32_t x = lanes.bits[j], c = lanes.count[j];
        const bool full = c + length >= kEmitBits;
        words[-1] = static_cast<std::uint16_t>(x >> ((c - kWordBits) & 31u));
        words -= full;
        c -= full ? kWordBits : 0u;
        x &= (1u << c) - 1u;
        lanes.bits[j] = x << length | code;
        lanes.count[j] = c + length;
    }
    return words;
}

bool any_full(const Lanes& lanes, const std::uint32_t* codewords, int live) {
    for (int j = 0; j < live; ++j) {
        if (lanes.count[j] + (codewords[j] >> 16) >= kEmitBits) return true;
    }
    return false;
}

}  // namespace

int encode_lanes(const std::uint32_t* codewords, int count, std::uint32_t* start, std::uint16_t* words_end) {
    Lanes lanes;
    std::uint16_t* words = words_end;
    int step = (count - 1) / kLanes;
    // Until a lane is full, lanes just fill up from nothing: no bits are spent on a common starting state.
    for (; step >= 0; --step) {
        const int live = std::min(kLanes, count - step * kLanes);
        if (any_full(lanes, codewords + step * kLanes, live)) break;
        for (int j = 0; j < live; ++j) {
            const std::uint32_t codeword = codewords[step * kLanes + j];
            lanes.bits[j] = lanes.bits[j] << (codeword >> 16) | (codeword & 0xFFFFu);
            lanes.count[j] += codeword >> 16;
        }
    }
    if (step >= 0) {
        for (std::uint32_t& c : lanes.count) c = std::max<std::uint32_t>(c, kWindowBits);
    }
    for (; step >= 0; --step) words = push_step(lanes, codewords + step * kLanes, std::min(kLanes, count - step * kLanes), words);
    for (int j = 0; j < kLanes; ++j) start[j] = lanes.bits[j] | 1u << lanes.count[j];
    return static_cast<int>(words_end - words);
}

bool decode_lanes(const std::uint8_t* start, const std::uint8_t* words, std::int64_t word_count, const DecodeTable& table, int count,
                  std::uint16_t* symbols) {
    std::uint32_t bits[kLanes];
    std::int32_t valid[kLanes];
    std::memcpy(bits, start, sizeof(bits));
    for (int j = 0; j < kLanes; ++j) {
        if (bits[j] == 0) return false;
        valid[j] = 31 - __builtin_clz(bits[j]);
        bits[j] ^= 1u << valid[j];
    }
    const std::uint16_t* const entries = table.entries.data();
    const std::uint32_t mask = table.mask;
    std::int64_t at = 0;
    for (int begin = 0; begin < count; begin += kLanes) {
        const int live = std::min(kLanes, count - begin);
        for (int j = 0; j < live; ++j) {
            const std::uint32_t entry = entries[bits[j] & mask];
            symbols[begin + j] = static_cast<std::uint16_t>(entry & 0xFFFu);
            bits[j] >>= entry >> 12;
            valid[j] -= static_cast<std::int32_t>(entry >> 12);
        }
        for (int j = 0; j < live && at < word_count; ++j) {
            if (valid[j] >= kWindowBits) continue;
            std::uint16_t word;
            std::memcpy(&word, words + 2 * at++, sizeof(word));
            // Only damaged input has a negative count; its result is thrown away, but the shift must stay defined.
            bits[j] |= static_cast<std::uint32_t>(word) << (valid[j] & 31);
            valid[j] += kWordBits;
        }
    }
    std::uint32_t left = 0;
    bool overrun = false;
    for (int j = 0; j < kLanes; ++j) {
        left |= bits[j];
        overrun |= valid[j] < 0;
    }
    return left == 0 && !overrun;
}

void pack_bits(const std::uint16_t* symbols, std::int64_t count, int num_bits, std::uint8_t* out) {
    std::uint64_t buffer = 0;
    int filled = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        buffer |= static_cast<std::uint64_t>(symbols[i]) << filled;
        filled += num_bits;
        if (filled < 32) continue;
        const auto word = static_cast<std::uint32_t>(buffer);
        std::memcpy(out, &word, sizeof(word));
        out += sizeof(word);
        buffer >>= 32;
        filled -= 32;
    }
    for (; filled > 0; filled -= 8, buffer >>= 8) *out++ = static_cast<std::uint8_t>(buffer);
}

void unpack_bits(const std::uint8_t* in, std::int64_t count, int num_bits, std::uint16_t* symbols) {
    const std::uint32_t mask = (1u << num_bits) - 1u;
    const std::int64_t total = packed_bytes(count, num_bits);
    std::uint64_t buffer = 0;
    int filled = 0;
    std::int64_t at = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        while (filled < num_bits && at < total) {
            buffer |= static_cast<std::uint64_t>(in[at++]) << filled;
            filled += 8;
        }
        symbols[i] = static_cast<std::uint16_t>(buffer & mask);
        buffer >>= num_bits;
        filled -= num_bits;
    }
}

}  // namespace qcomm
