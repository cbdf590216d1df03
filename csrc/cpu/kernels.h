// The inner loops, one version for each instruction set. All versions write the same bits; which one runs is decided
// once, by the processor.
//
// A version is a table of function pointers. They are called for blocks or runs of thousands of values, so a call by
// way of a pointer costs nothing that can be measured, and inside of one everything is inlined for its instruction set.
#pragma once

#include <cstdint>

#include "codeword_counts.h"
#include "qcomm/huffman.h"
#include "qcomm/quantize.h"
#include "qcomm/values.h"
#include "qcomm/zero_runs.h"
#include "zero_runs_sample.h"

// In front of a loop whose iterations touch no memory of each other: it need not be checked for overlaps.
#if defined(__clang__)
#define QCOMM_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define QCOMM_INDEPENDENT _Pragma("GCC ivdep")
#endif

// Where a fused multiply-add is an instruction.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define QCOMM_HAS_FMA
#endif

namespace qcomm {

// Of up to kSumBlock values. min and max are +-infinity for none.
struct BlockStatistics {
    double minimum, maximum, sum_squares;
    bool finite;
};

struct SymbolScan {
    int escapes;    // number of escape symbols
    bool constant;  // all symbols are equal
};

// A block to decode.
struct CodedBlock {
    const std::uint8_t* start;  // 32 u32, unaligned
    const std::uint8_t* words;  // word_count u16, unaligned
    std::int64_t word_count;
    int count;               // symbols
    std::uint16_t* symbols;  // out; one more is written where pairs are coded and the count is odd
    void* values;            // out, in the dtype's storage: values of the symbols, 0 for an escape; null for none
    bool whole;              // out: the bits end where the codewords do; otherwise symbols and values are meaningless
};

// The properties that the blocks of a segment share.
struct LaneDecoding {
    bool pairs;  // a codeword is two symbols
    const DecodeTable* table;
    Quantizer quantizer;
    DType dtype;
    bool accumulate;  // values are added to what is there
};

// A coded run block to decode, or its levels after that.
struct RunBlock {
    const std::uint8_t* start;  // 32 u32, unaligned
    const std::uint8_t* words;  // word_count u16, unaligned
    std::int64_t word_count;
    int tokens, values;
    const RunCode* code;
    std::uint16_t* positions;  // out, ascending: of the levels that are not 0; room for kRunSlack more than `tokens`
    std::int8_t* levels;       // out
    int count;                 // out
    bool whole;                // out: the bits end where the tokens do, the last of which has a level, in the block
};
// The results of find_levels.
struct LevelsOut {
    float* residual;  // new ones; may be values.residual + begin
    float* old;       // copies of the old ones, for a block that cannot be coded
    std::uint16_t* positions;
    std::int8_t* levels;
    int count;    // of positions and levels
    bool finite;  // all new residuals are
    RunSample sample;
};
constexpr int kRunSlack = 64;  // elements behind positions and levels that a vector store may overwrite

// The memory to be read next, prefetched while it is idle: `bytes` a symbol from `first` (values, or symbols that are
// known; null: nothing), and where there is a residual 4 from that, too.
struct Ahead {
    const void* first = nullptr;
    int bytes = 0;
    const float* residual = nullptr;
};

// Returns the symbol that stands for a value outside the levels; -1, which no symbol is, for range grids.
inline int escape_of(const Quantizer& q) { return q.grid == Grid::kSigma ? escape_symbol(q.num_bits) : -1; }

constexpr int kPositionsSlack = 32;
constexpr int kWordsSlack = 32;  // words in front of encode_lanes' output that a vector store may overwrite

// `u` below are values in the arithmetic T of a dtype: float64 for kFloat64, otherwise float32.
struct Kernels {
    const char* name;

