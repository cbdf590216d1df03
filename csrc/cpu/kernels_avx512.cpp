// AVX-512 with VBMI2 (Ice Lake, Zen 4 and later): a step is 32 lanes in two registers, and one compress or expand instruction gathers or
// scatters a step's words.
#include <immintrin.h>

#include <cstddef>

#include "kernels.h"
#include "qcomm/format.h"

namespace qcomm {
namespace avx512 {
namespace {

#include "kernels_lanes.inl"
#include "kernels_loops.inl"

// g++ 12 makes a gather with an all-ones mask depend on its destination's old value, which halves the decoder's speed; a mask that the
// compiler cannot see through, and a zeroed destination, avoid it.
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

// EncodeTable entries of 16 codewords that begin at `symbols`.
template <bool kPairs>
QCOMM_INLINE __m512i codewords16(const std::uint16_t* symbols, const std::uint32_t* entries) {
    if (!kPairs) return gather(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(symbols))), entries, 4);
    const __m512i two = _mm512_loadu_si512(symbols);  // first | second << 16 becomes first | second << 4
    const __m512i pair = _mm512_or_si512(_mm512_and_si512(two, _mm512_set1_epi32(15)), _mm512_srli_epi32(two, 16 - kPairBits));
    return gather(pair, entries, 4);
}

template <bool kPairs>
int encode(const std::uint16_t* symbols, int n, const std::uint32_t* entries, std::uint32_t* start, std::uint16_t* words_end) {
    EncodeLanes lanes;
    begin_lanes(lanes, words_end);
    const int full_codewords = kPairs ? n / 2 : n, count = kPairs ? (n + 1) / 2 : n;
    int step = (count - 1) / kLanes;
    for (; step >= 0 && (step + 1) * kLanes > full_codewords; --step) {
        encode_step(lanes, symbols, n, kPairs, entries, step, count - step * kLanes < kLanes ? count - step * kLanes : kLanes);
    }

    const __m512i one = _mm512_set1_epi32(1), word = _mm512_set1_epi32(kWordBits), low = _mm512_set1_epi32(0xFFFF);
    const __m512i emit = _mm512_set1_epi32(kEmitBits);
    __m512i x0 = _mm512_loadu_si512(lanes.bits), x1 = _mm512_loadu_si512(lanes.bits + 16);
    __m512i c0 = _mm512_loadu_si512(lanes.count), c1 = _mm512_loadu_si512(lanes.count + 16);
    std::uint16_t* words = lanes.words;
    bool started = lanes.started;
    __mmask16 missing = 0;
    for (; step >= 0; --step) {
        const std::uint16_t* at = symbols + step * kLanes * (kPairs ? 2 : 1);
        const __m512i e0 = codewords16<kPairs>(at, entries), e1 = codewords16<kPairs>(at + (kPairs ? 32 : 16), entries);
        missing = static_cast<__mmask16>(missing | _mm512_testn_epi32_mask(e0, e0) | _mm512_testn_epi32_mask(e1, e1));
        const __m512i l0 = _mm512_srli_epi32(e0, 16), l1 = _mm512_srli_epi32(e1, 16);
        __mmask16 m0 = _mm512_cmpge_epu32_mask(_mm512_add_epi32(c0, l0), emit), m1 = _mm512_cmpge_epu32_mask(_mm512_add_epi32(c1, l1), emit);
        if (__builtin_expect(!started && (m0 | m1) != 0, 0)) {
            started = true;  // raising a lane to 16 bits makes no other lane full: codewords have at most 15
            c0 = _mm512_max_epu32(c0, word);
            c1 = _mm512_max_epu32(c1, word);
        }
        const __m256i w0 = _mm512_cvtepi32_epi16(_mm512_srlv_epi32(x0, _mm512_sub_epi32(c0, word)));
        const __m256i w1 = _mm512_cvtepi32_epi16(_mm512_srlv_epi32(x1, _mm512_sub_epi32(c1, word)));
        const __mmask32 m = _mm512_kunpackw(m1, m0);
        const auto written = static_cast<unsigned>(__builtin_popcount(m));
        words -= written;
        _mm512_mask_storeu_epi16(words, _bzhi_u32(0xFFFFFFFFu, written),
                                 _mm512_maskz_compress_epi16(m, _mm512_inserti64x4(_mm512_castsi256_si512(w0), w1, 1)));
        c0 = _mm512_mask_sub_epi32(c0, m0, c0, word);
        c1 = _mm512_mask_sub_epi32(c1, m1, c1, word);
        x0 = _mm512_and_si512(x0, _mm512_sub_epi32(_mm512_sllv_epi32(one, c0), one));
        x1 = _mm512_and_si512(x1, _mm512_sub_epi32(_mm512_sllv_epi32(one, c1), one));
        x0 = _mm512_or_si512(_mm512_sllv_epi32(x0, l0), _mm512_and_si512(e0, low));
        x1 = _mm512_or_si512(_mm512_sllv_epi32(x1, l1), _mm512_and_si512(e1, low));
        c0 = _mm512_add_epi32(c0, l0);
        c1 = _mm512_add_epi32(c1, l1);
    }
    _mm512_storeu_si512(lanes.bits, x0);
    _mm512_storeu_si512(lanes.bits + 16, x1);
    _mm512_storeu_si512(lanes.count, c0);
    _mm512_storeu_si512(lanes.count + 16, c1);
    lanes.words = words;
    lanes.missing |= missing != 0;
    return finish_lanes(lanes, start, words_end);
}

int encode_lanes(const std::uint16_t* symbols, int n, bool pairs, const std::uint32_t* entries, std::uint32_t* start, std::uint16_t* words_end) {
    return pairs ? encode<true>(symbols, n, entries, start, words_end) : encode<false>(symbols, n, entries, start, words_end);
}

bool decode_lanes(const std::uint8_t* start, const std::uint8_t* words, std::int64_t word_count, const DecodeTable& table, int count,
                  std::uint16_t* symbols) {
    DecodeLanes lanes;
    if (!begin_lanes(lanes, start, words, word_count)) return false;
    const std::uint16_t* entries = table.entries.data();
    const __m512i peek = _mm512_set1_epi32(static_cast<int>(table.mask)), symbol = _mm512_set1_epi32(0xFFF);
    const __m512i word = _mm512_set1_epi32(kWordBits), nibble = _mm512_set1_epi32(15);
    __m512i x0 = _mm512_loadu_si512(lanes.bits), x1 = _mm512_loadu_si512(lanes.bits + 16);
    __m512i c0 = _mm512_loadu_si512(lanes.count), c1 = _mm512_loadu_si512(lanes.count + 16);
    __m512i least = _mm512_setzero_si512();
    int begin = 0;
    for (; begin + kLanes <= count; begin += kLanes) {
        const __m512i e0 = gather(_mm512_and_si512(x0, peek), entries, 2), e1 = gather(_mm512_and_si512(x1, peek), entries, 2);
        // An entry's upper half is its neighbour in the table: masked away below.
        const __m512i l0 = _mm512_and_si512(_mm512_srli_epi32(e0, 12), nibble), l1 = _mm512_and_si512(_mm512_srli_epi32(e1, 12), nibble);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(symbols + begin), _mm512_cvtepi32_epi16(_mm512_and_si512(e0, symbol)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(symbols + begin + 16), _mm512_cvtepi32_epi16(_mm512_and_si512(e1, symbol)));
        x0 = _mm512_srlv_epi32(x0, l0);
        x1 = _mm512_srlv_epi32(x1, l1);
        c0 = _mm512_sub_epi32(c0, l0);
        c1 = _mm512_sub_epi32(c1, l1);
        least = _mm512_min_epi32(least, _mm512_min_epi32(c0, c1));
        __mmask32 need = _mm512_kunpackw(_mm512_cmplt_epi32_mask(c1, word), _mm512_cmplt_epi32_mask(c0, word));
        __mmask32 readable = 0xFFFFFFFFu;
        if (__builtin_expect(lanes.left < kLanes, 0)) {
            readable = _bzhi_u32(0xFFFFFFFFu, static_cast<unsigned>(lanes.left));
            need = _pdep_u32(readable, need);  // the first lanes that still get a word
        }
        const __m512i taken = _mm512_maskz_expand_epi16(need, _mm512_maskz_loadu_epi16(readable, lanes.words));
        const __m512i w0 = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(taken)), w1 = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(taken, 1));
        x0 = _mm512_or_si512(x0, _mm512_sllv_epi32(w0, c0));
        x1 = _mm512_or_si512(x1, _mm512_sllv_epi32(w1, c1));
        c0 = _mm512_mask_add_epi32(c0, static_cast<__mmask16>(need), c0, word);
        c1 = _mm512_mask_add_epi32(c1, static_cast<__mmask16>(need >> 16), c1, word);
        const int used = __builtin_popcount(need);
        lanes.words += 2 * used;
        lanes.left -= used;
    }
    _mm512_storeu_si512(lanes.bits, x0);
    _mm512_storeu_si512(lanes.bits + 16, x1);
    _mm512_storeu_si512(lanes.count, c0);
    _mm512_storeu_si512(lanes.count + 16, c1);
    lanes.least = _mm512_reduce_min_epi32(least);
    if (begin < count) decode_step(lanes, entries, table.mask, count - begin, symbols + begin);
    return end_lanes(lanes);
}

}  // namespace
}  // namespace avx512

const Kernels kAvx512Kernels = {"avx512",
                                avx512::load,
                                avx512::measure,
                                avx512::quantize,
                                avx512::update_residual,
                                avx512::dequantize,
                                avx512::encode_lanes,
                                avx512::decode_lanes,
                                avx512::checksum};

}  // namespace qcomm
