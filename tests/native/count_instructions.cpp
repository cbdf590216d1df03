// Runs every stage of the codec once, in a function of its own, for callgrind to count.
//
//   valgrind --tool=callgrind ./count_instructions avx2
//   ./count_instructions neon 8192        with so many values, for bench/bench_neon.py
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "qcomm/huffman.h"
#include "qcomm/packet.h"
#include "qcomm/processor.h"
#include "qcomm/statistics.h"

namespace {

int element_count = 1 << 17;

void check(const qcomm::Status& status) {
    if (status.ok()) return;
    std::fprintf(stderr, "%s\n", status.what);
    std::exit(1);
}

// Roughly normal values of standard deviation 1, the same everywhere: sums of twelve uniform ones.
std::vector<float> bell(std::uint32_t seed) {
    std::vector<float> values(static_cast<std::size_t>(element_count));
    for (float& value : values) {
        double sum = -6.0;
        for (int i = 0; i < 12; ++i) {
            seed = seed * 1664525u + 1013904223u;
            sum += static_cast<double>(seed) * 0x1p-32;
        }
        value = static_cast<float>(sum);
    }
    return values;
}

std::vector<std::uint8_t> encode(const qcomm::SegmentInput& segment) {
    qcomm::EncodeOptions options;
    options.dims = {element_count};
    std::vector<std::uint8_t> packet(static_cast<std::size_t>(qcomm::encode_bound({segment}, options)));
    std::int64_t bytes = 0;
    check(qcomm::encode_packet({segment}, options, packet.data(), static_cast<std::int64_t>(packet.size()), &bytes));
    packet.resize(static_cast<std::size_t>(bytes));
    return packet;
}

void decode(const std::vector<std::uint8_t>& packet, std::vector<float>* out, bool accumulate) {
    qcomm::PacketView view;
    check(qcomm::parse_packet(packet.data(), static_cast<std::int64_t>(packet.size()), &view));
    check(qcomm::decode_packet(view, out->data(), accumulate));
}

qcomm::SegmentInput segment(const std::vector<float>& values, qcomm::Coding coding, int table, double step) {
    qcomm::SegmentInput input;
    input.values.data = values.data();
    input.values.count = element_count;
    input.quantizer = {qcomm::Grid::kSigma, 4, coding, static_cast<std::uint8_t>(table), 0.0, step};
    return input;
}

// The names that the report is searched for; outside a function of its own a stage could be inlined away.
#define STAGE extern "C" __attribute__((noinline, used))

STAGE void stage_measure(const qcomm::Values& values) { qcomm::measure(values); }
STAGE std::vector<std::uint8_t> stage_encode_single(const qcomm::SegmentInput& s) { return encode(s); }
STAGE std::vector<std::uint8_t> stage_encode_pair(const qcomm::SegmentInput& s) { return encode(s); }
STAGE std::vector<std::uint8_t> stage_encode_range(const qcomm::SegmentInput& s) { return encode(s); }
STAGE void stage_encode_ef(const qcomm::SegmentInput& s) { encode(s); }
STAGE void stage_decode_single(const std::vector<std::uint8_t>& p, std::vector<float>* out) { decode(p, out, false); }
STAGE void stage_decode_pair(const std::vector<std::uint8_t>& p, std::vector<float>* out) { decode(p, out, false); }
STAGE void stage_decode_range(const std::vector<std::uint8_t>& p, std::vector<float>* out) { decode(p, out, false); }
STAGE void stage_accumulate(const std::vector<std::uint8_t>& p, std::vector<float>* out) { decode(p, out, true); }

}  // namespace

int main(int argc, char** argv) {
    if (argc == 3) element_count = std::atoi(argv[2]);
    if (argc < 2 || argc > 3 || element_count < 1 || !qcomm::use_kernel_version(argv[1])) {
        std::fprintf(stderr, "usage: count_instructions VERSION [VALUES], the version one of:");
        for (const std::string& name : qcomm::kernel_versions()) std::fprintf(stderr, " %s", name.c_str());
        std::fprintf(stderr, "\n");
        return 2;
    }
    const std::vector<float> values = bell(1);
    std::vector<float> residual = bell(2), out(values.size());
    const qcomm::SegmentInput single = segment(values, qcomm::Coding::kSingle, 14, 1.0);
    const qcomm::SegmentInput pair = segment(values, qcomm::Coding::kPair, 69, 2.0);
    qcomm::SegmentInput with_residual = single;
    with_residual.values.residual = with_residual.residual_out = residual.data();
    qcomm::SegmentInput range = single;
    const qcomm::Statistics statistics = qcomm::measure(single.values);
    range.quantizer = {qcomm::Grid::kRangeEndpoint, 10, qcomm::Coding::kSingle, 0, statistics.minimum,
                       statistics.maximum};

    encode(single), encode(pair);  // expands the static tables, once a process
    stage_measure(single.values);
    const auto single_packet = stage_encode_single(single);
    const auto pair_packet = stage_encode_pair(pair);
    const auto range_packet = stage_encode_range(range);
    stage_encode_ef(with_residual);
    stage_decode_single(single_packet, &out);
    stage_decode_pair(pair_packet, &out);
    stage_decode_range(range_packet, &out);
    stage_accumulate(single_packet, &out);
    return 0;
}
