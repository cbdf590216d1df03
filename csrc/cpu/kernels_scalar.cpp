// The portable version, and the definition of all others: tests compare every version with this one, bit for bit.
// Nothing here is written for a processor, so it is also what processors without a version of their own run.
#include <cstddef>

#include "kernels.h"
#include "qcomm/format.h"

namespace qcomm {
namespace scalar {
namespace {

#include "kernels_lanes.inl"
#include "kernels_loops.inl"
#include "kernels_zero_runs.inl"

void find_levels(const Values& values, std::int64_t begin, int n, const Quantizer& quantizer, int base,
                 LevelsOut* out) {
    find_levels_scalar(values, begin, n, quantizer, base, out);
}
int encode_runs(const std::uint16_t* positions, const std::int8_t* levels, int count, const RunCode& code,
                std::uint32_t* scratch, int* tokens, std::uint32_t* start, std::uint16_t* words_end) {
    return encode_runs_scalar(positions, levels, count, code, scratch, tokens, start, words_end);
}
void decode_runs(RunBlock& block) { decode_runs_scalar(block); }

int find_symbol(const std::uint16_t* symbols, int n, int symbol, std::uint16_t* positions) {
    return find_symbol_in_groups(symbols, n, symbol, positions);
}

int encode_lanes(const std::uint16_t* symbols, int n, bool pairs, const EncodeTable& table, const Ahead&,
                 std::uint32_t* start, std::uint16_t* words_end) {
    const std::uint32_t* entries = table.entries.data();
    EncodeLanes lanes;
    begin_lanes(lanes, words_end);
    const int count = pairs ? (n + 1) / 2 : n;
    // Backwards, so that a decoder reads forwards; the last step of a block may have fewer codewords than lanes, and is
    // the first one here.
    for (int step = (count - 1) / kLanes; step >= 0; --step) {
        const int live = count - step * kLanes < kLanes ? count - step * kLanes : kLanes;
        encode_step(lanes, symbols, n, pairs, entries, step, live);
    }
    return finish_lanes(lanes, start, words_end);
}

void decode_lanes(CodedBlock* blocks, int count, const LaneDecoding& how) {
    for (CodedBlock* block = blocks; block < blocks + count; ++block) {
        DecodeLanes lanes;
        block->whole = begin_lanes(lanes, *block);
        if (!block->whole) continue;
        // All of it is "the rest" here: there are no vector steps before.
        decode_rest(lanes, *block, how.pairs, *how.table, 0);
        block->whole = end_lanes(lanes);
        dequantize_block(*block, how);
    }
}

}  // namespace
}  // namespace scalar

const Kernels kScalarKernels = {
    "scalar",
    scalar::load,
    scalar::measure,
    scalar::quantize,
    scalar::find_symbol,
    scalar::scan,
    scalar::quantize_counted,
    scalar::quantize_residual,
    scalar::update_residual,
    scalar::dequantize,
    scalar::encode_lanes,
    scalar::decode_lanes,
    scalar::find_levels,
    scalar::encode_runs,
    scalar::decode_runs,
    scalar::checksum,
    scalar::divide_to_bfloat,
};

}  // namespace qcomm
