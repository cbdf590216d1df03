// Tables in AVX-512 registers, and halves of 32-bit lanes. Included like kernels_loops.inl.

// g++ 12 makes a gather with an all-ones mask depend on its destination's old value, which halves the decoder's speed;
// a mask that the compiler cannot see through, and a zeroed destination, avoid it.
QCOMM_INLINE __mmask16 opaque_ones() {
    __mmask16 mask = 0xFFFF;
    __asm__("" : "+Yk"(mask));
    return mask;
}
QCOMM_INLINE __m512i gather(__m512i index, const void* table, const int scale) {
    // `scale` must be an immediate.
    return scale == 2 ? _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), opaque_ones(), index, table, 2)
                      : _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), opaque_ones(), index, table, 4);
}

// Below, a lane's 32 bits are two words in registers of their own, so that all 32 lanes advance with one instruction.

// Every other word of two registers: `first` is 0 for the low words of 32-bit lanes, 1 for the high ones.
struct WordIndices {
    std::uint16_t of[kLanes];
    constexpr explicit WordIndices(int first) : of() {
        for (int i = 0; i < kLanes; ++i) of[i] = static_cast<std::uint16_t>(first + 2 * i);
    }
};
alignas(64) constexpr WordIndices kLowWords(0), kHighWords(1);

// a and b hold 16 lanes of 32 bits each; the results 32 lanes of 16. lower_half() and upper_half() widen words again.
QCOMM_INLINE __m512i low_words(__m512i a, __m512i b) {
    return _mm512_permutex2var_epi16(a, _mm512_load_si512(kLowWords.of), b);
}
QCOMM_INLINE __m512i high_words(__m512i a, __m512i b) {
    return _mm512_permutex2var_epi16(a, _mm512_load_si512(kHighWords.of), b);
}
QCOMM_INLINE __m512i lower_half(__m512i words) { return _mm512_cvtepu16_epi32(_mm512_castsi512_si256(words)); }
QCOMM_INLINE __m512i upper_half(__m512i words) { return _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(words, 1)); }

// 64 * kParts words, looked up without touching memory, on which a gather spends its time.
template <int kParts>
struct RegisterTable {
    static constexpr int kSize = 64 * kParts;
    __m512i words[2 * kParts];

    QCOMM_INLINE explicit RegisterTable(const std::uint16_t* table) {
        for (int i = 0; i < 2 * kParts; ++i) words[i] = _mm512_loadu_si512(table + i * kLanes);
    }
    // 64 words of the table: one instruction picks from two registers.
    QCOMM_INLINE __m512i part(int i, __m512i index) const {
        return _mm512_permutex2var_epi16(words[2 * i], index, words[2 * i + 1]);
    }
    QCOMM_INLINE __m512i operator[](__m512i index) const {
        if (kParts == 1) return part(0, index);
        const __mmask32 bit6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64)),
                        bit7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
        return _mm512_mask_blend_epi16(bit7, _mm512_mask_blend_epi16(bit6, part(0, index), part(1, index)),
                                       _mm512_mask_blend_epi16(bit6, part(2, index), part(3, index)));
    }
};
constexpr int kSmall = 1, kLarge = 4;  // kParts of tables of 64 and of 256 words

// 128 * kParts words below 256, kept as bytes: fewer registers and instructions than a table of words takes. The
// index's lowest byte picks a byte, and a mask clears the other half of each word.
template <int kParts>
struct ByteTable {
    static constexpr int kSize = 128 * kParts;
    __m512i bytes[2 * kParts];

    QCOMM_INLINE explicit ByteTable(const std::uint16_t* table) {
        for (int i = 0; i < 2 * kParts; ++i) bytes[i] = low_bytes(table + 64 * i);
    }
    // The low bytes of 64 words.
    static QCOMM_INLINE __m512i low_bytes(const std::uint16_t* words) {
        const __m256i first = _mm512_cvtepi16_epi8(_mm512_loadu_si512(words)),
                      second = _mm512_cvtepi16_epi8(_mm512_loadu_si512(words + kLanes));
        return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
    }
    QCOMM_INLINE __m512i operator[](__m512i index) const {
        constexpr __mmask64 kLowBytes = 0x5555555555555555;
        const __m512i first = _mm512_maskz_permutex2var_epi8(kLowBytes, bytes[0], index, bytes[1]);
        if (kParts == 1) return first;
        const __mmask32 bit7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
        return _mm512_mask_blend_epi16(
            bit7, first,
            _mm512_maskz_permutex2var_epi8(kLowBytes, bytes[2 * kParts - 2], index, bytes[2 * kParts - 1]));
    }
};
