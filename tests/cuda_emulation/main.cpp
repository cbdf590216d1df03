// The kernels of csrc/cuda, run on the host and compared with the CPU codec. Usage: emulated_kernels GROUP [SEED...];
// the group codes=FILE reads histograms.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cases.h"
#include "launch.h"
#include "qcomm/sigma_code.h"
#include "suite.h"

namespace qcomm::test {
namespace {

using Float32 = Traits<DType::kFloat32>;
using Float16 = Traits<DType::kFloat16>;
using BFloat16 = Traits<DType::kBFloat16>;
using Float64 = Traits<DType::kFloat64>;

struct Grids {
    const char* name;
    Quantizer quantizer;
    double k;
    cuda::SampleRule rule;
};
cuda::SampleRule chosen_code() {
    cuda::SampleRule rule;
    rule.choose_code = true;
    return rule;
}
cuda::SampleRule chosen_bits(double c, int entropy_bits, double fraction, int max_bits) {
    return {c, entropy_bits, fraction, max_bits, 5, false};
}
const Grids kSigmaGrids[] = {
    {"single 1", sigma(4, Coding::kSingle, 14), 1.0, {}}, {"pair 1", sigma(4, Coding::kPair, 65), 1.0, {}},
    {"pair 4", sigma(4, Coding::kPair, 73), 4.0, {}},     {"single 1/8", sigma(7, Coding::kSingle, 2), 0.125, {}},
    {"no code", sigma(4, Coding::kSingle, 255), 1.0, {}}, {"14 bits", sigma(14, Coding::kSingle, 255), 0.001, {}},
};
const Grids kOwnGrids[] = {
    {"own pair", sigma(4, Coding::kPair, 0), 1.0, {}},
    {"range", range(Grid::kRangeEndpoint, 0), 1.0, chosen_bits(6.0, 4, 0.03, 16)},
    {"chosen", sigma(4, Coding::kSingle, 255), 1.0, chosen_code()},
    {"center 6", range(Grid::kRangeCenter, 6), 1.0, {}},
    {"own single", sigma(4, Coding::kSingle, 0), 0.9, {}},
    {"center, 2^12 bins", range(Grid::kRangeCenter, 0), 1.0, chosen_bits(0.5, 12, 0.1, 12)},
    {"chosen, 7 bits", sigma(7, Coding::kSingle, 255), 0.125, chosen_code()},
    {"endpoint 12", range(Grid::kRangeEndpoint, 12), 1.0, {}},
    {"chosen 4", sigma(4, Coding::kSingle, 255), 4.0, chosen_code()},
    {"own, 10 bits", sigma(10, Coding::kSingle, 0), 0.0125, {}},
    {"endpoint 1", range(Grid::kRangeEndpoint, 1), 1.0, {}},
    {"fixed 13", range(Grid::kRangeCenter, 13), 1.0, {}},
    {"range, c 12", range(Grid::kRangeEndpoint, 0), 1.0, chosen_bits(12.0, 4, 0.03, 16)},
    {"endpoint 16", range(Grid::kRangeEndpoint, 16), 1.0, {}},
};

// One tensor, one packet.
template <class Tr>
EncodeCase<Tr> one(Kind kind, std::int64_t n, const Grids& grid, bool feedback) {
    EncodeCase<Tr> c;
    c.values.push_back(make_values<Tr>(kind, n, static_cast<std::uint64_t>(n) + 7));
    c.residuals.emplace_back();
    if (feedback) {
        Random random(3);
        for (std::int64_t i = 0; i < n; ++i) c.residuals[0].push_back(static_cast<float>(0.1 * random.gaussian()));
        c.inv_scale = 1.0 / 1024.0;
    }
    c.quantizers.push_back(grid.quantizer);
    c.k.push_back(grid.k);
    c.rules.push_back(grid.rule);
    c.segments.push_back({0, 0, n, nullptr});
    c.packets.push_back(1);
    return c;
}

template <class Tr>
void sizes(const Grids* grids, int grid_count) {
    constexpr bool kFeedback = sizeof(typename Tr::Storage) >= 4;
    for (const std::int64_t n : {0, 1, 31, 32, 33, 63, 64, 65, 1023, 4095, 4097, 8191, 8192, 8193, 16385, 40001}) {
        for (int g = 0; g < grid_count; ++g) {
            const bool feedback = kFeedback && (n + g) % 2 == 0;
            {
                const Kind kind = kKinds[static_cast<std::size_t>(n + g) % std::size(kKinds)];
                EncodeCase<Tr> c = one<Tr>(n < 100 ? Kind::kGaussian : kind, n, grids[g], feedback);
                c.checksums = (n + g) % 5 != 0;
                c.steps = n % 2 == 0 ? 256 : n % 3 == 0 ? 64 : 17;
                const std::string name = std::string(name_of(dtype_of<Tr>())) + " " + grids[g].name +
                                         " n=" + std::to_string(n) + (feedback ? " feedback" : "");
                decode_both<Tr>(encode_both(c, name), name);
            }
        }
    }
}

template <class Tr>
void kinds(const Grids* grids, int grid_count, std::int64_t n = 20011, int every = 1) {
    for (const Kind kind : kKinds) {
        for (int g = 0; g < grid_count; ++g) {
            if ((static_cast<int>(kind) + g) % every != 0) continue;
            const bool feedback = sizeof(typename Tr::Storage) >= 4 && (g + static_cast<int>(kind)) % 2 == 0;
            EncodeCase<Tr> c = one<Tr>(kind, n, grids[g], feedback);
            c.steps = 64;
            c.nonfinite_is_constant = g % 2 == 0;
            const std::string name = std::string(name_of(dtype_of<Tr>())) + " " + grids[g].name + " " + name_of(kind);
            decode_both<Tr>(encode_both(c, name), name);
        }
    }
}

// Several tensors cut into segments of several packets, as in a collective; some are raw, constant, empty, small.
template <class Tr>
EncodeCase<Tr> bucket(std::uint64_t seed, int packets, bool feedback, const Grids* grids = kSigmaGrids,
                      std::size_t grid_count = 4) {
    EncodeCase<Tr> c;
    const std::int64_t counts[] = {9000, 3, 0, 20011, 700, 64 * 64 * 2};
    const Kind kinds_of[] = {Kind::kGaussian, Kind::kGaussian, Kind::kZeros,
                             Kind::kBursts,   Kind::kConstant, Kind::kHeavy};
    for (std::size_t t = 0; t < std::size(counts); ++t) {
        c.values.push_back(make_values<Tr>(kinds_of[t], counts[t], seed + t));
        c.residuals.emplace_back(feedback ? static_cast<std::size_t>(counts[t]) : 0u, 0.01f);
        const Grids& grid = grids[(t + seed) % grid_count];
        c.quantizers.push_back(t == 1 ? Quantizer{} : grid.quantizer);
        c.k.push_back(grid.k);
        c.rules.push_back(grid.rule);
    }
    for (int p = 0; p < packets; ++p) {
        int segments = 0;
        for (std::size_t t = 0; t < std::size(counts); ++t) {
            const std::int64_t begin = counts[t] * p / packets, end = counts[t] * (p + 1) / packets;
            if (t == 2 && p % 2 != 0) continue;
            c.segments.push_back({static_cast<std::int32_t>(t), begin, end - begin, nullptr});
            ++segments;
        }
        c.packets.push_back(segments);
    }
    c.steps = 64;
    return c;
}

template <class Tr>
void collective(int world, bool feedback, const Grids* grids = kSigmaGrids, std::size_t grid_count = 4) {
    const std::string name =
        std::string(name_of(dtype_of<Tr>())) + " bucket of " + std::to_string(world) + ", " + grids[0].name;
    std::vector<std::vector<std::uint8_t>> first_chunks;
    for (int rank = 0; rank < world; ++rank) {
        EncodeCase<Tr> c = bucket<Tr>(static_cast<std::uint64_t>(rank), 3, feedback, grids, grid_count);
        const auto packets = encode_both(c, name + ", rank " + std::to_string(rank));
        first_chunks.push_back(packets[0]);
        if (rank < 2) continue;
        for (const auto& packet : packets) decode_both<Tr>({packet}, name);
    }
    sum_both<Tr>(first_chunks, name);
}

void bucket_group() {
    collective<Float32>(3, true);
    collective<Float32>(11, false);
    collective<Float64>(2, true);
    collective<Float32>(3, true, kOwnGrids, std::size(kOwnGrids));
    decode_both<BFloat16>(encode_both(bucket<BFloat16>(5, 1, false), "bfloat16 bucket"), "bfloat16 bucket");
}

// One packet for each list of counts.
std::vector<std::vector<std::uint8_t>> packets_of(const std::vector<std::vector<std::int64_t>>& cuts) {
    std::vector<std::vector<std::uint8_t>> packets;
    for (const auto& counts : cuts) {
        EncodeCase<Float32> c;
        for (const std::int64_t count : counts) {
            const auto t = static_cast<std::int32_t>(c.values.size());
            c.values.push_back(make_values<Float32>(Kind::kGaussian, count, static_cast<std::uint64_t>(t)));
            c.residuals.emplace_back();
            c.quantizers.push_back(kSigmaGrids[1].quantizer);
            c.k.push_back(kSigmaGrids[1].k);
            c.rules.push_back(kSigmaGrids[1].rule);
            c.segments.push_back({t, 0, count, nullptr});
        }
        c.packets = {static_cast<int>(counts.size())};
        c.steps = 8;
        packets.push_back(encode_both(c, "other segments")[0]);
    }
    return packets;
}

void damage_group() {
    // The last segments are at the same place, but in tiles of other numbers.
    for (const auto& cuts : {std::vector<std::vector<std::int64_t>>{{32, 32, 100}, {64, 100}},
                             std::vector<std::vector<std::int64_t>>{{64, 100}, {32, 32, 100}},
                             std::vector<std::vector<std::int64_t>>{{700, 700, 3000}, {1400, 3000}}}) {
        refuse_sum<Float32>(packets_of(cuts), "packets with other segments were added up");
    }
    for (const Kind kind : {Kind::kGaussian, Kind::kHeavy, Kind::kSparse}) {
        for (const int g : {0, 1, 4}) {
            EncodeCase<Float32> c = one<Float32>(kind, 1500, kSigmaGrids[g], false);
            c.steps = 8;
            c.checksums = false;
            const std::string name = std::string("damaged ") + name_of(kind) + " " + kSigmaGrids[g].name;
            damage<Float32>(encode_both(c, name)[0], 40, emulation::seed + 1, name);
        }
    }
    for (const int g : {0, 2, 4, 9, 3}) {
        EncodeCase<Float32> c =
            one<Float32>(g == 4 ? Kind::kSparse : Kind::kGaussian, g == 9 ? 12000 : 3000, kOwnGrids[g], false);
        c.steps = 32;
        c.checksums = false;
        const std::string name = std::string("damaged ") + kOwnGrids[g].name;
        damage<Float32>(encode_both(c, name)[0], 60, emulation::seed + 1, name);
    }
    EncodeCase<Float16> c = bucket<Float16>(1, 1, false);
    c.checksums = true;
    c.segments.resize(3);
    c.packets[0] = 3;
    damage<Float16>(encode_both(c, "damaged bucket")[0], 80, emulation::seed + 1, "damaged bucket");
    runs_damage(emulation::seed + 1);
}

// Capacities that some packets exceed, and that no packet keeps.
void capacity_group() {
    for (const double fraction : {0.97, 0.5, 0.1, 0.001}) {
        for (int g = 0; g < 5; ++g) {
            const Grids& grid = g < 4 ? kSigmaGrids[g] : kOwnGrids[0];
            encode_capped(one<Float32>(Kind::kBursts, 40001, grid, true), fraction,
                          std::string("capacity ") + grid.name);
        }
        for (const bool feedback : {false, true}) {
            encode_capped(bucket<Float32>(0, 2, feedback), fraction, "capacity, bucket");
            encode_capped(bucket<Float32>(1, 2, feedback, kOwnGrids, 9), fraction, "capacity, bucket of own codes");
        }
    }
    runs_capacity();
}

// For ThreadSanitizer: several thread blocks in every launch, and few threads.
void race_group() {
    EncodeCase<Float32> c = one<Float32>(Kind::kGaussian, 40000, kSigmaGrids[1], true);
    c.steps = 64;
    decode_both<Float32>(encode_both(c, "race"), "race");
    c.quantizers[0] = {};
    decode_both<Float32>(encode_both(c, "race, raw"), "race, raw");
    c = one<Float32>(Kind::kGaussian, 33000, kOwnGrids[1], true);
    c.steps = 256;
    decode_both<Float32>(encode_both(c, "race, range"), "race, range");
    runs_race();
}

// Whole blocks of the default size.
void large_group() {
    EncodeCase<Float32> c = one<Float32>(Kind::kGaussian, 1 << 20, kSigmaGrids[1], true);
    const auto packets = encode_both(c, "1M, pairs");
    decode_both<Float32>(packets, "1M, pairs");
    sum_both<Float32>({packets[0], packets[0]}, "1M, pairs");
    for (const int g : {0, 1}) {
        c = one<Float32>(Kind::kHeavy, 1 << 20, kOwnGrids[g], true);
        decode_both<Float32>(encode_both(c, kOwnGrids[g].name), kOwnGrids[g].name);
    }
    // Around the length from which a table is made from a sample.
    for (const Grids& grid : {kOwnGrids[0], kOwnGrids[4]}) {
        for (const std::int64_t extra : {1, 2, 3})
            encode_both(one<Float32>(Kind::kHeavy, 2 * kTablePairs + extra, grid, true), grid.name);
    }
}

void codec_group() {
    const auto n = static_cast<int>(std::size(kSigmaGrids));
    sizes<Float32>(kSigmaGrids, n);
    kinds<Float32>(kSigmaGrids, n);
    sizes<Float16>(kSigmaGrids, 3);
    kinds<Float16>(kSigmaGrids, n);
    kinds<BFloat16>(kSigmaGrids, 3);
    kinds<Float64>(kSigmaGrids, 3);
    sizes<Float64>(kSigmaGrids, 2);
}

// Range grids and codes of a segment's own.
void own_group() {
    const auto n = static_cast<int>(std::size(kOwnGrids));
    sizes<Float32>(kOwnGrids, n);
    kinds<Float32>(kOwnGrids, n, 5001);
    kinds<Float16>(kOwnGrids, n, 2500, 2);
    kinds<BFloat16>(kOwnGrids, n, 2500, 3);
    kinds<Float64>(kOwnGrids, n, 2500, 3);
    sizes<Float16>(kOwnGrids, 2);
    sizes<BFloat16>(kOwnGrids, 2);
}

}  // namespace
}  // namespace qcomm::test

int main(int argc, char** argv) {
    const std::string group = argc > 1 ? argv[1] : "codec";
    for (int i = 2; i < std::max(argc, 3); ++i) {
        emulation::seed = argc > i ? std::strtoull(argv[i], nullptr, 10) : 0;
        if (group == "codec") qcomm::test::codec_group();
        if (group == "own") qcomm::test::own_group();
        if (group == "bucket") qcomm::test::bucket_group();
        if (group == "damage") qcomm::test::damage_group();
        if (group == "capacity") qcomm::test::capacity_group();
        if (group == "large") qcomm::test::large_group();
        if (group == "mean") qcomm::test::mean_group();
        if (group == "runs") qcomm::test::runs_group();
        if (group == "race") qcomm::test::race_group();
        if (group == "emulator") qcomm::test::emulator_group();
        if (group == "histogram") qcomm::test::histogram_group();
        if (group.rfind("codes=", 0) == 0) qcomm::test::code_lengths_of_file(group.substr(6));
        if (group.rfind("misuse", 0) == 0) qcomm::test::misuse(group);
    }
    std::printf("%s: passed\n", group.c_str());
}
