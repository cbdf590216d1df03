// encode_lanes for NEON. Included like kernels_loops.inl.
//
// As in encode_lanes_avx2.inl a lane is two words: `high` is the one that is written next, `low` has the `held` bits
// behind it on top, and codewords stand on top of 16 bits. NEON shifts each word by a number of its own, to the right
// where that is negative, and gives 0 for 16 bits or more, so a codeword c is pushed with two shifts:
//
//   filled = low | c >> held          the bits that fit into `low`
//   rest   = c << (16 - held)         those that do not
//
// 32 lanes are four registers of words.

constexpr int kWidth = 8;  // lanes in a register
constexpr int kGroups = kLanes / kWidth;

// c >> n, for n below 16.
QCOMM_INLINE uint16x8_t shift_right(uint16x8_t c, uint16x8_t n) {
    return vshlq_u16(c, vnegq_s16(vreinterpretq_s16_u16(n)));
}
// c << (16 - n), for n up to 16.
QCOMM_INLINE uint16x8_t shift_up(uint16x8_t c, uint16x8_t n) {
    return vshlq_u16(c, vreinterpretq_s16_u16(vsubq_u16(vdupq_n_u16(kWordBits), n)));
}

// One bit for each lane that is all ones; the others are 0.
QCOMM_INLINE unsigned lane_mask(uint16x8_t lanes) {
    constexpr std::uint8_t kBits[kWidth] = {1, 2, 4, 8, 16, 32, 64, 128};
    return vaddv_u8(vand_u8(vmovn_u16(lanes), vld1_u8(kBits)));
}
// A lane that is all ones is -1.
QCOMM_INLINE int count_lanes(uint16x8_t lanes) { return -vaddvq_s16(vreinterpretq_s16_u16(lanes)); }

// A table's answer for 8 lanes.
struct Codewords {
    uint16x8_t code, length;  // a code's first bit is the highest of 16
};

// From 8 entries of a table, in order.
QCOMM_INLINE Codewords codewords_of(const std::uint32_t* entries) {
    const uint16x8_t a = vreinterpretq_u16_u32(vld1q_u32(entries)), b = vreinterpretq_u16_u32(vld1q_u32(entries + 4));
    const uint16x8_t length = vuzp2q_u16(a, b);
    return {shift_up(vuzp1q_u16(a, b), length), length};
}

// The code of any alphabet, in memory: NEON has no gather.
class LoadedCode {
public:
    explicit LoadedCode(const EncodeTable& table) : entries_(table.entries.data()) {}
    QCOMM_INLINE void look_up(const uint16x8_t (&index)[kGroups], Codewords (&out)[kGroups]) const {
        std::uint16_t at[kLanes];
        std::uint32_t found[kLanes];
        for (int g = 0; g < kGroups; ++g) vst1q_u16(at + kWidth * g, index[g]);
        for (int j = 0; j < kLanes; ++j) found[j] = entries_[at[j]];
        for (int g = 0; g < kGroups; ++g) out[g] = codewords_of(found + kWidth * g);
    }

private:
    const std::uint32_t* entries_;
};

// A code of at most 16 codewords, in registers: three lookups of bytes answer for 16 of them.
class TabledCode {
public:
    static constexpr std::size_t kSize = 16;

