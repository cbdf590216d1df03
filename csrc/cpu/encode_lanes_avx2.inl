// encode_lanes for AVX2. Included like kernels_loops.inl.
//
// A lane's bits, 16 to 31 of them, are two words: `high` is the one that is written next, and `low` has the others on
// top. Codewords are kept on top of 16 bits, too, so that pushing one is a shift to the right by as many bits as `low`
// holds. There is no such shift for words: a product with a power of two has both of its halves. With h bits in `low`
// and p = 2^(16 - h), a codeword c of l bits is pushed so:
//
//   filled = low | upper half of c * p         c >> h: the bits that fit into `low`
//   rest   = lower half of c * p               those that do not
//   h + l < 16:   low = filled                 `rest` is 0
//   h + l >= 16:  write high; high = filled; low = rest
//
// For h = 0 p would be 2^16, which is no word: power16() gives 0, and `none` puts c into `filled` instead. The lane is
// full then only if l is 16, and c all of the next word.

constexpr int kHalf = kLanes / 2;  // lanes in a register

// 2^(16 - s) for 0 < s <= 16; 0 for s = 0.
QCOMM_INLINE __m256i power16(__m256i s) {
    const __m256i powers = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, static_cast<char>(0x80), 0x40, 0x20, 0x10, 8, 4, 2, 1, 0, 0, 0, 0, 0, 0, 0));
    // The upper byte is powers[s], the lower one powers[s - 8]; a negative index gives 0.
    const __m256i twice = _mm256_or_si256(s, _mm256_slli_epi16(s, 8));
    return _mm256_shuffle_epi8(powers, _mm256_sub_epi8(twice, _mm256_set1_epi16(8)));
}

// A table's answer for 16 lanes.
struct Codewords {
    __m256i code, length;  // of 16 lanes; a code's first bit is the highest of 16
};

// Entries of 4 symbols, and of those 8 further on, in each register: in the order that packing undoes.
QCOMM_INLINE Codewords packed_codewords(__m256i a, __m256i b) {
    const __m256i low = _mm256_set1_epi32(0xFFFF);
    const __m256i code = _mm256_packus_epi32(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
    const __m256i length = _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
    return {_mm256_mullo_epi16(code, power16(length)), length};
}

// The code of any alphabet, in memory. Loads of their own take half as long as the gather instructions of many
// processors.
class LoadedCode {
public:
    explicit LoadedCode(const EncodeTable& table) : entries_(table.entries.data()) {}
    QCOMM_INLINE Codewords operator[](__m256i index) const {
        alignas(32) std::uint16_t at[kHalf];
        store256(at, index);
        return packed_codewords(load8(at), load8(at + 4));
    }

private:
    QCOMM_INLINE __m256i load8(const std::uint16_t* at) const {
        return _mm256_setr_epi32(entry(at[0]), entry(at[1]), entry(at[2]), entry(at[3]), entry(at[8]), entry(at[9]),
                                 entry(at[10]), entry(at[11]));
    }
    QCOMM_INLINE int entry(std::uint16_t symbol) const { return static_cast<int>(entries_[symbol]); }

    const std::uint32_t* entries_;
};

// A code of at most 16 codewords, in registers: three shuffles of bytes look up 16 of them.
class ShuffledCode {
public:
    static constexpr std::size_t kSize = 16;

    explicit ShuffledCode(const EncodeTable& table) {
        alignas(16) std::uint8_t low[kSize] = {}, high[kSize] = {}, length[kSize] = {};
        for (std::size_t s = 0; s < table.entries.size(); ++s) {
            length[s] = static_cast<std::uint8_t>(table.entries[s] >> 16);
            const std::uint32_t code = (table.entries[s] & 0xFFFFu) << (kWordBits - length[s]);
            low[s] = static_cast<std::uint8_t>(code);
            high[s] = static_cast<std::uint8_t>(code >> 8);
        }
        low_ = twice(low), high_ = twice(high), length_ = twice(length);
    }
    QCOMM_INLINE Codewords operator[](__m256i index) const {
        const __m256i at = _mm256_or_si256(index, _mm256_set1_epi16(static_cast<short>(0x8000)));  // upper byte: 0
        const __m256i high = _mm256_slli_epi16(_mm256_shuffle_epi8(high_, at), 8);
        return {_mm256_or_si256(high, _mm256_shuffle_epi8(low_, at)), _mm256_shuffle_epi8(length_, at)};
    }

private:
    static __m256i twice(const std::uint8_t* bytes) {
        return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
    }
    __m256i low_, high_, length_;
};

// Returns the entries' numbers of 16 codewords: symbols, or pairs as first | second << 4.
template <bool kPairs>
QCOMM_INLINE __m256i alphabet_index(const std::uint16_t* symbols) {
    if (!kPairs) return load256(symbols);
    const auto joined = [](__m256i two) {
        return _mm256_or_si256(_mm256_and_si256(two, _mm256_set1_epi32(15)), _mm256_srli_epi32(two, 16 - kPairBits));
    };
    const __m256i packed = _mm256_packus_epi32(joined(load256(symbols)), joined(load256(symbols + 16)));
    return _mm256_permute4x64_epi64(packed, 0xD8);
}

// For each mask of 8 words, a permutation of their bytes that moves the mask's words to the end, in order.
struct WordPermutations {
    std::uint8_t bytes[256][16];

    constexpr WordPermutations() : bytes() {
        for (int mask = 0; mask < 256; ++mask) {
            int at = 16;
            for (int j = 7; j >= 0; --j) {
                if ((mask >> j & 1) == 0) continue;
                bytes[mask][--at] = static_cast<std::uint8_t>(2 * j + 1);
                bytes[mask][--at] = static_cast<std::uint8_t>(2 * j);
            }
        }
    }
};
alignas(16) constexpr WordPermutations kToTheEnd;

// Writes those of 8 words that are in the mask below `words`; returns where the first one is.
QCOMM_INLINE std::uint16_t* put_words(__m128i of, unsigned mask, std::uint16_t* words) {
    const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(kToTheEnd.bytes[mask]));
    // All 8 are stored: those that do not count lie in front, where the next store goes.
    _mm_storeu_si128(reinterpret_cast<__m128i*>(words - 8), _mm_shuffle_epi8(of, order));
    return words - __builtin_popcount(mask);
}

