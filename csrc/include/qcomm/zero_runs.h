// Zero runs: the coding for steps so coarse that most values have level 0. A token is a run of zeros and the level that
// ends it (docs/format.md, "Zero runs"). Blocks of tokens run across segments, since at these rates a block's frame
// would cost a small tensor more than its values.
//
//   info u32 | 32 start windows u32 | words u16 | zeros to 4 bytes
//
// Tokens are dealt to the 32 lanes of block.h. A codeword with its extra bits has at most 16, which a lane always
// holds.
#pragma once

#include <cstdint>

#include "qcomm/block.h"
#include "qcomm/format.h"
#include "qcomm/static_tables.h"

namespace qcomm {

constexpr int kMaxLevel = 3;  // a value beyond it keeps the rest in its residual
// A level in a fixed block, which has level + 3, takes kRunsBits.
constexpr int kTokenLevels = 2 * kMaxLevel;
constexpr int kRunClasses = 36;
// Zeros of the token without a level. A run is shorter, and a longer one begins with as many of these as fit.
constexpr int kSkipZeros = 512;
constexpr int kSkipToken = kRunClasses * kTokenLevels;
constexpr int kRunTokens = kSkipToken + 1;
constexpr int kRunTableCount = 12;
constexpr int kMaxRunCodeLength = 11;  // with 5 extra bits a token fits a lane's 16
// Codewords of a block at most: one token a value, and the skips between them.
constexpr std::int64_t kMaxRunBlocks = std::int64_t{1} << 31;  // a reader refuses more, so no product overflows
constexpr int kMaxRunBlockValues = 4 * kLanes * kMaxSteps;
constexpr int kMaxRunBlockTokens = kMaxRunBlockValues + kMaxRunBlockValues / kSkipZeros;
static_assert(kMaxRunBlockValues == 65536, "positions are u16");

// Runs of a class are `shortest` and the next 2^extra - 1.
struct RunClass {
    int shortest, extra;
};
// Single runs to 7, then four classes an octave, whose extra bits grow by one each, up to 5: eight classes from 256 on.
QCOMM_INLINE RunClass run_class(int number) {
    if (number < 8) return {number, 0};
    if (number >= 28) return {256 + 32 * (number - 28), 5};
    const int octave = number / 4 - 1;  // 1 for runs from 8 on
    return {(4 + number % 4) << octave, octave};
}
// Returns the class of a run below kSkipZeros.
QCOMM_INLINE int class_of_run(int run) {
    if (run < 8) return run;
    if (run >= 256) return 28 + (run - 256) / 32;
    int octave = 1;
    while (run >= 16 << (octave - 1)) ++octave;
    return 4 * (octave + 1) + (run >> octave) - 4;
}
// Returns the place of a level that is not 0 among a class's tokens: -3..-1 are 0..2, and 1..3 are 3..5.
QCOMM_INLINE int level_place(int level) { return level < 0 ? level + kMaxLevel : level + kMaxLevel - 1; }
QCOMM_INLINE int level_at(int place) { return place < kMaxLevel ? place - kMaxLevel : place - kMaxLevel + 1; }

// Returns the number of blocks of `values` values, and where block i begins: they are as equal as multiples of 32 can
// be, because a short last one would waste half of its start windows.
constexpr std::int64_t run_blocks(std::int64_t values, int steps) {
    return ceil_div(values, std::int64_t{4} * kLanes * steps);
}
constexpr std::int64_t run_block_begin(std::int64_t values, std::int64_t blocks, std::int64_t i) {
    // ceil(values / 32) * i / blocks, in two parts, since for hostile counts the product overflows.
    const std::int64_t rows = ceil_div(values, kLanes);
    const std::int64_t begin = kLanes * (rows / blocks * i + rows % blocks * i / blocks);
    return begin < values ? begin : values;
}

static_assert(run_block_begin(kMaxSegmentValues, kMaxRunBlocks, kMaxRunBlocks) == kMaxSegmentValues &&
                  run_block_begin(kMaxSegmentValues, kMaxRunBlocks, kMaxRunBlocks - 1) < kMaxSegmentValues,
              "no count that a reader accepts overflows");

// Returns the table for a block of n values of which some are not 0: the one made for the nearest share, by ratio.
// `bounds` is kRunTableBounds, of which a device has a copy of its own.
QCOMM_INLINE int run_table(int nonzeros, int n, const std::uint32_t* bounds = kRunTableBounds) {
    int table = 0;
    for (int t = 0; t < kRunTableCount - 1; ++t)
        table += (static_cast<std::uint64_t>(nonzeros) << 32) < static_cast<std::uint64_t>(n) * bounds[t];
    return table;
}

// kNotFinite: all values are NaN, because one of them could not be coded; their residuals stay as they were.
enum class RunMode : std::uint8_t { kZeros = 0, kFixed = 1, kCoded = 2, kNotFinite = 3 };

// A run block's first word.
struct RunInfo {
    RunMode mode;
    int table;
    int tokens;