    // A lookup of bytes has 16 places, so code and length are cut in bytes: the code's two halves and the length.
    // Places without a codeword stay 0 and are never asked for.
    explicit TabledCode(const EncodeTable& table) {
        std::uint8_t low[kSize] = {}, high[kSize] = {}, length[kSize] = {};
        for (std::size_t s = 0; s < table.entries.size(); ++s) {
            length[s] = static_cast<std::uint8_t>(table.entries[s] >> 16);
            const std::uint32_t code = (table.entries[s] & 0xFFFFu) << (kWordBits - length[s]);
            low[s] = static_cast<std::uint8_t>(code);
            high[s] = static_cast<std::uint8_t>(code >> 8);
        }
        low_ = vld1q_u8(low), high_ = vld1q_u8(high), length_ = vld1q_u8(length);
    }
    QCOMM_INLINE void look_up(const uint16x8_t (&index)[kGroups], Codewords (&out)[kGroups]) const {
        for (int g = 0; g < kGroups; g += 2) {
            // Symbols are below 16: their low bytes are all of them.
            const uint8x16_t at = vuzp1q_u8(vreinterpretq_u8_u16(index[g]), vreinterpretq_u8_u16(index[g + 1]));
            const uint8x16_t low = vqtbl1q_u8(low_, at), high = vqtbl1q_u8(high_, at);
            const uint8x16_t length = vqtbl1q_u8(length_, at);
            out[g] = {vreinterpretq_u16_u8(vzip1q_u8(low, high)), vmovl_u8(vget_low_u8(length))};
            out[g + 1] = {vreinterpretq_u16_u8(vzip2q_u8(low, high)), vmovl_u8(vget_high_u8(length))};
        }
    }

private:
    uint8x16_t low_, high_, length_;
};

// The entries' numbers of a step's codewords: symbols, or pairs as first | second << 4.
template <bool kPairs>
QCOMM_INLINE void alphabet_index(const std::uint16_t* symbols, uint16x8_t (&index)[kGroups]) {
    for (int g = 0; g < kGroups; ++g) {
        if (!kPairs) {
            index[g] = vld1q_u16(symbols + kWidth * g);
        } else {
            const uint16x8x2_t pair = vld2q_u16(symbols + 2 * kWidth * g);
            index[g] = vorrq_u16(pair.val[0], vshlq_n_u16(pair.val[1], kPairBits));
        }
    }
}

// For each mask of 8 words, bytes that move the mask's words to the end, in order.
struct WordPermutations {
    std::uint8_t bytes[256][16];

    constexpr WordPermutations() : bytes() {
        for (int mask = 0; mask < 256; ++mask) {
            int at = 16;
            for (int j = kWidth - 1; j >= 0; --j) {
                if ((mask >> j & 1) == 0) continue;
                bytes[mask][--at] = static_cast<std::uint8_t>(2 * j + 1);
                bytes[mask][--at] = static_cast<std::uint8_t>(2 * j);
            }
        }
    }
};
alignas(16) constexpr WordPermutations kToTheEnd;

// All lanes as words, from the first word on.
class WordLanes {
public:
    // From a number of c bits to two words. The first word raises all lanes to 16 bits; here they are, whether the
    // scalar path has done so or not.
    explicit WordLanes(const EncodeLanes& lanes) {
        std::uint16_t high_of[kLanes], low_of[kLanes], held_of[kLanes];
        for (int j = 0; j < kLanes; ++j) {
            const std::uint32_t c = lanes.count[j] < kWordBits ? kWordBits : lanes.count[j];
            high_of[j] = static_cast<std::uint16_t>(lanes.bits[j] >> (c - kWordBits));
            low_of[j] = static_cast<std::uint16_t>(lanes.bits[j] << (2 * kWordBits - c));
            held_of[j] = static_cast<std::uint16_t>(c - kWordBits);
        }
        for (int g = 0; g < kGroups; ++g) {
            high_[g] = vld1q_u16(high_of + kWidth * g);
            low_[g] = vld1q_u16(low_of + kWidth * g);
            held_[g] = vld1q_u16(held_of + kWidth * g);
        }
    }

    // And back, for the start windows.
    void store(EncodeLanes& lanes) const {
        std::uint16_t high_of[kLanes], low_of[kLanes], held_of[kLanes];
        for (int g = 0; g < kGroups; ++g) {
            vst1q_u16(high_of + kWidth * g, high_[g]);
            vst1q_u16(low_of + kWidth * g, low_[g]);
            vst1q_u16(held_of + kWidth * g, held_[g]);
        }
        for (int j = 0; j < kLanes; ++j) {
            lanes.count[j] = kWordBits + held_of[j];
            const std::uint32_t both = static_cast<std::uint32_t>(high_of[j]) << kWordBits | low_of[j];
            lanes.bits[j] = both >> (kWordBits - held_of[j]);
        }
    }

