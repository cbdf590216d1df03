// AVX2: a step is 32 lanes, in two registers of words (encoding) or in four of 32 bits (decoding). Permutations by
// small tables stand in for the compress and expand that AVX-512 has. Short steps take the scalar path of
// kernels_lanes.inl.
#include <immintrin.h>

#include <cstddef>

#include "kernels.h"
#include "qcomm/format.h"

namespace qcomm {
namespace avx2 {
namespace {

#include "kernels_lanes.inl"
#include "kernels_loops.inl"
#include "kernels_zero_runs.inl"

constexpr int kWidth = 8;  // lanes in a register
constexpr int kGroups = kLanes / kWidth;

// For each mask of 8 lanes, permutations of the lanes in 8 bytes: 2 KiB, where 32 bits an index would be 8 KiB.
struct Permutations {
    std::uint64_t expand[256];    // lane j of the mask takes element number popcount(mask below j)
    std::uint64_t compress[256];  // lane number popcount(mask below j) takes element j of the mask

    constexpr Permutations() : expand(), compress() {
        for (int mask = 0; mask < 256; ++mask) {
            int rank = 0;
            for (int j = 0; j < kWidth; ++j) {
                if ((mask >> j & 1) == 0) continue;
                compress[mask] |= static_cast<std::uint64_t>(j) << (8 * rank);
                expand[mask] |= static_cast<std::uint64_t>(rank++) << (8 * j);
            }
        }
    }
};
constexpr Permutations kPermutations;

// An index for _mm256_permutevar8x32_epi32.
QCOMM_INLINE __m256i permutation(std::uint64_t bytes) {
    return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(bytes)));
}
// One bit for each lane whose highest bit is set.
QCOMM_INLINE unsigned lane_mask(__m256i lanes) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes)));
}
QCOMM_INLINE __m256i load256(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
QCOMM_INLINE void store256(void* at, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(at), v); }

// g++ 12 makes a gather with an all-ones mask depend on its destination's old value; a mask it cannot see through
// avoids that.
template <int kScale>
QCOMM_INLINE __m256i gather(__m256i index, const void* table) {
    __m256i mask = _mm256_set1_epi32(-1);
    __asm__("" : "+x"(mask));
    return _mm256_mask_i32gather_epi32(_mm256_setzero_si256(), static_cast<const int*>(table), index, mask, kScale);
}

// Narrows 8 lanes below 65536 to u16.
QCOMM_INLINE __m128i narrow16(__m256i lanes) {
    const __m256i packed = _mm256_packus_epi32(lanes, lanes);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}

#include "encode_lanes_avx2.inl"
#include "zero_runs_avx2.inl"

// The symbols of 8 codewords.
template <bool kPairs>
QCOMM_INLINE void store_symbols(__m256i codewords, std::uint16_t* symbols) {
    if (!kPairs) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(symbols), narrow16(codewords));
    } else {
        const __m256i both = _mm256_or_si256(codewords, _mm256_slli_epi32(codewords, 16 - kPairBits));
        store256(symbols, _mm256_and_si256(both, _mm256_set1_epi16(15)));
    }
}

// Decodes a block with all lanes in registers. Each step looks up all lanes before any takes a word: four gathers are
// then under way at once, each of which takes many cycles. Words are taken group by group, lane 0 first, as they were
// written.
template <bool kPairs>
void decode_one(CodedBlock& block, const DecodeTable& table) {
    DecodeLanes lanes;
    block.whole = begin_lanes(lanes, block);
    if (!block.whole) return;
    const std::uint16_t* entries = table.entries.data();
    const __m256i peek = _mm256_set1_epi32(static_cast<int>(table.mask)), symbol = _mm256_set1_epi32(0xFFF);
    const __m256i word = _mm256_set1_epi32(kWordBits), nibble = _mm256_set1_epi32(15);
    __m256i x[kGroups], c[kGroups], least = _mm256_setzero_si256();
    for (int g = 0; g < kGroups; ++g) x[g] = load256(lanes.bits + kWidth * g), c[g] = load256(lanes.count + kWidth * g);
    int begin = 0;
    // A whole step of words must be readable; the last few steps of a block take the scalar path.
    constexpr int kStepSymbols = kLanes * (kPairs ? 2 : 1);
    for (; begin + kStepSymbols <= block.count && lanes.left >= kLanes; begin += kStepSymbols) {
        for (int g = 0; g < kGroups; ++g) {
            const __m256i e = gather<2>(_mm256_and_si256(x[g], peek), entries);
            // An entry's upper half is its neighbour in the table: masked away.
            const __m256i length = _mm256_and_si256(_mm256_srli_epi32(e, 12), nibble);
            store_symbols<kPairs>(_mm256_and_si256(e, symbol), block.symbols + begin + kWidth * g * (kPairs ? 2 : 1));
            x[g] = _mm256_srlv_epi32(x[g], length);
            c[g] = _mm256_sub_epi32(c[g], length);
            least = _mm256_min_epi32(least, c[g]);
        }
        for (int g = 0; g < kGroups; ++g) {
            // A lane below 16 bits takes the next word. The mask's permutation deals consecutive words to the lanes
            // that need one; the others get words too, which are masked away.
            const __m256i need = _mm256_cmpgt_epi32(word, c[g]);
            const unsigned m = lane_mask(need);
            const __m256i next = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lanes.words)));
            const __m256i taken =
                _mm256_and_si256(_mm256_permutevar8x32_epi32(next, permutation(kPermutations.expand[m])), need);
            x[g] = _mm256_or_si256(x[g], _mm256_sllv_epi32(taken, c[g]));
            c[g] = _mm256_add_epi32(c[g], _mm256_and_si256(need, word));
            const int used = __builtin_popcount(m);
            lanes.words += 2 * used;
            lanes.left -= used;
        }
    }
    // Back to memory, for the scalar path.
    alignas(32) std::int32_t least_of[kWidth];
    store256(least_of, least);
    for (int g = 0; g < kGroups; ++g) store256(lanes.bits + kWidth * g, x[g]), store256(lanes.count + kWidth * g, c[g]);
    for (const std::int32_t l : least_of) lanes.least = l < lanes.least ? l : lanes.least;
    decode_rest(lanes, block, kPairs, table, begin);
    block.whole = end_lanes(lanes);
}

int find_symbol(const std::uint16_t* symbols, int n, int symbol, std::uint16_t* positions) {
    return find_symbol_in_groups(symbols, n, symbol, positions);
}

void decode_lanes(CodedBlock* blocks, int count, const LaneDecoding& how) {
    for (CodedBlock* block = blocks; block < blocks + count; ++block) {
        how.pairs ? decode_one<true>(*block, *how.table) : decode_one<false>(*block, *how.table);
        dequantize_block(*block, how);
    }
}

}  // namespace
}  // namespace avx2

const Kernels kAvx2Kernels = {
    "avx2",
    avx2::load,
    avx2::measure,
    avx2::quantize,
    avx2::find_symbol,
    avx2::scan,
    avx2::quantize_counted,
    avx2::quantize_residual,
    avx2::update_residual,
    avx2::dequantize,
    avx2::encode_lanes,
    avx2::decode_lanes,
    avx2::find_levels,
    avx2::encode_runs,
    avx2::decode_runs,
    avx2::checksum,
    avx2::divide_to_bfloat,
};

}  // namespace qcomm