    constexpr std::uint32_t pack() const {
        return static_cast<std::uint32_t>(mode) | static_cast<std::uint32_t>(table) << 2 |
               static_cast<std::uint32_t>(tokens) << 8;
    }
    static constexpr RunInfo unpack(std::uint32_t word) {
        return {static_cast<RunMode>(word & 3u), static_cast<int>(word >> 2 & 63u), static_cast<int>(word >> 8)};
    }
};

// Returns the size of a block of n values in a mode; `words` is that of its tokens beyond the start windows.
QCOMM_INLINE int run_block_bytes(RunMode mode, int n, int words) {
    int body = 0;
    if (mode == RunMode::kFixed) body = static_cast<int>(packed_bytes(n, kRunsBits));
    if (mode == RunMode::kCoded) body = 4 * kLanes + 2 * words;
    return (4 + body + 3) / 4 * 4;
}
// Returns the mode of a block: all encoders must choose alike.
QCOMM_INLINE RunMode choose_run_mode(int n, int nonzeros, int words) {
    if (nonzeros == 0) return RunMode::kZeros;
    return run_block_bytes(RunMode::kCoded, n, words) <= run_block_bytes(RunMode::kFixed, n, words) ? RunMode::kCoded
                                                                                                    : RunMode::kFixed;
}

// Tells whether a block's info can be: what it claims is checked against the block's values, not yet its bytes.
QCOMM_INLINE bool is_readable(const RunInfo& info, int n) {
    if (info.mode == RunMode::kCoded) return info.table < kRunTableCount && info.tokens >= 1 && info.tokens <= n;
    return info.table == 0 && info.tokens == 0;
}

// Levels of a grid of coding runs, in T. The level of a value that is not finite means nothing: its block is not coded.
template <class T>
class RunQuantizer {
public:
    QCOMM_INLINE explicit RunQuantizer(double step) : step_(static_cast<T>(step)), inv_(T(1) / step_) {}

    QCOMM_INLINE int operator()(T x) const { return static_cast<int>(level(rounded(x))); }
    // The same in two steps, for a processor whose conversions to integers are slow: a number that has the level in its
    // lowest bits, and the level in T.
    QCOMM_INLINE T rounded(T x) const {
        const T q = x * inv_, top = T(kMaxLevel);
        const T above = q > -top ? q : -top;  // also of NaN
        const T inside = above < top ? above : top;
        // To nearest even, as SigmaQuantizer rounds: the sum of this constant and a small number has no fraction.
        return inside + kMagic;
    }
    QCOMM_INLINE static T level(T rounded) { return rounded - kMagic; }
    QCOMM_INLINE T decode(int level) const { return static_cast<T>(level) * step_; }
    // Returns u - decoded(u), as the format keeps it.
    QCOMM_INLINE float lost(T x, int level) const { return static_cast<float>(x - decode(level)); }
    QCOMM_INLINE float lost_in(T x, T level) const { return static_cast<float>(x - level * step_); }
    QCOMM_INLINE T step() const { return step_; }
    QCOMM_INLINE T inverse() const { return inv_; }

private:
    static constexpr T kMagic = T(1.5) * static_cast<T>(std::int64_t{1} << (sizeof(T) == 4 ? 23 : 52));
    T step_, inv_;
};

// An entry of a decoding table, for the next 11 bits of a lane:
//
//   bits 0-4  length of codeword and extra bits    5-8  of the codeword    9-11  of the extra bits
//       12-21 shortest run, or 512 for the skip    22-24 level_place()     25    set if there is a level
constexpr std::uint32_t kHasLevel = 1u << 25;

// A static code of zero runs.
struct RunCode {
    // A token's codeword with its extra bits, and its length above bit 16, by run and level_place(); a row of 8.
    std::uint32_t tokens[kSkipZeros * 8];
    std::uint32_t skip;
    std::uint32_t entries[1 << kMaxRunCodeLength];  // for decoding
};
// Returns the code of a table; all are made when the first is asked for, and live as long as the process.
const RunCode& run_code(int table);

}  // namespace qcomm