    // Pushes a step's codewords. Writes words below `words`, those of higher lanes first; returns the place of the last
    // one. A codeword of no bits changes nothing.
    QCOMM_INLINE std::uint16_t* push(const Codewords (&next)[kGroups], std::uint16_t* words) {
        const uint16x8_t last = vdupq_n_u16(kWordBits - 1);
        for (int g = kGroups - 1; g >= 0; --g) {
            const uint16x8_t sum = vaddq_u16(held_[g], next[g].length);
            const uint16x8_t filled = vorrq_u16(low_[g], shift_right(next[g].code, held_[g]));
            const uint16x8_t full = vcgtq_u16(sum, last);
            // All 8 are stored: those that do not count lie in front, where the next store goes.
            const uint8x16_t order = vld1q_u8(kToTheEnd.bytes[lane_mask(full)]);
            vst1q_u16(words - kWidth, vreinterpretq_u16_u8(vqtbl1q_u8(vreinterpretq_u8_u16(high_[g]), order)));
            words -= count_lanes(full);
            high_[g] = vbslq_u16(full, filled, high_[g]);
            low_[g] = vbslq_u16(full, shift_up(next[g].code, held_[g]), filled);
            held_[g] = vandq_u16(sum, last);
        }
        return words;
    }

private:
    uint16x8_t high_[kGroups], low_[kGroups], held_[kGroups];
};

// Codes a block in two parts: scalar steps until lanes hold words, the short last ones among them; then one vector step
// after the other. A missing codeword has length 0, and is looked for once, at the end, in the shortest length of all.
template <bool kPairs, class Code>
int encode(const std::uint16_t* symbols, int n, const EncodeTable& table, const Ahead& ahead, std::uint32_t* start,
           std::uint16_t* words_end) {
    constexpr int kStepSymbols = kLanes * (kPairs ? 2 : 1);
    EncodeLanes lanes;
    begin_lanes(lanes, words_end);
    const int full_codewords = kPairs ? n / 2 : n, count = kPairs ? (n + 1) / 2 : n;
    int step = (count - 1) / kLanes;
    for (; step >= 0 && (!lanes.started || (step + 1) * kLanes > full_codewords); --step) {
        encode_step(lanes, symbols, n, kPairs, table.entries.data(), step,
                    count - step * kLanes < kLanes ? count - step * kLanes : kLanes);
    }
    if (step < 0) return finish_lanes(lanes, start, words_end);
    const Code code(table);
    WordLanes pushed(lanes);
    uint16x8_t shortest = vdupq_n_u16(kWordBits);
    std::uint16_t* words = lanes.words;
    for (; step >= 0; --step) {
        fetch(ahead, step, kStepSymbols);
        uint16x8_t index[kGroups];
        Codewords next[kGroups];
        alphabet_index<kPairs>(symbols + step * kStepSymbols, index);
        code.look_up(index, next);
        for (int g = 0; g < kGroups; ++g) shortest = vminq_u16(shortest, next[g].length);
        words = pushed.push(next, words);
    }
    pushed.store(lanes);
    lanes.words = words;
    lanes.missing |= vminvq_u16(shortest) == 0;
    return finish_lanes(lanes, start, words_end);
}

int encode_lanes(const std::uint16_t* symbols, int n, bool pairs, const EncodeTable& table, const Ahead& ahead,
                 std::uint32_t* start, std::uint16_t* words_end) {
    if (pairs) return encode<true, LoadedCode>(symbols, n, table, ahead, start, words_end);
    return table.entries.size() <= TabledCode::kSize
               ? encode<false, TabledCode>(symbols, n, table, ahead, start, words_end)
               : encode<false, LoadedCode>(symbols, n, table, ahead, start, words_end);
}
