// NEON, which every 64-bit Arm processor has: a step is 32 lanes, in four registers of words (encoding) or in eight of
// 32 bits (decoding). Lookups are loads, since there is no gather; a lookup of bytes stands in for compress and expand.
// Short steps take the scalar path of kernels_lanes.inl. Loops of kernels_loops.inl are vectorised by compilers in the
// scalar version already; finding the levels of zero runs and decoding them are the scalar version's.
#include <arm_neon.h>

#include <cstddef>

#include "kernels.h"
#include "qcomm/format.h"

namespace qcomm {
namespace neon {
namespace {

#include "kernels_lanes.inl"
#include "kernels_loops.inl"
#include "kernels_zero_runs.inl"

#include "encode_lanes_neon.inl"

// For each mask of 8 lanes, bytes that give consecutive words to the lanes of the mask and 0 to the others: a lookup
// outside the register is 0.
struct WordExpansions {
    std::uint8_t bytes[256][16];

    constexpr WordExpansions() : bytes() {
        for (int mask = 0; mask < 256; ++mask) {
            int at = 0;
            for (int j = 0; j < kWidth; ++j) {
                const bool taken = (mask >> j & 1) != 0;
                bytes[mask][2 * j] = static_cast<std::uint8_t>(taken ? at++ : 0xFF);
                bytes[mask][2 * j + 1] = static_cast<std::uint8_t>(taken ? at++ : 0xFF);
            }
        }
    }
};
alignas(16) constexpr WordExpansions kToTheLanes;

// The symbols of 8 codewords.
template <bool kPairs>
QCOMM_INLINE void store_symbols(uint16x8_t codewords, std::uint16_t* symbols) {
    if (!kPairs) {
        vst1q_u16(symbols, codewords);
    } else {
        // A variable: to clang, vst2q_u16 is a macro, in which an initializer list would be several arguments.
        const uint16x8x2_t both = {{vandq_u16(codewords, vdupq_n_u16(15)), vshrq_n_u16(codewords, kPairBits)}};
        vst2q_u16(symbols, both);
    }
}

// Decodes a block with all lanes in registers. Each step looks up all lanes before any takes a word. Words are taken
// group by group, lane 0 first, as they were written.
template <bool kPairs>
void decode_one(CodedBlock& block, const DecodeTable& table) {
    DecodeLanes lanes;
    block.whole = begin_lanes(lanes, block);
    if (!block.whole) return;
    constexpr int kHalves = 2 * kGroups, kHalf = kLanes / kHalves;  // registers of 4 lanes
    const std::uint16_t* const entries = table.entries.data();
    const uint32x4_t peek = vdupq_n_u32(table.mask);
    const int32x4_t word = vdupq_n_s32(kWordBits);
    // Bits of the lanes, the next code lowest, and how many there are. `least` is the smallest number that any lane
    // ever had: below zero a lane has read bits that it does not have, and the block is damaged.
    uint32x4_t x[kHalves];
    int32x4_t c[kHalves], least = vdupq_n_s32(0);
    for (int h = 0; h < kHalves; ++h)
        x[h] = vld1q_u32(lanes.bits + kHalf * h), c[h] = vld1q_s32(lanes.count + kHalf * h);
    int begin = 0;
    // A whole step of words must be readable; the last few steps of a block take the scalar path.
    constexpr int kStepSymbols = kLanes * (kPairs ? 2 : 1);
    for (; begin + kStepSymbols <= block.count && lanes.left >= kLanes; begin += kStepSymbols) {
        std::uint32_t index[kLanes];
        std::uint16_t found[kLanes];
        // Through memory: lookups are loads, and a register of 16 bits holds the found entries of two registers of
        // bits.
        for (int h = 0; h < kHalves; ++h) vst1q_u32(index + kHalf * h, vandq_u32(x[h], peek));
        for (int j = 0; j < kLanes; ++j) found[j] = entries[index[j]];
        // An entry is a symbol, or a pair, in 12 bits and the length of its code above them.
        for (int g = 0; g < kGroups; ++g) {
            const uint16x8_t entry = vld1q_u16(found + kWidth * g);
            store_symbols<kPairs>(vandq_u16(entry, vdupq_n_u16(0xFFF)),
                                  block.symbols + begin + kWidth * g * (kPairs ? 2 : 1));
            const int16x8_t length = vreinterpretq_s16_u16(vshrq_n_u16(entry, 12));
            const int32x4_t of[2] = {vmovl_s16(vget_low_s16(length)), vmovl_high_s16(length)};
            uint16x4_t needs[2];
            for (int i = 0; i < 2; ++i) {
                const int h = 2 * g + i;
                x[h] = vshlq_u32(x[h], vnegq_s32(of[i]));
                c[h] = vsubq_s32(c[h], of[i]);
                least = vminq_s32(least, c[h]);
                needs[i] = vmovn_u32(vcltq_s32(c[h], word));
            }
            // A lane below 16 bits takes the next word.
            const uint16x8_t need = vcombine_u16(needs[0], needs[1]);
            const uint8x16_t order = vld1q_u8(kToTheLanes.bytes[lane_mask(need)]);
            const uint16x8_t taken = vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8(lanes.words), order));
            const uint32x4_t wide[2] = {vmovl_u16(vget_low_u16(taken)), vmovl_high_u16(taken)};
            for (int i = 0; i < 2; ++i) {
                const int h = 2 * g + i;
                x[h] = vorrq_u32(x[h], vshlq_u32(wide[i], c[h]));
                c[h] = vaddq_s32(c[h], vandq_s32(vreinterpretq_s32_u32(vcltq_s32(c[h], word)), word));
            }
            // Words have two bytes; `left` counts words.
            const int used = count_lanes(need);
            lanes.words += 2 * used;
            lanes.left -= used;
        }
    }
    // Back to memory, for the scalar path.
    for (int h = 0; h < kHalves; ++h) vst1q_u32(lanes.bits + kHalf * h, x[h]), vst1q_s32(lanes.count + kHalf * h, c[h]);
    lanes.least = vminvq_s32(least) < lanes.least ? vminvq_s32(least) : lanes.least;
    decode_rest(lanes, block, kPairs, table, begin);
    block.whole = end_lanes(lanes);
}

// Rare symbols are searched for once a block, which compilers vectorise well.
int find_symbol(const std::uint16_t* symbols, int n, int symbol, std::uint16_t* positions) {
    return find_symbol_in_groups(symbols, n, symbol, positions);
}

void decode_lanes(CodedBlock* blocks, int count, const LaneDecoding& how) {
    for (CodedBlock* block = blocks; block < blocks + count; ++block) {
        how.pairs ? decode_one<true>(*block, *how.table) : decode_one<false>(*block, *how.table);
        dequantize_block(*block, how);
    }
}

void find_levels(const Values& values, std::int64_t begin, int n, const Quantizer& quantizer, int base,
                 LevelsOut* out) {
    find_levels_scalar(values, begin, n, quantizer, base, out);
}

// Scalar steps until lanes hold words, then vector steps: the first one has fewer tokens than lanes, if any.
int encode_runs(const std::uint16_t* positions, const std::int8_t* levels, int count, const RunCode& code,
                std::uint32_t* scratch, int* tokens, std::uint32_t* start, std::uint16_t* words_end) {
    *tokens = static_cast<int>(put_tokens(positions, levels, 0, count, 0, code, scratch) - scratch);
    EncodeLanes lanes;
    begin_lanes(lanes, words_end);
    int step = (*tokens - 1) / kLanes;
    for (; step >= 0 && !lanes.started; --step) {
        const int live = *tokens - step * kLanes < kLanes ? *tokens - step * kLanes : kLanes;
        push_step(lanes, scratch + step * kLanes, live);
    }
    if (step < 0) return finish_lanes(lanes, start, words_end);
    WordLanes pushed(lanes);
    std::uint16_t* words = lanes.words;
    for (; step >= 0; --step) {
        Codewords next[kGroups];
        for (int g = 0; g < kGroups; ++g) next[g] = codewords_of(scratch + step * kLanes + kWidth * g);
        words = pushed.push(next, words);
    }
    pushed.store(lanes);
    lanes.words = words;
    return finish_lanes(lanes, start, words_end);
}

void decode_runs(RunBlock& block) { decode_runs_scalar(block); }

}  // namespace
}  // namespace neon

const Kernels kNeonKernels = {
    "neon",
    neon::load,
    neon::measure,
    neon::quantize,
    neon::find_symbol,
    neon::scan,
    neon::quantize_counted,
    neon::quantize_residual,
    neon::update_residual,
    neon::dequantize,
    neon::encode_lanes,
    neon::decode_lanes,
    neon::find_levels,
    neon::encode_runs,
    neon::decode_runs,
    neon::checksum,
    neon::divide_to_bfloat,
};

}  // namespace qcomm