    // u[0, n) = values[begin, begin + n) * inv_scale + residual.
    void (*load)(const Values& values, std::int64_t begin, int n, void* u);
    // Statistics of values [begin, begin + n), n <= 4096, summed in the format's order.
    BlockStatistics (*measure)(const Values& values, std::int64_t begin, int n);
    // Symbols of n >= 1 values.
    SymbolScan (*quantize)(const void* u, DType dtype, int n, const Quantizer& quantizer, std::uint16_t* symbols);
    // Positions of a symbol among n, ascending; returns their number. Positions have room for kPositionsSlack more.
    int (*find_symbol)(const std::uint16_t* symbols, int n, int symbol, std::uint16_t* positions);
    // The result of quantize() for n >= 1 symbols that are known already.
    SymbolScan (*scan)(const std::uint16_t* symbols, int n, const Quantizer& quantizer);
    // load and quantize in one pass, counting codewords, without a scan. With a `residual` update_residual as well; it
    // may be values.residual + begin.
    void (*quantize_counted)(const Values& values, std::int64_t begin, int n, const Quantizer& quantizer,
                             std::uint16_t* symbols, CodewordCounts* counts, float* residual);
    // load, quantize and update_residual in one pass. `residual` may be values.residual + begin.
    SymbolScan (*quantize_residual)(const Values& values, std::int64_t begin, int n, const Quantizer& quantizer,
                                    void* u, std::uint16_t* symbols, float* residual);
    // residual = u - decoded(u) for n symbols; 0 where the symbol is an escape.
    void (*update_residual)(const void* u, DType dtype, const std::uint16_t* symbols, int n, const Quantizer& quantizer,
                            float* residual);
    // Values of n symbols into `out` (the dtype's storage), stored or added; 0 for an escape.
    void (*dequantize)(const std::uint16_t* symbols, int n, const Quantizer& quantizer, DType dtype, void* out,
                       bool accumulate);

    // Codes n symbols, one or two a codeword: see block.h. Words end at `words_end` and grow downwards. Returns their
    // number, or -1 when a symbol has no codeword.
    int (*encode_lanes)(const std::uint16_t* symbols, int n, bool pairs, const EncodeTable& table, const Ahead& ahead,
                        std::uint32_t* start, std::uint16_t* words_end);
    // Decodes one or two blocks. Two at a time keep a vector unit busy while lookups are under way.
    void (*decode_lanes)(CodedBlock* blocks, int count, const LaneDecoding& how);

    // Finds the levels that are not 0 of values [begin, begin + n), the first of which is value `base` of its run
    // block.
    void (*find_levels)(const Values& values, std::int64_t begin, int n, const Quantizer& quantizer, int base,
                        LevelsOut* out);
    // Codes the `count` >= 1 levels of a run block, as encode_lanes does codewords; *tokens receives their number.
    // `scratch` has room for kMaxRunBlockTokens + kRunSlack.
    int (*encode_runs)(const std::uint16_t* positions, const std::int8_t* levels, int count, const RunCode& code,
                       std::uint32_t* scratch, int* tokens, std::uint32_t* start, std::uint16_t* words_end);
    void (*decode_runs)(RunBlock& block);

    std::uint32_t (*checksum)(const std::uint8_t* data, std::int64_t bytes);

    void (*divide_to_bfloat)(const float* values, std::int64_t count, float divisor, std::uint16_t* out);  // rounding.h
};

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kNeonKernels;

// The version in use; processor.h selects it.
const Kernels& kernels();

// Returns u[begin...) where it already is: null if it has to be computed first.
inline const void* in_place(const Values& values, std::int64_t begin) {
    if (!values.is_adjusted() && values.dtype == DType::kFloat32) return static_cast<const float*>(values.data) + begin;
    if (!values.is_adjusted() && values.dtype == DType::kFloat64)
        return static_cast<const double*>(values.data) + begin;
    return nullptr;
}

// Returns u[begin, begin + n), computed into `scratch` if need be.
inline const void* load_block(const Kernels& k, const Values& values, std::int64_t begin, int n, void* scratch) {
    if (const void* u = in_place(values, begin)) return u;
    k.load(values, begin, n, scratch);
    return scratch;
}

}  // namespace qcomm
