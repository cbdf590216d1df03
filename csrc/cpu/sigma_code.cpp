// Which code a sigma segment gets: sigma_code.h has the prices, here is the sample.
#include <algorithm>
#include <utility>
#include <vector>

#include "qcomm/parallel.h"
#include "qcomm/sigma_code.h"

namespace qcomm {
namespace {

constexpr std::int64_t kPairsPerThread = 1 << 13;  // each a cache miss: about 0.1 ms

// Histograms of the same pairs: of their symbols, and of the pairs. Both come from one pass, so codes of both kinds are
// priced by the same values.
struct Sample {
    explicit Sample(int num_bits) : singles(std::size_t{1} << num_bits), pairs(num_bits == kPairBits ? 256 : 0) {}
    std::vector<std::uint32_t> singles, pairs;  // histograms; pairs only for nibbles
};

// Adds one thread's histogram to another's.
void add(const std::vector<std::uint32_t>& counts, std::vector<std::uint32_t>* sum) {
    for (std::size_t i = 0; i < counts.size(); ++i) (*sum)[i] += counts[i];
}

// Draws neighbours 2a and 2a + 1 for indices a of a sample of half the values. Each thread has histograms of its own.
Sample draw(const Values& values, int num_bits, double step, std::uint32_t seed, int threads) {
    const std::int64_t available = values.count / 2;
    const std::int64_t n = sampled_pairs(values.count);
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
    const Sample sample = draw(values, num_bits, step, seed, threads);
    const StaticCode* const single = nearest_static_code(Coding::kSingle, num_bits, k);
    const CodeSample singles = price(sample.singles, single);
    if (num_bits != kPairBits)
        return cheapest_sigma_code(singles, nullptr, values.count, num_bits, id_of(single), kNoTable);
    const StaticCode* const pair = nearest_static_code(Coding::kPair, num_bits, k);
    const CodeSample pairs = price(sample.pairs, pair);
    return cheapest_sigma_code(singles, &pairs, values.count, num_bits, id_of(single), id_of(pair));
}

}  // namespace qcomm
