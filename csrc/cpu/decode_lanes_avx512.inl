// decode_lanes for AVX-512. Included like kernels_loops.inl.
//
// A step looks up 32 codewords without memory: a gather from a table of all windows would take most of the time. It
// computes a codeword's length and its rank in canonical order instead (RankTable in huffman.h), which is a table small
// enough for registers:
//
//   window   the lane's next 16 bits, the first one highest
//   length   by the window's first 7 bits, then by one comparison for each longer length
//   rank     (window >> 16 - length) + offset of the length
//   symbol   of the rank
//
// Two blocks are decoded together, since each of these waits for the one before.

// The symbols of 32 codewords, and 16 minus their lengths: lengths as the shifts below need them.
struct Decoded {
    __m512i symbol, spare;
};

// A code by rank. The window's first 7 bits tell the length of a codeword of at most 7 bits; the others are told apart
// by comparisons. Then the rank is looked up, in registers where the table has it. kHasAll: it has all symbols.
template <class Table, int kLongest, bool kHasAll>
class RankedCode {
public:
    static constexpr int kRanks = Table::kSize;

    explicit RankedCode(const RankTable& ranks)
        : frequent_(ranks.symbols.data()), spare_(spare_of_first_bits(ranks).of), symbols_(ranks.symbols.data()) {
        alignas(64) std::uint16_t offset_of_spare[kLanes] = {};
        for (int l = 1; l <= kLongest; ++l) offset_of_spare[kWindowBits - l] = ranks.offset[l];
        offset_ = _mm512_load_si512(offset_of_spare);
        for (int i = 0; i < kComparisons; ++i) {
            const std::uint32_t end = ranks.end[kFirstBits + 1 + i];  // 0: no codeword is as short
            last_window_[i] = _mm512_set1_epi16(static_cast<short>(end == 0 ? 0xFFFF : end - 1));
        }
    }

    QCOMM_INLINE Decoded operator[](__m512i bits) const {
        // The first bit highest, as canonical order compares windows: bits reversed in each byte, then bytes exchanged.
        const __m512i reversed = _mm512_gf2p8affine_epi64_epi8(bits, _mm512_set1_epi64(0x8040201008040201), 0);
        const __m512i window = _mm512_shldi_epi16(reversed, reversed, 8), one = _mm512_set1_epi16(1);
        __m512i spare = spare_[_mm512_srli_epi16(window, kWindowBits - kFirstBits)];
        // A window behind all codewords of a length is of a longer one.
        for (const __m512i& last : last_window_)
            spare = _mm512_mask_sub_epi16(spare, _mm512_cmpgt_epu16_mask(window, last), spare, one);
        const __m512i rank =
            _mm512_add_epi16(_mm512_srlv_epi16(window, spare), _mm512_permutexvar_epi16(spare, offset_));
        __m512i symbol = frequent_[rank];
        if (!kHasAll && __builtin_expect(_mm512_cmpge_epu16_mask(rank, _mm512_set1_epi16(kRanks)) != 0, 0))
            symbol = low_words(gather(lower_half(rank), symbols_, 2), gather(upper_half(rank), symbols_, 2));
        return {symbol, spare};
    }

private:
    static constexpr int kFirstBits = 7, kComparisons = kLongest - kFirstBits - 1;

    struct FirstBits {
        std::uint16_t of[1 << kFirstBits];
    };
    // For each value of the first bits, 16 minus the length. For a longer codeword it is that of the shortest such one:
    // the comparisons correct it.
    static FirstBits spare_of_first_bits(const RankTable& ranks) {
        FirstBits spare;
        for (std::uint32_t first = 0; first < 1u << kFirstBits; ++first) {
            int length = 1;
            while (ranks.end[length] == 0 ||
                   (length <= kFirstBits && first << (kWindowBits - kFirstBits) >= ranks.end[length]))
                ++length;
            spare.of[first] = static_cast<std::uint16_t>(kWindowBits - length);
        }
        return spare;
    }

    Table frequent_;
    ByteTable<1> spare_;
    const std::uint16_t* symbols_;
    __m512i offset_;
    __m512i last_window_[kComparisons];
};

constexpr int kShort = 12, kLong = kMaxCodeLength;  // kLongest
using SmallCode = RankedCode<ByteTable<1>, kShort, true>;
using LargeCode = RankedCode<ByteTable<2>, kShort, true>;
using AnyCode = RankedCode<RegisterTable<kLarge>, kLong, false>;

