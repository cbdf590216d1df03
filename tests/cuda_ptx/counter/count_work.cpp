// One operation of the compiled kernels on Gaussian float32 values, for tools/cuda_model.py, which wants its counts.
// Usage: count_work OPERATION CODING VALUES STEPS PACKETS
//   OPERATION  encode, encode_ef (with a residual), decode, or sum (of all packets)
//   CODING     pair (sigma, 4 bits, step 1), or runs (step 3.3)
//   PACKETS    that the values are cut into
// CUDA_PTX_COUNTS names the file for them. Decoded values are compared with the CPU's.
#include <cstdlib>

#include "cases.h"
#include "qcomm/cuda.h"
#include "qcomm/packet.h"
#include "runtime.h"

namespace qcomm::test {
namespace {

constexpr double kRunStep = 3.3, kPairStep = 1.0;
constexpr int kPairTable = 65;

struct Work {
    std::string operation;
    bool runs;
    std::int64_t values;
    int steps, packets;
    std::int64_t begin(int packet) const { return values * packet / packets; }
    std::int64_t count(int packet) const { return begin(packet + 1) - begin(packet); }
};

std::vector<std::vector<std::uint8_t>> encode(const Work& work, const cuda::StaticTables& tables) {
    const auto values = make_values<Traits<DType::kFloat32>>(Kind::kGaussian, work.values, 5);
    const bool feedback = work.operation == "encode_ef" || work.runs;
    std::vector<float> residual(feedback ? values.size() : 0, 0.01f);
    const double scale = 1.0;
    cuda::Tensor tensor;
    tensor.values = values.data();
    tensor.count = work.values;
    tensor.quantizer.grid = Grid::kSigma;
    tensor.quantizer.num_bits = static_cast<std::uint8_t>(work.runs ? kRunsBits : 4);
    tensor.quantizer.coding = work.runs ? Coding::kRuns : Coding::kPair;
    tensor.quantizer.table = static_cast<std::uint8_t>(work.runs ? kTableOnWire : kPairTable);
    tensor.k = work.runs ? kRunStep : kPairStep;
    if (feedback) {
        tensor.residual = residual.data();
        tensor.inv_scale = &scale;
    }
    std::vector<cuda::Segment> segments;
    std::vector<cuda::Packet> packets(static_cast<std::size_t>(work.packets));
    for (int p = 0; p < work.packets; ++p) {
        segments.push_back({0, work.begin(p), work.count(p), feedback ? residual.data() + work.begin(p) : nullptr});
        packets[static_cast<std::size_t>(p)].dims = {work.count(p)};
    }
    const cuda::EncodePlan sizes(DType::kFloat32, work.steps, true, {tensor}, segments, packets);
    require(sizes.status().ok(), "the plan's sizes");
    std::vector<std::vector<std::uint8_t>> outputs;
    for (int p = 0; p < work.packets; ++p) {
        outputs.emplace_back(static_cast<std::size_t>(sizes.bound(p)));
        packets[static_cast<std::size_t>(p)].out = outputs.back().data();
        packets[static_cast<std::size_t>(p)].capacity = sizes.bound(p);
    }
    const cuda::EncodePlan plan(DType::kFloat32, work.steps, true, {tensor}, segments, packets);
    require(plan.status().ok(), "the plan");
    const std::vector<std::uint8_t> blob = plan.blob();
    std::vector<std::uint8_t> workspace(static_cast<std::size_t>(plan.workspace_bytes()));
    std::vector<std::int64_t> bytes(packets.size());
    require(plan.measure(blob.data(), &tables, workspace.data(), nullptr).ok(), "measuring");
    require(plan.encode(blob.data(), &tables, workspace.data(), bytes.data(), nullptr).ok(), "encoding");
    for (std::size_t p = 0; p < packets.size(); ++p) outputs[p].resize(static_cast<std::size_t>(bytes[p]));
    return outputs;
}

void decode(const Work& work, const cuda::StaticTables& tables, const std::vector<std::vector<std::uint8_t>>& packets) {
    const bool sums = work.operation == "sum";
    std::vector<float> got(static_cast<std::size_t>(work.values)), want = got;
    std::vector<cuda::DecodeTask> tasks;
    for (int p = 0; p < work.packets; ++p) {
        const auto& packet = packets[static_cast<std::size_t>(p)];
        const auto bytes = static_cast<std::int64_t>(packet.size());
        tasks.push_back({packet.data(), bytes, got.data() + (sums ? 0 : work.begin(p)), work.count(p), true});
        PacketView view;
        require(parse_packet(packet.data(), bytes, &view).ok(), "parsing");
        require(decode_packet(view, want.data() + (sums ? 0 : work.begin(p)), sums).ok(), "decoding on the CPU");
    }
    const cuda::DecodePlan plan(DType::kFloat32, work.steps, 1, tasks, 0, work.runs);
    require(plan.status().ok(), "the plan");
    const std::vector<std::uint8_t> blob = plan.blob();
    std::vector<std::uint8_t> workspace(static_cast<std::size_t>(plan.workspace_bytes()));
    std::vector<unsigned> faults(packets.size());
    const Status status = sums ? plan.decode_sum(blob.data(), &tables, workspace.data(), faults.data(), nullptr)
                               : plan.decode(blob.data(), &tables, workspace.data(), faults.data(), nullptr);
    require(status.ok(), "decoding");
    for (const unsigned fault : faults) require(fault == 0, "a fault");
    require(same_bytes(got, want), "other values than the CPU's");
}

}  // namespace
}  // namespace qcomm::test

int main(int argc, char** argv) {
    using namespace qcomm::test;
    require(argc == 6, "usage: count_work OPERATION CODING VALUES STEPS PACKETS");
    const Work work = {argv[1], std::string(argv[2]) == "runs", std::atoll(argv[3]), std::atoi(argv[4]),
                       std::atoi(argv[5])};
    static qcomm::cuda::StaticTables tables;
    qcomm::cuda::fill_static_tables(&tables);
    const auto packets = encode(work, tables);
    std::size_t bytes = 0;
    for (const auto& packet : packets) bytes += packet.size();
    std::printf("%zu\n", bytes);
    if (work.operation.rfind("encode", 0) == 0) return 0;
    ptx::forget_counts();
    decode(work, tables, packets);
}
