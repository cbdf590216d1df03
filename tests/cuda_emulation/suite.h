// A request to encode that both the CPU and the emulated kernels get.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "qcomm/cuda.h"

namespace qcomm::test {

template <class Tr>
struct EncodeCase {
    std::vector<std::vector<typename Tr::Storage>> values;  // by tensor
    std::vector<std::vector<float>> residuals;              // by tensor; empty: none
    std::vector<Quantizer> quantizers;
    std::vector<double> k;
    std::vector<cuda::SampleRule> rules;
    std::vector<cuda::Segment> segments;
    std::vector<int> packets;  // how many segments each has
    double inv_scale = 1.0;
    bool nonfinite_is_constant = false;
    bool checksums = true;
    int steps = 256;
};

template <class Tr>
constexpr DType dtype_of() {
    if (std::is_same_v<Tr, Traits<DType::kFloat16>>) return DType::kFloat16;
    if (std::is_same_v<Tr, Traits<DType::kBFloat16>>) return DType::kBFloat16;
    return std::is_same_v<Tr, Traits<DType::kFloat64>> ? DType::kFloat64 : DType::kFloat32;
}

// Encodes with the CPU and with the kernels and requires equal statistics, packets and residuals. Returns the packets.
template <class Tr>
std::vector<std::vector<std::uint8_t>> encode_both(const EncodeCase<Tr>& c, const std::string& name);

struct Made {
    std::vector<std::vector<std::uint8_t>> outputs;  // of the capacities, 0xC5 where nothing was written
    std::vector<std::int64_t> totals, dropped;
    std::vector<Statistics> statistics;
    std::vector<Quantizer> quantizers;
};

// Encodes with the kernels alone, into the bounds or into `capacities`; `residuals` are updated.
template <class Tr>
Made encode_emulated(const EncodeCase<Tr>& c, std::vector<std::vector<float>>& residuals,
                     const std::vector<std::int64_t>& capacities, const std::string& name);

// Encodes into capacities that are a fraction of the packets' sizes. What is not sent must be zeros, and whole in the
// residual; nothing may be dropped that there is room for.
void encode_capped(const EncodeCase<Traits<DType::kFloat32>>& c, double fraction, const std::string& name);

// Decodes packets of the same steps with both, each to its own values, which must be equal.
template <class Tr>
void decode_both(const std::vector<std::vector<std::uint8_t>>& packets, const std::string& name);

// Adds packets of the same shape with both; the sums must be equal.
template <class Tr>
void sum_both(const std::vector<std::vector<std::uint8_t>>& packets, const std::string& name);

// Adds packets whose segments differ, which must be a fault.
template <class Tr>
void refuse_sum(const std::vector<std::vector<std::uint8_t>>& packets, const std::string& name);

// Damages the packet `rounds` times. The kernels must refuse what the CPU refuses, and else decode the same values.
template <class Tr>
void damage(const std::vector<std::uint8_t>& packet, int rounds, std::uint64_t seed, const std::string& name);

// The emulation itself: warp operations give what CUDA documents.
void emulator_group();

// Does what hangs or is undefined on a GPU; the emulation must end the program.
void misuse(const std::string& which);

// Makes a packet's header checksum fit again, where the metadata lies inside it.
void repair_header(std::vector<std::uint8_t>* packet);

// Zero runs: whole packets, several blocks at once, packets that are dropped from, and damaged ones.
void runs_group();
void runs_race();
void runs_capacity();
void runs_damage(std::uint64_t seed);

// What a mean on a device needs besides packets.
void mean_group();

// Of fill_static_tables().
const cuda::StaticTables* codes();

// Counts codewords and makes codes of counts; both must be what the CPU makes of them.
void histogram_group();
void code_lengths_of_file(const std::string& path);

inline Quantizer range(Grid grid, int num_bits) {
    return {grid,
            static_cast<std::uint8_t>(num_bits),
            num_bits > kMaxCodedBits ? Coding::kFixed : Coding::kSingle,
            kTableOnWire,
            0.0,
            0.0};
}
inline Quantizer sigma(int num_bits, Coding coding, int table) {
    return {Grid::kSigma, static_cast<std::uint8_t>(num_bits), coding, static_cast<std::uint8_t>(table), 0.0, 0.0};
}

}  // namespace qcomm::test