// Calls f(code) with the fastest one for a code; `symbol_bits`: of a symbol, or of two that are coded together. Tables
// of bytes hold symbols of 8 bits; codes with longer words need more comparisons.
template <class F>
void with_code(const RankTable& ranks, int symbol_bits, F f) {
    if (ranks.longest > kShort || ranks.count > LargeCode::kRanks || symbol_bits > 8) {
        f(AnyCode(ranks));
    } else if (ranks.count > SmallCode::kRanks) {
        f(LargeCode(ranks));
    } else {
        f(SmallCode(ranks));
    }
}

// One block's decoder, its lanes in registers: the next 16 bits of each in `low`, the others in `high`, their number in
// `held`. `least` is as in DecodeLanes, but 16 more.
template <bool kPairs, class Sink>
struct Decoder {
    static constexpr int kStepSymbols = kLanes * (kPairs ? 2 : 1);

    __m512i low, high, held, least;
    const std::uint8_t *words, *words_end;
    std::uint16_t* symbols;
    Sink sink;
    int steps_left;

    QCOMM_INLINE bool begin(const CodedBlock& block, const Sink& to) {
        DecodeLanes lanes;
        if (!begin_lanes(lanes, block)) return false;
        const __m512i a = _mm512_loadu_si512(lanes.bits), b = _mm512_loadu_si512(lanes.bits + 16);
        low = low_words(a, b);
        high = high_words(a, b);
        held = low_words(_mm512_loadu_si512(lanes.count), _mm512_loadu_si512(lanes.count + 16));
        least = _mm512_set1_epi16(kWordBits);
        words = lanes.words;
        words_end = words + 2 * lanes.left;
        symbols = block.symbols;
        sink = to;
        steps_left = block.count / kStepSymbols;
        return true;
    }

    // Whether the next step is a whole one that cannot run out of words.
    QCOMM_INLINE bool runs() const { return steps_left > 0 && words_end - words >= 2 * kLanes; }

    // Decodes a step of whole codewords. kLast: fewer words may be left than lanes ask for.
    template <bool kLast, class Code>
    QCOMM_INLINE void step(const Code& code) {
        const __m512i word = _mm512_set1_epi16(kWordBits), zero = _mm512_setzero_si512();
        const Decoded next = code[low];
        if (kPairs) {
            put(split_pairs(lower_half(next.symbol)));
            put(split_pairs(upper_half(next.symbol)));
        } else {
            put(next.symbol);
        }
        --steps_left;
        // A shift to the right by a codeword's length is one to the left by 16 minus it, a word higher.
        low = _mm512_shldv_epi16(high, low, next.spare);
        high = _mm512_shldv_epi16(zero, high, next.spare);
        held = _mm512_add_epi16(held, next.spare);  // 16 too many, as after reading a word
        least = _mm512_min_epi16(least, held);
        __mmask32 need = _mm512_cmplt_epi16_mask(held, _mm512_set1_epi16(2 * kWordBits));
        __m512i loaded;
        if (kLast) {
            const __mmask32 readable = _bzhi_u32(0xFFFFFFFFu, static_cast<unsigned>((words_end - words) / 2));
            need = _pdep_u32(readable, need);  // the first lanes that still get a word
            loaded = _mm512_maskz_loadu_epi16(readable, words);
        } else {
            loaded = _mm512_loadu_si512(words);
        }
        words += 2 * __builtin_popcount(need);
        const __m512i taken = _mm512_maskz_expand_epi16(need, loaded);  // shifts are modulo 16
        low = _mm512_or_si512(low, _mm512_shldv_epi16(taken, zero, held));
        high = _mm512_or_si512(high, _mm512_shldv_epi16(zero, taken, held));
        held = _mm512_mask_sub_epi16(held, static_cast<__mmask32>(~need), held, word);
    }

