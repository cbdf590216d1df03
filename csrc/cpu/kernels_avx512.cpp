// AVX-512 with VBMI2 (Ice Lake, Zen 4 and later): a step is 32 lanes in two registers, and one compress or expand
// instruction gathers or scatters a step's words.
#include <immintrin.h>

#include <cstddef>

#include "kernels.h"
#include "qcomm/format.h"

namespace qcomm {
namespace avx512 {
namespace {

#include "kernels_lanes.inl"
#include "kernels_loops.inl"

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

// EncodeTable entries of 16 codewords that begin at `symbols`.
template <bool kPairs>
QCOMM_INLINE __m512i codewords16(const std::uint16_t* symbols, const std::uint32_t* entries) {
    if (!kPairs)
        return gather(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(symbols))), entries, 4);
    const __m512i two = _mm512_loadu_si512(symbols);  // first | second << 16 becomes first | second << 4
    const __m512i pair =
        _mm512_or_si512(_mm512_and_si512(two, _mm512_set1_epi32(15)), _mm512_srli_epi32(two, 16 - kPairBits));
    return gather(pair, entries, 4);
}

template <bool kPairs>
int encode(const std::uint16_t* symbols, int n, const std::uint32_t* entries, std::uint32_t* start,
           std::uint16_t* words_end) {
    EncodeLanes lanes;
    begin_lanes(lanes, words_end);
    const int full_codewords = kPairs ? n / 2 : n, count = kPairs ? (n + 1) / 2 : n;
    int step = (count - 1) / kLanes;
    for (; step >= 0 && (step + 1) * kLanes > full_codewords; --step) {
        encode_step(lanes, symbols, n, kPairs, entries, step,
                    count - step * kLanes < kLanes ? count - step * kLanes : kLanes);
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
        __mmask16 m0 = _mm512_cmpge_epu32_mask(_mm512_add_epi32(c0, l0), emit),
                  m1 = _mm512_cmpge_epu32_mask(_mm512_add_epi32(c1, l1), emit);
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

int encode_lanes(const std::uint16_t* symbols, int n, bool pairs, const std::uint32_t* entries, std::uint32_t* start,
                 std::uint16_t* words_end) {
    return pairs ? encode<true>(symbols, n, entries, start, words_end)
                 : encode<false>(symbols, n, entries, start, words_end);
}

// One block's decoder, its lanes in registers.
struct Decoder {
    __m512i x0, x1, c0, c1, least;
    DecodeLanes lanes;
    std::uint16_t* symbols;

    QCOMM_INLINE bool begin(const CodedBlock& block) {
        if (!begin_lanes(lanes, block)) return false;
        x0 = _mm512_loadu_si512(lanes.bits);
        x1 = _mm512_loadu_si512(lanes.bits + 16);
        c0 = _mm512_loadu_si512(lanes.count);
        c1 = _mm512_loadu_si512(lanes.count + 16);
        least = _mm512_setzero_si512();
        symbols = block.symbols;
        return true;
    }

    QCOMM_INLINE void step(const std::uint16_t* entries, __m512i peek) {
        const __m512i symbol = _mm512_set1_epi32(0xFFF), word = _mm512_set1_epi32(kWordBits),
                      nibble = _mm512_set1_epi32(15);
        const __m512i e0 = gather(_mm512_and_si512(x0, peek), entries, 2),
                      e1 = gather(_mm512_and_si512(x1, peek), entries, 2);
        // An entry's upper half is its neighbour in the table: masked away.
        const __m512i l0 = _mm512_and_si512(_mm512_srli_epi32(e0, 12), nibble),
                      l1 = _mm512_and_si512(_mm512_srli_epi32(e1, 12), nibble);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(symbols), _mm512_cvtepi32_epi16(_mm512_and_si512(e0, symbol)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(symbols + 16),
                            _mm512_cvtepi32_epi16(_mm512_and_si512(e1, symbol)));
        symbols += kLanes;
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
        const __m512i w0 = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(taken)),
                      w1 = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(taken, 1));
        x0 = _mm512_or_si512(x0, _mm512_sllv_epi32(w0, c0));
        x1 = _mm512_or_si512(x1, _mm512_sllv_epi32(w1, c1));
        c0 = _mm512_mask_add_epi32(c0, static_cast<__mmask16>(need), c0, word);
        c1 = _mm512_mask_add_epi32(c1, static_cast<__mmask16>(need >> 16), c1, word);
        const int used = __builtin_popcount(need);
        lanes.words += 2 * used;
        lanes.left -= used;
    }

    // After `steps` steps: the rest of them, and what is no whole step.
    QCOMM_INLINE void finish(CodedBlock& block, const DecodeTable& table, __m512i peek, int steps) {
        for (; steps < block.count / kLanes; ++steps) step(table.entries.data(), peek);
        _mm512_storeu_si512(lanes.bits, x0);
        _mm512_storeu_si512(lanes.bits + 16, x1);
        _mm512_storeu_si512(lanes.count, c0);
        _mm512_storeu_si512(lanes.count + 16, c1);
        lanes.least = _mm512_reduce_min_epi32(least);
        decode_rest(lanes, block, table.entries.data(), table.mask, steps * kLanes);
        block.whole = end_lanes(lanes);
    }
};

void decode_one(CodedBlock& block, const DecodeTable& table) {
    Decoder decoder;
    block.whole = decoder.begin(block);
    if (block.whole) decoder.finish(block, table, _mm512_set1_epi32(static_cast<int>(table.mask)), 0);
}

void decode_lanes(CodedBlock* blocks, int count, const DecodeTable& table) {
    if (count == 1) return decode_one(blocks[0], table);
    Decoder a, b;
    blocks[0].whole = a.begin(blocks[0]);
    blocks[1].whole = b.begin(blocks[1]);
    const __m512i peek = _mm512_set1_epi32(static_cast<int>(table.mask));
    int steps = 0;
    if (blocks[0].whole && blocks[1].whole) {
        const int together = (blocks[0].count < blocks[1].count ? blocks[0].count : blocks[1].count) / kLanes;
        const std::uint16_t* entries = table.entries.data();
        for (; steps < together; ++steps) {
            a.step(entries, peek);
            b.step(entries, peek);
        }
    }
    if (blocks[0].whole) a.finish(blocks[0], table, peek, steps);
    if (blocks[1].whole) b.finish(blocks[1], table, peek, steps);
}

}  // namespace
}  // namespace avx512

const Kernels kAvx512Kernels = {
    "avx512",           avx512::load,         avx512::measure,      avx512::quantize, avx512::update_residual,
    avx512::dequantize, avx512::encode_lanes, avx512::decode_lanes, avx512::checksum};

}  // namespace qcomm
