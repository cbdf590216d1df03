// Zero runs: the emulated kernels against the CPU codec, from values without a level to values that all have one, alone
// and among segments of other codings.
#include <algorithm>
#include <cstddef>

#include "cases.h"
#include "suite.h"

namespace qcomm::test {
namespace {

using Float32 = Traits<DType::kFloat32>;
using Float64 = Traits<DType::kFloat64>;
using Bytes = std::vector<std::uint8_t>;

const Quantizer kRunGrid = sigma(kRunsBits, Coding::kRuns, kTableOnWire);

// Adds a tensor on a grid, with a residual.
template <class Tr>
void add_tensor(EncodeCase<Tr>* c, Kind kind, std::int64_t n, std::uint64_t seed, const Quantizer& grid, double k) {
    c->values.push_back(make_values<Tr>(kind, n, seed));
    c->residuals.emplace_back();
    Random random(seed + 1);
    // Zeros among the residuals leave runs of zeros among the sums.
    for (std::int64_t i = 0; i < n; ++i)
        c->residuals.back().push_back(i / 700 % 2 == 0 ? 0.0f : static_cast<float>(0.05 * random.gaussian()));
    c->quantizers.push_back(grid);
    c->k.push_back(k);
    c->rules.emplace_back();
}

// One tensor, one packet.
template <class Tr>
EncodeCase<Tr> one(Kind kind, std::int64_t n, double k, int steps) {
    EncodeCase<Tr> c;
    add_tensor(&c, kind, n, static_cast<std::uint64_t>(n) + 3, kRunGrid, k);
    c.segments.push_back({0, 0, n, nullptr});
    c.packets.push_back(1);
    c.steps = steps;
    c.inv_scale = n % 2 == 0 ? 1.0 : 1.0 / 3.0;
    c.checksums = n % 3 != 0;
    return c;
}

template <class Tr>
void check(const EncodeCase<Tr>& c, const std::string& name) {
    for (const Bytes& packet : encode_both(c, name)) {
        decode_both<Tr>({packet}, name);
        sum_both<Tr>({packet, packet, packet}, name);
    }
}

// With k a step is from a hundredth of most values to more than all of them.
template <class Tr>
void densities(const std::vector<std::int64_t>& sizes, const std::vector<int>& steps) {
    int turn = 0;
    for (const std::int64_t n : sizes) {
        for (const int s : steps) {
            for (const double k : {0.01, 0.5, 1.4, 2.2, 3.2, 4.5, 16.0}) {
                const Kind kind = kKinds[static_cast<std::size_t>(turn++) % std::size(kKinds)];
                check<Tr>(one<Tr>(turn % 2 == 0 ? Kind::kGaussian : kind, n, k, s),
                          std::string("runs, ") + name_of(kind) + ", n=" + std::to_string(n) +
                              ", steps=" + std::to_string(s) + ", k=" + std::to_string(k));
            }
        }
    }
}

// Tensors of several codings, each cut into as many segments as there are packets. The tensors that `special` names are
// constant or not finite on this rank, so that its run blocks have other borders than another rank's.
template <class Tr>
EncodeCase<Tr> bucket(std::uint64_t seed, int packets, int special, int steps) {
    struct Part {
        std::int64_t count;
        Kind kind;
        Quantizer grid;
        double k;
    };
    const Part parts[] = {
        {31, Kind::kGaussian, kRunGrid, 1.0},
        {1, Kind::kGaussian, kRunGrid, 3.2},
        {5000, Kind::kGaussian, sigma(4, Coding::kPair, 70), 2.4},
        {0, Kind::kZeros, kRunGrid, 3.2},
        {5000, Kind::kHeavy, kRunGrid, 3.2},
        {400, Kind::kGaussian, {}, 1.0},
        {33, Kind::kSparse, kRunGrid, 0.5},
        {9000, Kind::kSparse, kRunGrid, 3.4},
        {700, Kind::kUniform, range(Grid::kRangeCenter, 6), 1.0},
        {64, Kind::kConstant, kRunGrid, 3.2},
        {3000, Kind::kGaussian, kRunGrid, 4.0},
        {300, Kind::kGaussian, sigma(4, Coding::kSingle, 14), 1.0},
    };
    EncodeCase<Tr> c;
    for (std::size_t t = 0; t < std::size(parts); ++t) {
        const Part& p = parts[t];
        const bool other = special >= 0 && static_cast<int>(t) % 5 == special;
        add_tensor(&c, other ? Kind::kNonFinite : p.kind, p.count, seed + t, p.grid, p.k);
        if (p.grid.grid == Grid::kNone) c.residuals.back().clear();
    }
    for (int i = 0; i < packets; ++i) {
        int segments = 0;
        for (std::size_t t = 0; t < std::size(parts); ++t) {
            const std::int64_t begin = parts[t].count * i / packets, end = parts[t].count * (i + 1) / packets;
            c.segments.push_back({static_cast<std::int32_t>(t), begin, end - begin, nullptr});
            ++segments;
        }
        c.packets.push_back(segments);
    }
    c.steps = steps;
    c.nonfinite_is_constant = seed % 2 == 0;
    return c;
}

template <class Tr>
void buckets() {
    for (const int steps : {1, 2, 16, 512}) {
        const std::string name = "runs in a bucket, steps=" + std::to_string(steps);
        std::vector<Bytes> first_chunks;
        for (int rank = 0; rank < 3; ++rank) {
            const auto seed = static_cast<std::uint64_t>(10 * rank);
            const auto packets =
                encode_both(bucket<Tr>(seed, 2, rank == 0 ? -1 : rank, steps), name + ", rank " + std::to_string(rank));
            first_chunks.push_back(packets[0]);
            for (const Bytes& packet : packets) decode_both<Tr>({packet}, name);
        }
        sum_both<Tr>(first_chunks, name);
    }
}

// Values of float64 whose rest is no float32: their blocks are not coded.
void overflows() {
    for (const double scale : {1e38, 1e40}) {
        EncodeCase<Float64> c = bucket<Float64>(0, 2, -1, 2);
        for (const std::size_t t : {std::size_t{4}, std::size_t{10}}) {
            for (std::size_t i = 0; i < c.values[t].size(); i += 3) c.values[t][i] *= scale;
        }
        const std::vector<Bytes> packets = encode_both(c, "runs that overflow");
        for (const Bytes& packet : packets) {
            decode_both<Float64>({packet}, "runs that overflow");
            sum_both<Float64>({packet, packet}, "runs that overflow");
        }
    }
}

// Packets of 16-bit values cannot be encoded, since they carry no residual, but decoded. Run blocks are the same bytes
// for every dtype.
void half_precision() {
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
        Bytes packet = encode_both(one<Float32>(Kind::kGaussian, 3001, 3.2, 4), "runs")[0];
        packet[offsetof(PacketHeader, dtype)] = static_cast<std::uint8_t>(dtype);
        repair_header(&packet);
        dtype == DType::kFloat16 ? decode_both<Traits<DType::kFloat16>>({packet}, "runs, float16")
                                 : decode_both<Traits<DType::kBFloat16>>({packet}, "runs, bfloat16");
    }
}

}  // namespace

