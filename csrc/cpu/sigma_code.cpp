// Which code a sigma segment gets. A sample of neighbouring pairs is quantized and each candidate is priced: a static
// code costs exactly its lengths, a code of the segment's own what its entropy says (corrected for the sample's size)
// plus its table.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "qcomm/entropy.h"
#include "qcomm/huffman.h"
#include "qcomm/parallel.h"
#include "qcomm/quantize.h"

namespace qcomm {
namespace {

constexpr double kSampleFraction = 0.03;
constexpr std::int64_t kMaxSampledPairs = 1 << 14;  // more would sharpen nothing and cost more than the encoder
constexpr std::int64_t kPairsPerThread = 1 << 13;   // each a cache miss: about 0.1 ms
constexpr double kOwnTableMustSave = 0.03;          // of the bits: below that a static table's speed is worth more
constexpr double kHuffmanRedundancy = 0.02;         // bits a codeword above entropy
constexpr double kTableBits = 6.0;                  // a used symbol in a list of code lengths

struct Sample {
    explicit Sample(int num_bits) : singles(std::size_t{1} << num_bits), pairs(num_bits == kPairBits ? 256 : 0) {}
    std::vector<std::uint32_t> singles, pairs;  // histograms; pairs only for nibbles
};

void add(const std::vector<std::uint32_t>& counts, std::vector<std::uint32_t>* sum) {
    for (std::size_t i = 0; i < counts.size(); ++i) (*sum)[i] += counts[i];
}

Sample draw(const Values& values, int num_bits, double step, std::uint32_t seed, int threads) {
    const std::int64_t available = values.count / 2;
    const std::int64_t n =
        std::min({available, kMaxSampledPairs, (sample_size(values.count, kSampleFraction) + 1) / 2});
    const int parts = part_count(n, kPairsPerThread, threads);
    std::vector<Sample> drawn(static_cast<std::size_t>(parts), Sample(num_bits));
    dispatch(values.dtype, [&](auto traits) {
        using Tr = decltype(traits);
        const Reader<Tr> reader(values);
        const SigmaQuantizer<typename Tr::Arithmetic> grid(num_bits, step, Tr::kMax);
        parallel_for(n, parts, [&](int part, std::int64_t begin, std::int64_t end) {
            Sample& sample = drawn[static_cast<std::size_t>(part)];
            for (std::int64_t i = begin; i < end; ++i) {
                const std::int64_t at = 2 * sample_index(i, n, available, seed);
                const std::uint32_t first = grid(reader[at]), second = grid(reader[at + 1]);
                ++sample.singles[first];
                ++sample.singles[second];
                if (num_bits == kPairBits) ++sample.pairs[first | second << kPairBits];
            }
        });
    });
    for (std::size_t part = 1; part < drawn.size(); ++part) {
        add(drawn[part].singles, &drawn[0].singles);
        add(drawn[part].pairs, &drawn[0].pairs);
    }
    return std::move(drawn[0]);
}

// Bits of the whole segment's symbols, from the histogram of a sample.
double static_bits(const std::vector<std::uint32_t>& counts, const StaticCode& code, double codewords) {
    double bits = 0.0, n = 0.0;
    for (std::size_t s = 0; s < counts.size(); ++s) {
        bits += static_cast<double>(counts[s]) * code.lengths[s];
        n += counts[s];
    }
    return codewords * bits / n;
}

double own_bits(const std::vector<std::uint32_t>& counts, double codewords) {
    double n = 0.0, used = 0.0;
    for (const std::uint32_t c : counts) {
        n += c;
        used += c > 0;
    }
    const double entropy =
        static_cast<double>(entropy_fixed(counts.data(), static_cast<int>(counts.size()))) / (1 << kLogFractionBits);
    const double bias =
        (used - 1.0) / (2.0 * n * std::log(2.0));  // Miller 1955: a sample's entropy is too small by this
    return codewords * std::max(1.0, entropy + bias + kHuffmanRedundancy) + kTableBits * used;
}

}  // namespace

SigmaCode choose_sigma_code(const Values& values, int num_bits, double step, double k, std::uint32_t seed,
                            int threads) {
    if (num_bits > kMaxCodedBits) return {Coding::kSingle, kNoTable};
    if (values.count < 2) return {Coding::kSingle, kNoTable};
    const Sample sample = draw(values, num_bits, step, seed, threads);
    const auto count = static_cast<double>(values.count);

    SigmaCode best_static{Coding::kSingle, kNoTable}, best_own{Coding::kSingle, kTableOnWire};
    double static_cost = std::numeric_limits<double>::infinity();
    if (const StaticCode* code = nearest_static_code(Coding::kSingle, num_bits, k)) {
        static_cost = static_bits(sample.singles, *code, count);
        best_static.table = code->id;
    }
    double own_cost = own_bits(sample.singles, count);
    if (num_bits == kPairBits) {
        const double codewords = count / 2.0;
        if (const StaticCode* code = nearest_static_code(Coding::kPair, num_bits, k)) {
            const double cost = static_bits(sample.pairs, *code, codewords);
            if (cost < static_cost) {
                static_cost = cost;
                best_static = {Coding::kPair, code->id};
            }
        }
        const double cost = own_bits(sample.pairs, codewords);
        if (cost < own_cost) {
            own_cost = cost;
            best_own.coding = Coding::kPair;
        }
    }
    return own_cost < (1.0 - kOwnTableMustSave) * static_cost ? best_own : best_static;
}

}  // namespace qcomm
