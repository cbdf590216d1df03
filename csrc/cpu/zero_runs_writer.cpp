// A run block goes through three steps while its levels are in a core's caches:
//
//   values -> levels    find_levels, with the new residual; only those that are not 0 are kept
//   levels -> words     encode_runs, with the table for their exact number
//   all    -> bytes     choose_run_mode() picks one of three forms, and a block that is not finite has a fourth
//
// Nothing is allocated in these steps, so that they may run on a thread that must not throw.
#include "zero_runs_writer.h"

#include <algorithm>
#include <cstring>

#include "qcomm/block.h"
#include "zero_runs_parts.h"

namespace qcomm {

// Uninitialised, as all is written before it is read.
RunWriter::RunWriter(const EncodeOptions& options)
    : options_(options),
      kernels_(kernels()),
      old_(new float[kMaxRunBlockValues]),
      positions_(new std::uint16_t[kMaxRunBlockValues + kRunSlack]),
      levels_(new std::int8_t[kMaxRunBlockValues + kRunSlack]),
      symbols_(new std::uint16_t[kMaxRunBlockValues]),
      tokens_(new std::uint32_t[kMaxRunBlockTokens + kRunSlack]),
      words_(new std::uint16_t[kWordsSlack + kMaxRunBlockTokens]) {}

void RunWriter::reserve(std::int64_t blocks, std::int64_t parts) {
    samples.reserve(static_cast<std::size_t>(blocks + parts));
    written.reserve(blocks);
}

void RunWriter::write(const RunParts& parts, std::int64_t first, std::int64_t last, std::uint8_t* out) {
    written.clear();
    samples.clear();
    const std::int64_t values = parts.values(), blocks = run_blocks(values, options_.steps);
    for (std::int64_t i = first; i < last; ++i) {
        const std::int64_t begin = run_block_begin(values, blocks, i), end = run_block_begin(values, blocks, i + 1);
        bool finite = true;
        const std::size_t known = samples.size();
        const int nonzeros = find_levels(parts, begin, end, &finite);
        for (std::size_t s = known; s < samples.size(); ++s) samples[s].is_lost = !finite;
        if (!finite) restore(parts, begin, end);
        write_block(static_cast<int>(end - begin), nonzeros, finite, out + written.bytes);
    }
}

namespace {

// Makes the sample know all residuals of the outermost levels. What is beyond them is kept, and grows from step to step
// until the step follows: a sample that misses it would never tell.
void count_beyond(int offset, int n, LevelsOut* out) {
    constexpr int kGroup = 64;
    double all = 0.0, known = 0.0;
    for (int begin = 0; begin < out->count; begin += kGroup) {
        const int end = std::min(begin + kGroup, out->count);
        int outermost = 0;
        for (int i = begin; i < end; ++i) outermost |= out->levels[i] == kMaxLevel || out->levels[i] == -kMaxLevel;
        for (int i = begin; outermost != 0 && i < end; ++i) {
            if (out->levels[i] != kMaxLevel && out->levels[i] != -kMaxLevel) continue;
            const int at = out->positions[i] - offset;
            const double square = static_cast<double>(out->residual[at]) * static_cast<double>(out->residual[at]);
            all += square;
            if (at / kLanes == sampled_row(at / (kLanes * kSampledRows), n)) known += square;
        }
    }
    // In units of the sample, which stands for all values.
    out->sample.residuals += all * (out->sample.count / n) - known;
    out->sample.residuals = std::max(out->sample.residuals, 0.0);
}

}  // namespace

// Finds the levels of values [begin, end), segment by segment, and returns how many are not 0.
int RunWriter::find_levels(const RunParts& parts, std::int64_t begin, std::int64_t end, bool* finite) {
    int found = 0;
    for_parts(parts.firsts, begin, end, [&](std::size_t part, std::int64_t from, std::int64_t to) {
        const SegmentInput& in = parts.segments[part];
        const int n = static_cast<int>(to - from), offset = static_cast<int>(parts.firsts[part] + from - begin);
        LevelsOut out{};
        out.residual = in.residual_out + from;
        out.old = old_.get() + offset;
        out.positions = positions_.get() + found;
        out.levels = levels_.get() + found;
        kernels_.find_levels(in.values, from, n, in.quantizer, offset, &out);
        count_beyond(offset, n, &out);
        found += out.count;
        *finite &= out.finite;
        samples.push_back({part, out.sample, false});
    });
    return found;
}

// Puts the old residuals back: what is not sent must not be taken as sent, and NaN would stay in them for ever.
void RunWriter::restore(const RunParts& parts, std::int64_t begin, std::int64_t end) {
    for_parts(parts.firsts, begin, end, [&](std::size_t part, std::int64_t from, std::int64_t to) {
        const float* const old = old_.get() + (parts.firsts[part] + from - begin);
        std::copy_n(old, to - from, parts.segments[part].residual_out + from);
    });
}

void RunWriter::write_block(int n, int nonzeros, bool finite, std::uint8_t* out) {
    std::uint32_t start[kLanes];
    std::uint16_t* const words_end = words_.get() + kWordsSlack + kMaxRunBlockTokens;
    const int table = run_table(nonzeros, n);
    int words = 0, tokens = 0;
    if (nonzeros > 0 && finite)
        words = kernels_.encode_runs(positions_.get(), levels_.get(), nonzeros, run_code(table), tokens_.get(), &tokens,
                                     start, words_end);
    const RunMode mode = finite ? choose_run_mode(n, nonzeros, words) : RunMode::kNotFinite;
    const bool coded = mode == RunMode::kCoded;
    const std::uint32_t info = RunInfo{mode, coded ? table : 0, coded ? tokens : 0}.pack();
    std::uint8_t* at = out;
    const auto put = [&](const void* data, std::size_t size) {
        std::memcpy(at, data, size);
        at += size;
    };
    put(&info, sizeof(info));
    if (coded) {
        put(start, sizeof(start));
        put(words_end - words, 2 * static_cast<std::size_t>(words));
    }
    if (mode == RunMode::kFixed) at = put_fixed(n, nonzeros, at);
    written.end_block(out, at, options_.checksums);
}

// Packs all levels; returns the end.
std::uint8_t* RunWriter::put_fixed(int n, int nonzeros, std::uint8_t* at) {
    std::fill_n(symbols_.get(), n, static_cast<std::uint16_t>(kMaxLevel));
    for (std::size_t i = 0; i < static_cast<std::size_t>(nonzeros); ++i)
        symbols_[positions_[i]] = static_cast<std::uint16_t>(levels_[i] + kMaxLevel);
    pack_bits(symbols_.get(), n, kRunsBits, at);
    return at + packed_bytes(n, kRunsBits);
}

}  // namespace qcomm