void runs_group() {
    densities<Float32>({1, 31, 32, 33, 129, 5000}, {1, 2, 16, 512});
    check<Float32>(one<Float32>(Kind::kGaussian, 150000, 3.2, 512), "runs, blocks of the default size");
    densities<Float64>({33, 5000}, {2, 512});
    buckets<Float32>();
    buckets<Float64>();
    overflows();
    half_precision();
}

void runs_race() { check<Float32>(one<Float32>(Kind::kGaussian, 9000, 3.2, 8), "race, runs"); }

void runs_capacity() {
    for (const double fraction : {0.97, 0.5, 0.2, 0.001}) {
        encode_capped(one<Float32>(Kind::kGaussian, 40001, 2.2, 16), fraction, "capacity, runs");
        encode_capped(bucket<Float32>(1, 2, -1, 4), fraction, "capacity, runs in a bucket");
    }
}

void runs_damage(std::uint64_t seed) {
    for (const double k : {0.02, 1.0, 3.2, 8.0}) {
        EncodeCase<Float32> c = one<Float32>(Kind::kGaussian, 2500, k, 4);
        c.checksums = false;
        damage<Float32>(encode_both(c, "damaged runs")[0], 80, seed, "damaged runs, k=" + std::to_string(k));
    }
    EncodeCase<Float32> c = bucket<Float32>(1, 4, -1, 2);
    c.packets.resize(1);
    c.segments.resize(static_cast<std::size_t>(c.packets[0]));
    c.checksums = false;
    damage<Float32>(encode_both(c, "damaged runs in a bucket")[0], 160, seed, "damaged runs in a bucket");
}

}  // namespace qcomm::test