// All lanes as words, from the first word on.
class WordLanes {
public:
    // From a number of c bits to two words: the highest 16 bits, and the others on top of the second word. The first
    // word raises all lanes to 16 bits; here they are, whether the scalar path has done so or not.
    explicit WordLanes(const EncodeLanes& lanes) {
        alignas(32) std::uint16_t high_of[kLanes], low_of[kLanes], held_of[kLanes];
        for (int j = 0; j < kLanes; ++j) {
            const std::uint32_t c = lanes.count[j] < kWordBits ? kWordBits : lanes.count[j];
            high_of[j] = static_cast<std::uint16_t>(lanes.bits[j] >> (c - kWordBits));
            low_of[j] = static_cast<std::uint16_t>(lanes.bits[j] << (2 * kWordBits - c));
            held_of[j] = static_cast<std::uint16_t>(c - kWordBits);
        }
        for (int h = 0; h < 2; ++h) {
            high_[h] = load256(high_of + h * kHalf);
            low_[h] = load256(low_of + h * kHalf);
            held_[h] = load256(held_of + h * kHalf);
        }
    }

    // And back, for the start windows.
    void store(EncodeLanes& lanes) const {
        alignas(32) std::uint16_t high_of[kLanes], low_of[kLanes], held_of[kLanes];
        for (int h = 0; h < 2; ++h) {
            store256(high_of + h * kHalf, high_[h]);
            store256(low_of + h * kHalf, low_[h]);
            store256(held_of + h * kHalf, held_[h]);
        }
        for (int j = 0; j < kLanes; ++j) {
            lanes.count[j] = kWordBits + held_of[j];
            const std::uint32_t both = static_cast<std::uint32_t>(high_of[j]) << kWordBits | low_of[j];
            lanes.bits[j] = both >> (kWordBits - held_of[j]);
        }
    }

    // Pushes a step's codewords: of lanes 0 to 15, and of the others. Writes words below `words`; returns the place of
    // the last one. A codeword of no bits changes nothing.
    QCOMM_INLINE std::uint16_t* push(const Codewords& first, const Codewords& second, std::uint16_t* words) {
        const __m256i last = _mm256_set1_epi16(kWordBits - 1);
        __m256i written[2], full[2];
        for (int h = 0; h < 2; ++h) {
            const Codewords& next = h == 0 ? first : second;
            const __m256i power = power16(held_[h]), sum = _mm256_add_epi16(held_[h], next.length);
            const __m256i empty = _mm256_cmpeq_epi16(held_[h], _mm256_setzero_si256());
            const __m256i none = _mm256_and_si256(empty, next.code);
            const __m256i filled =
                _mm256_or_si256(_mm256_or_si256(low_[h], none), _mm256_mulhi_epu16(next.code, power));
            full[h] = _mm256_cmpgt_epi16(sum, last);
            written[h] = high_[h];
            high_[h] = _mm256_blendv_epi8(high_[h], filled, full[h]);
            low_[h] = _mm256_blendv_epi8(filled, _mm256_mullo_epi16(next.code, power), full[h]);
            held_[h] = _mm256_and_si256(sum, last);
        }
        // Higher lanes write first. Packing interleaves halves, so the mask's bytes are of lanes 0-7, 16-23, 8-15,
        // 24-31.
        const auto masks = static_cast<unsigned>(_mm256_movemask_epi8(_mm256_packs_epi16(full[0], full[1])));
        words = put_words(_mm256_extracti128_si256(written[1], 1), masks >> 24, words);
        words = put_words(_mm256_castsi256_si128(written[1]), masks >> 8 & 0xFFu, words);
        words = put_words(_mm256_extracti128_si256(written[0], 1), masks >> 16 & 0xFFu, words);
        return put_words(_mm256_castsi256_si128(written[0]), masks & 0xFFu, words);
    }

private:
    __m256i high_[2], low_[2], held_[2];
};