    static QCOMM_INLINE __m512i split_pairs(__m512i pairs) {
        const __m512i both = _mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 16 - kPairBits));
        return _mm512_and_si512(both, _mm512_set1_epi16(15));
    }
    QCOMM_INLINE void put(__m512i next_symbols) {
        _mm512_storeu_si512(symbols, next_symbols);
        symbols += kLanes;
        sink.put(next_symbols);
    }

    // The last whole steps; then the lanes go to memory, and scalar code decodes the rest.
    template <class Code>
    QCOMM_INLINE void finish(CodedBlock& block, const DecodeTable& table, const Code& code) {
        while (steps_left > 0) step<true>(code);
        DecodeLanes lanes;
        alignas(64) std::uint16_t low_of[kLanes], high_of[kLanes];
        alignas(64) std::int16_t held_of[kLanes], least_of[kLanes];
        _mm512_store_si512(low_of, low);
        _mm512_store_si512(high_of, high);
        _mm512_store_si512(held_of, held);
        _mm512_store_si512(least_of, least);
        lanes.least = 0;
        for (int j = 0; j < kLanes; ++j) {
            lanes.bits[j] = static_cast<std::uint32_t>(high_of[j]) << kWordBits | low_of[j];
            lanes.count[j] = held_of[j];
            const std::int32_t fewest = least_of[j] - static_cast<std::int32_t>(kWordBits);
            lanes.least = fewest < lanes.least ? fewest : lanes.least;
        }
        lanes.words = words;
        lanes.left = (words_end - words) / 2;
        const int done = static_cast<int>(symbols - block.symbols);
        decode_rest(lanes, block, kPairs, table, done);
        block.whole = end_lanes(lanes);
        sink.put_rest(symbols, block.count - done);
    }
};

// Decodes one or two blocks. While both have words for whole steps they take turns. Decoders are copied to locals, so
// that compilers keep them in registers.
template <bool kPairs, class Code, class MakeSink>
void decode(CodedBlock* blocks, int count, const DecodeTable& table, const Code& code, MakeSink make_sink) {
    using Sink = decltype(make_sink(blocks[0]));
    Decoder<kPairs, Sink> decoders[2];
    for (int i = 0; i < count; ++i) blocks[i].whole = decoders[i].begin(blocks[i], make_sink(blocks[i]));
    if (count == 2 && blocks[0].whole && blocks[1].whole) {
        Decoder<kPairs, Sink> a = decoders[0], b = decoders[1];
        while (a.runs() && b.runs()) {
            a.template step<false>(code);
            b.template step<false>(code);
        }
        decoders[0] = a;
        decoders[1] = b;
    }
    for (int i = 0; i < count; ++i) {
        if (!blocks[i].whole) continue;
        Decoder<kPairs, Sink> last = decoders[i];
        while (last.runs()) last.template step<false>(code);
        last.finish(blocks[i], table, code);
    }
}

// With float32 values made in registers, stored or added.
template <bool kPairs, class Code, class Values>
void decode_values(CodedBlock* blocks, int count, const LaneDecoding& how, const Code& code, const Values& values) {
    if (how.accumulate) {
        decode<kPairs>(blocks, count, *how.table, code, [&](const CodedBlock& block) {
            return FloatSink<Values, true>{&values, &how, static_cast<float*>(block.values)};
        });
    } else {
        decode<kPairs>(blocks, count, *how.table, code, [&](const CodedBlock& block) {
            return FloatSink<Values, false>{&values, &how, static_cast<float*>(block.values)};
        });
    }
}

// Picks the sink. Only float32, the dtype that collectives send, has values made in registers.
template <bool kPairs, class Code>
void decode_with(CodedBlock* blocks, int count, const LaneDecoding& how, const Code& code) {
    if (how.dtype != DType::kFloat32 || blocks[0].values == nullptr) {
        decode<kPairs>(blocks, count, *how.table, code, [](const CodedBlock&) { return NoSink{}; });
        for (int i = 0; i < count; ++i) dequantize_block(blocks[i], how);
        return;
    }
    if constexpr (!kPairs) {  // range grids have no pairs
        const RangeQuantizer grid = range_quantizer(how.quantizer);
        if (is_range(how.quantizer.grid)) {
            if constexpr (std::is_same_v<Code, SmallCode>) {
                if (1 << how.quantizer.num_bits <= TabledValues::kMaxSymbols)
                    return decode_values<kPairs>(blocks, count, how, code, TabledValues(grid));
            }
            return decode_values<kPairs>(blocks, count, how, code, RangeValues(grid));
        }
    }
    decode_values<kPairs>(blocks, count, how, code,
                          SigmaValues(sigma_quantizer<Traits<DType::kFloat32>>(how.quantizer)));
}

void decode_lanes(CodedBlock* blocks, int count, const LaneDecoding& how) {
    with_code(how.table->ranks, how.pairs ? 2 * kPairBits : how.quantizer.num_bits, [&](const auto& code) {
        how.pairs ? decode_with<true>(blocks, count, how, code) : decode_with<false>(blocks, count, how, code);
    });
}
