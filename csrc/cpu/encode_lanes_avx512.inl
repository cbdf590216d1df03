// encode_lanes for AVX-512. Included like kernels_loops.inl.
//
// A lane's bits are a word `low` and a word `high` in registers of 32 words each. Pushing a codeword is a funnel shift
// of both to the left, and the 16 highest bits of a full lane are one of both to the right: instructions of VBMI2. The
// words of a step are compressed to its full lanes and stored in front of the others, lane 0 first.

// A table's answer for 32 lanes.
struct Codewords {
    __m512i code, length;  // of 32 lanes; above a code's bits there are zeros
};

// The code of any alphabet, in memory: two gathers a step.
class WideCode {
public:
    QCOMM_INLINE explicit WideCode(const EncodeTable& table) : entries_(table.entries.data()) {}
    QCOMM_INLINE Codewords operator[](__m512i index) const {
        const __m512i a = gather(lower_half(index), entries_, 4), b = gather(upper_half(index), entries_, 4);
        return {low_words(a, b), high_words(a, b)};
    }

private:
    const std::uint32_t* entries_;
};

// The code's NarrowTable in registers; a step with any symbol outside takes the wide way. kHasAll: there is none
// outside, and the alphabet begins at 0.
template <int kParts, bool kHasAll>
class NarrowCode {
public:
    QCOMM_INLINE explicit NarrowCode(const EncodeTable& table)
        : table_(table.narrow.entries),
          first_(_mm512_set1_epi16(static_cast<short>(table.narrow.first))),
          wide_(table) {}

    QCOMM_INLINE Codewords operator[](__m512i index) const {
        const __m512i place = kHasAll ? index : _mm512_sub_epi16(index, first_);
        const __m512i entry = table_[place];
        if (!kHasAll) {
            const __mmask32 others = _mm512_testn_epi16_mask(entry, entry) |
                                     _mm512_cmpge_epu16_mask(place, _mm512_set1_epi16(NarrowTable::kSymbols));
            if (__builtin_expect(others != 0, 0)) return wide_[index];
        }
        return {_mm512_and_si512(entry, _mm512_set1_epi16((1 << NarrowTable::kBits) - 1)),
                _mm512_srli_epi16(entry, NarrowTable::kBits)};
    }

private:
    RegisterTable<kParts> table_;
    __m512i first_;
    WideCode wide_;
};

// Returns the entries' numbers of 32 codewords: symbols, or pairs as first | second << 4.
template <bool kPairs>
QCOMM_INLINE __m512i alphabet_index(const std::uint16_t* symbols) {
    const __m512i a = _mm512_loadu_si512(symbols);
    if (!kPairs) return a;
    const __m512i b = _mm512_loadu_si512(symbols + kLanes);
    return _mm512_or_si512(low_words(a, b), _mm512_slli_epi16(high_words(a, b), kPairBits));
}

// Codes a block: the last steps as long as they are short, in scalar code, then one vector step after the other. Unlike
// the AVX2 version it needs no loop of its own before the first word: its shifts are right for any number of bits.
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
    const __m512i word = _mm512_set1_epi16(kWordBits), emit = _mm512_set1_epi16(kEmitBits);
    const __m512i bits[] = {_mm512_loadu_si512(lanes.bits), _mm512_loadu_si512(lanes.bits + 16)};
    // Above a lane's count there are bits that have already been written: they are masked away at the end.
    __m512i low = low_words(bits[0], bits[1]), high = high_words(bits[0], bits[1]);
    __m512i held = low_words(_mm512_loadu_si512(lanes.count), _mm512_loadu_si512(lanes.count + 16));
    __m512i shortest = word;
    std::uint16_t* words = lanes.words;
    bool started = lanes.started;
    for (; step >= 0; --step) {
        fetch(ahead, step, kLanes * (kPairs ? 2 : 1));
        const Codewords next = code[alphabet_index<kPairs>(symbols + step * kLanes * (kPairs ? 2 : 1))];
        shortest = _mm512_min_epu16(shortest, next.length);
        __m512i sum = _mm512_add_epi16(held, next.length);
        const __mmask32 full = _mm512_cmpge_epu16_mask(sum, emit);
        if (__builtin_expect(!started && full != 0, 0)) {
            started = true;  // raising a lane to 16 bits makes no other lane full: codewords have at most 15
            held = _mm512_max_epu16(held, word);
            sum = _mm512_add_epi16(held, next.length);
        }
        // A full lane holds 16 or more bits and gives the highest 16; the shift is modulo 16.
        const __m512i highest = _mm512_shrdv_epi16(low, high, held);
        const auto written = static_cast<unsigned>(__builtin_popcount(full));
        words -= written;
        _mm512_mask_storeu_epi16(words, _bzhi_u32(0xFFFFFFFFu, written), _mm512_maskz_compress_epi16(full, highest));
        held = _mm512_mask_sub_epi16(sum, full, sum, word);
        high = _mm512_shldv_epi16(high, low, next.length);
        low = _mm512_or_si512(_mm512_sllv_epi16(low, next.length), next.code);
    }
    alignas(64) std::uint16_t low_of[kLanes], high_of[kLanes], held_of[kLanes];
    _mm512_store_si512(low_of, low);
    _mm512_store_si512(high_of, high);
    _mm512_store_si512(held_of, held);
    for (int j = 0; j < kLanes; ++j) {
        lanes.count[j] = held_of[j];
        lanes.bits[j] = (static_cast<std::uint32_t>(high_of[j]) << kWordBits | low_of[j]) & ((1u << held_of[j]) - 1u);
    }
    lanes.words = words;
    lanes.missing |= _mm512_test_epi16_mask(shortest, shortest) != 0xFFFFFFFFu;
    return finish_lanes(lanes, start, words_end);
}

// Picks the smallest table that holds the code: each size is a loop of its own, without a branch inside.
template <bool kPairs>
int encode(const std::uint16_t* symbols, int n, const EncodeTable& table, const Ahead& ahead, std::uint32_t* start,
           std::uint16_t* words_end) {
    const bool has_all = table.narrow.has_all && table.entries.size() <= NarrowTable::kSymbols;
    if (!has_all) return encode<kPairs, NarrowCode<kLarge, false>>(symbols, n, table, ahead, start, words_end);
    if (table.entries.size() <= RegisterTable<kSmall>::kSize)
        return encode<kPairs, NarrowCode<kSmall, true>>(symbols, n, table, ahead, start, words_end);
    return encode<kPairs, NarrowCode<kLarge, true>>(symbols, n, table, ahead, start, words_end);
}

int encode_lanes(const std::uint16_t* symbols, int n, bool pairs, const EncodeTable& table, const Ahead& ahead,
                 std::uint32_t* start, std::uint16_t* words_end) {
    return pairs ? encode<true>(symbols, n, table, ahead, start, words_end)
                 : encode<false>(symbols, n, table, ahead, start, words_end);
}