// Pushes whole steps as long as no lane is full. Returns the step that fills one, or -1. At most 31 come here, since a
// codeword has a bit or more, so they are pushed lane by lane. The vector loop needs lanes of 16 bits or more.
template <bool kPairs, class Code>
int push_before_start(EncodeLanes& lanes, const std::uint16_t* symbols, const Code& code, const Ahead& ahead,
                      int step) {
    for (; step >= 0; --step) {
        fetch(ahead, step, kLanes * (kPairs ? 2 : 1));
        alignas(32) std::uint16_t codes[kLanes], lengths[kLanes];
        bool full = false;
        for (int h = 0; h < 2; ++h) {
            const int at = step * kLanes + h * kHalf;
            const Codewords next = code[alphabet_index<kPairs>(symbols + at * (kPairs ? 2 : 1))];
            store256(codes + h * kHalf, next.code), store256(lengths + h * kHalf, next.length);
        }
        for (int j = 0; j < kLanes; ++j) {
            full |= lanes.count[j] + lengths[j] >= kEmitBits;
            lanes.missing |= lengths[j] == 0;
        }
        if (full) break;
        for (int j = 0; j < kLanes; ++j) {
            const std::uint32_t right = static_cast<std::uint32_t>(codes[j]) >> (kWordBits - lengths[j]);
            lanes.bits[j] = lanes.bits[j] << lengths[j] | right;
            lanes.count[j] += lengths[j];
        }
    }
    return step;
}

// Codes a block in three parts: the last steps as long as they are short, in scalar code; steps before the first word;
// then one vector step after the other. A missing codeword has length 0, and is looked for once, at the end, in the
// shortest length of all.
template <bool kPairs, class Code>
int encode(const std::uint16_t* symbols, int n, const EncodeTable& table, const Ahead& ahead, std::uint32_t* start,
           std::uint16_t* words_end) {
    EncodeLanes lanes;
    begin_lanes(lanes, words_end);
    const int full_codewords = kPairs ? n / 2 : n, count = kPairs ? (n + 1) / 2 : n;
    int step = (count - 1) / kLanes;
    for (; step >= 0 && (step + 1) * kLanes > full_codewords; --step) {
        encode_step(lanes, symbols, n, kPairs, table.entries.data(), step,
                    count - step * kLanes < kLanes ? count - step * kLanes : kLanes);
    }

    const Code code(table);
    if (!lanes.started) step = push_before_start<kPairs>(lanes, symbols, code, ahead, step);
    if (step < 0) return finish_lanes(lanes, start, words_end);
    WordLanes pushed(lanes);
    __m256i shortest = _mm256_set1_epi16(kWordBits);
    std::uint16_t* words = lanes.words;
    for (; step >= 0; --step) {
        fetch(ahead, step, kLanes * (kPairs ? 2 : 1));
        const std::uint16_t* const at = symbols + step * kLanes * (kPairs ? 2 : 1);
        const Codewords first = code[alphabet_index<kPairs>(at)];
        const Codewords second = code[alphabet_index<kPairs>(at + kHalf * (kPairs ? 2 : 1))];
        shortest = _mm256_min_epu16(shortest, _mm256_min_epu16(first.length, second.length));
        words = pushed.push(first, second, words);
    }
    pushed.store(lanes);
    lanes.words = words;
    lanes.missing |= _mm256_movemask_epi8(_mm256_cmpeq_epi16(shortest, _mm256_setzero_si256())) != 0;
    return finish_lanes(lanes, start, words_end);
}

int encode_lanes(const std::uint16_t* symbols, int n, bool pairs, const EncodeTable& table, const Ahead& ahead,
                 std::uint32_t* start, std::uint16_t* words_end) {
    if (pairs) return encode<true, LoadedCode>(symbols, n, table, ahead, start, words_end);
    return table.entries.size() <= ShuffledCode::kSize
               ? encode<false, ShuffledCode>(symbols, n, table, ahead, start, words_end)
               : encode<false, LoadedCode>(symbols, n, table, ahead, start, words_end);
}
