// Which code a sigma segment gets: sigma_code.h has the prices, here is the sample.
#include <algorithm>
#include <utility>
#include <vector>

#include "pair_sample.h"
#include "qcomm/parallel.h"
#include "qcomm/sigma_code.h"

namespace qcomm {
namespace {

constexpr std::int64_t kPairsPerThread = 1 << 13;  // each a cache miss: about 0.1 ms
constexpr int kAhead = 32;

// Adds one thread's histogram to another's.
void add(const std::vector<std::uint32_t>& counts, std::vector<std::uint32_t>* sum) {
    for (std::size_t i = 0; i < counts.size(); ++i) (*sum)[i] += counts[i];
}

}  // namespace

// Each thread has histograms of its own.
PairSample draw_pairs(const Values& values, int num_bits, double step, std::int64_t n, std::uint32_t seed,
                      int threads) {
    const std::int64_t available = values.count / 2;
    const int parts = part_count(n, kPairsPerThread, threads);
    std::vector<PairSample> drawn(static_cast<std::size_t>(parts), PairSample(num_bits));
    dispatch(values.dtype, [&](auto traits) {
        using Tr = decltype(traits);
        const Reader<Tr> reader(values);
        const SigmaQuantizer<typename Tr::Arithmetic> grid(num_bits, step, Tr::kMax);
        parallel_for(n, parts, [&](int part, std::int64_t begin, std::int64_t end) {
            PairSample& sample = drawn[static_cast<std::size_t>(part)];
            std::int64_t at[kAhead];
            for (std::int64_t i = begin; i < end; i += kAhead) {
                // Every pair comes from far away: so many are asked for before the first of them is needed.
                const auto count = static_cast<int>(end - i < kAhead ? end - i : kAhead);
                for (int j = 0; j < count; ++j) {
                    at[j] = 2 * sample_index(i + j, n, available, seed);
                    reader.prefetch(at[j]);
                }
                for (int j = 0; j < count; ++j) {
                    const std::uint32_t first = grid(reader[at[j]]), second = grid(reader[at[j] + 1]);
                    ++sample.singles[first];
                    ++sample.singles[second];
                    if (num_bits == kPairBits) ++sample.pairs[first | second << kPairBits];
                }
            }
        });
    });
    for (std::size_t part = 1; part < drawn.size(); ++part) {
        add(drawn[part].singles, &drawn[0].singles);
        add(drawn[part].pairs, &drawn[0].pairs);
    }
    return std::move(drawn[0]);
}

namespace {

// Sums up a histogram for the prices of its own code, and of a static one, which may be null.
CodeSample price(const std::vector<std::uint32_t>& counts, const StaticCode* code) {
    CodeSample sample;
    for (std::size_t s = 0; s < counts.size(); ++s) sample.add(counts[s], code != nullptr ? code->lengths[s] : 0u);
    return sample;
}
std::uint8_t id_of(const StaticCode* code) { return code != nullptr ? code->id : kNoTable; }

}  // namespace

SigmaCode choose_sigma_code(const Values& values, int num_bits, double step, double k, std::uint32_t seed,
                            int threads) {
    // Symbols too wide for a code, and a tensor too small for a pair, have none.
    if (num_bits > kMaxCodedBits) return {Coding::kSingle, kNoTable};
    if (values.count < 2) return {Coding::kSingle, kNoTable};
    // Every static table is made for a step; the nearest one competes with a code of the segment's own. For nibbles
    // there are both for pairs, too.
    const PairSample sample = draw_pairs(values, num_bits, step, sampled_pairs(values.count), seed, threads);
    const StaticCode* const single = nearest_static_code(Coding::kSingle, num_bits, k);
    const CodeSample singles = price(sample.singles, single);
    if (num_bits != kPairBits)
        return cheapest_sigma_code(singles, nullptr, values.count, num_bits, id_of(single), kNoTable);
    const StaticCode* const pair = nearest_static_code(Coding::kPair, num_bits, k);
    const CodeSample pairs = price(sample.pairs, pair);
    return cheapest_sigma_code(singles, &pairs, values.count, num_bits, id_of(single), id_of(pair));
}

}  // namespace qcomm
