// Decoding: the emulated kernels against the CPU codec, on whole packets and on damaged ones.
#include <algorithm>
#include <memory>

#include "cases.h"
#include "qcomm/checksum.h"
#include "qcomm/packet.h"
#include "qcomm/zero_runs.h"
#include "suite.h"

namespace qcomm::test {
namespace {

using Bytes = std::vector<std::uint8_t>;

constexpr int kMaxSegments = 12;

Status decode_on_cpu(const Bytes& packet, void* out, bool accumulate) {
    PacketView view;
    QCOMM_RETURN_IF_ERROR(parse_packet(packet.data(), static_cast<std::int64_t>(packet.size()), &view));
    return decode_packet(view, out, accumulate);
}

// A copy in memory of its own, of exactly the packet's size: a read behind it is seen by AddressSanitizer.
std::unique_ptr<std::uint32_t[]> exact_copy(const Bytes& packet) {
    std::unique_ptr<std::uint32_t[]> copy(new std::uint32_t[(packet.size() + 3) / 4]);
    if (!packet.empty()) std::memcpy(copy.get(), packet.data(), packet.size());
    return copy;
}

// Runs decode(), or decode_sum() when there is one output for all.
std::vector<unsigned> run(DType dtype, int steps, int own_code_bits, const std::vector<cuda::DecodeTask>& tasks,
                          bool sum, bool takes_runs = true) {
    const cuda::DecodePlan plan(dtype, steps, kMaxSegments, tasks, own_code_bits, takes_runs);
    require(plan.status().ok(), plan.status().what);
    const Bytes blob = plan.blob();
    Bytes workspace(static_cast<std::size_t>(plan.workspace_bytes()), std::uint8_t{0xA5});
    std::vector<unsigned> faults(tasks.size(), 77u);
    const Status status = sum ? plan.decode_sum(blob.data(), codes(), workspace.data(), faults.data(), nullptr)
                              : plan.decode(blob.data(), codes(), workspace.data(), faults.data(), nullptr);
    require(status.ok(), status.what);
    return faults;
}

// The most bits of a symbol in a segment with a code of its own.
int own_code_bits(const std::vector<Bytes>& packets) {
    int bits = 0;
    for (const Bytes& packet : packets) {
        PacketView view;
        require(parse_packet(packet.data(), static_cast<std::int64_t>(packet.size()), &view).ok(), "own_code_bits");
        for (const SegmentRecord& r : view.records) {
            if (is_block_coded(r.coding) && r.table == kTableOnWire) bits = std::max(bits, int{r.num_bits});
        }
    }
    return bits;
}

std::uint16_t steps_of(const Bytes& packet) {
    std::uint16_t steps;
    std::memcpy(&steps, packet.data() + offsetof(PacketHeader, steps), sizeof(steps));
    return steps;
}
std::uint64_t elements_of(const Bytes& packet) {
    std::uint64_t elements;
    std::memcpy(&elements, packet.data() + offsetof(PacketHeader, element_count), sizeof(elements));
    return elements;
}

}  // namespace

void repair_header(Bytes* packet) {
    std::memset(packet->data() + offsetof(PacketHeader, header_checksum), 0, 4);
    PacketHeader h;
    std::memcpy(&h, packet->data(), sizeof(h));
    if (!is_valid(h.dtype)) return;
    std::uint64_t payload = sizeof(h) + std::uint64_t{8} * h.ndim +
                            static_cast<std::uint64_t>(record_bytes(h.dtype)) * h.segment_count +
                            std::uint64_t{4} * h.lengths_words;
    const std::uint64_t records = sizeof(h) + std::uint64_t{8} * h.ndim;
    if (payload > packet->size() || h.steps == 0) return;
    std::int64_t run_values = 0;
    for (std::uint64_t s = 0; s < h.segment_count; ++s) {
        const SegmentRecord r =
            load_record(h.dtype, packet->data() + records + s * static_cast<std::uint64_t>(record_bytes(h.dtype)));
        if (r.coding == Coding::kRuns) run_values += static_cast<std::int64_t>(r.count);
        payload += 4 * static_cast<std::uint64_t>(blocks_in(r, h.steps));
        if ((h.flags & kFlagChecksums) != 0) payload += 4 * static_cast<std::uint64_t>(checksums_in(r, h.steps));
    }
    const auto shared = static_cast<std::uint64_t>(run_blocks(run_values, h.steps));
    payload += ((h.flags & kFlagChecksums) != 0 ? 8 : 4) * shared;
    if (payload > packet->size()) return;
    const std::uint32_t sum = checksum(packet->data(), static_cast<std::int64_t>(payload));
    std::memcpy(packet->data() + offsetof(PacketHeader, header_checksum), &sum, sizeof(sum));
}

template <class Tr>
void decode_both(const std::vector<Bytes>& packets, const std::string& name) {
    using Storage = typename Tr::Storage;
    std::vector<std::vector<Storage>> expected, outputs;
    std::vector<std::unique_ptr<std::uint32_t[]>> copies;
    std::vector<cuda::DecodeTask> tasks;
    for (const Bytes& packet : packets) {
        const auto n = static_cast<std::size_t>(elements_of(packet));
        expected.emplace_back(n);
        outputs.emplace_back(n + 1, Storage(77));
        copies.push_back(exact_copy(packet));
        const Status status = decode_on_cpu(packet, expected.back().data(), false);
        require(status.ok(), name + ": CPU: " + status.what);
    }
    for (std::size_t p = 0; p < packets.size(); ++p) {
        tasks.push_back({reinterpret_cast<const std::uint8_t*>(copies[p].get()),
                         static_cast<std::int64_t>(packets[p].size()), outputs[p].data(),
                         static_cast<std::int64_t>(expected[p].size()), true});
    }
    const std::vector<unsigned> faults =
        run(dtype_of<Tr>(), steps_of(packets[0]), own_code_bits(packets), tasks, false);
    for (std::size_t p = 0; p < packets.size(); ++p) {
        const std::string where = name + ", packet " + std::to_string(p);
        require(faults[p] == 0, where + ": fault " + std::to_string(faults[p]));
        require(outputs[p].back() == Storage(77), where + ": written behind the end");
        outputs[p].pop_back();
        require(same_bytes(outputs[p], expected[p]), where + ": decoded values");
    }
    if (const int bits = own_code_bits(packets); bits > 8 && elements_of(packets[0]) < 5000) {
        for (const int fewer : {0, bits - 1}) {
            const std::vector<unsigned> refused = run(dtype_of<Tr>(), steps_of(packets[0]), fewer, tasks, false);
            require(std::count(refused.begin(), refused.end(), 0u) < static_cast<std::ptrdiff_t>(packets.size()),
                    name + ": a code of more bits than expected was not refused");
        }
    }
}

template <class Tr>
void refuse_sum(const std::vector<Bytes>& packets, const std::string& name) {
    using Storage = typename Tr::Storage;
    const auto n = static_cast<std::size_t>(elements_of(packets[0]));
    std::vector<Storage> output(n + 1, Storage(77));
    std::vector<std::unique_ptr<std::uint32_t[]>> copies;
    std::vector<cuda::DecodeTask> tasks;
    for (const Bytes& packet : packets) {
        copies.push_back(exact_copy(packet));
        tasks.push_back({reinterpret_cast<const std::uint8_t*>(copies.back().get()),
                         static_cast<std::int64_t>(packet.size()), output.data(), static_cast<std::int64_t>(n), true});
    }
    const std::vector<unsigned> faults = run(dtype_of<Tr>(), steps_of(packets[0]), own_code_bits(packets), tasks, true);
    require(std::count(faults.begin(), faults.end(), 0u) < static_cast<std::ptrdiff_t>(faults.size()), name);
    require(output.back() == Storage(77), name + ": written behind the end");
}

template <class Tr>
void sum_both(const std::vector<Bytes>& packets, const std::string& name) {
    using Storage = typename Tr::Storage;
    const auto n = static_cast<std::size_t>(elements_of(packets[0]));
    std::vector<Storage> expected(n), output(n + 1, Storage(77));
    std::vector<std::unique_ptr<std::uint32_t[]>> copies;
    std::vector<cuda::DecodeTask> tasks;
    for (const Bytes& packet : packets) {
        const Status status = decode_on_cpu(packet, expected.data(), !tasks.empty());
        require(status.ok(), name + ": CPU: " + status.what);
        copies.push_back(exact_copy(packet));
        tasks.push_back({reinterpret_cast<const std::uint8_t*>(copies.back().get()),
                         static_cast<std::int64_t>(packet.size()), output.data(), static_cast<std::int64_t>(n), true});
    }
    const std::vector<unsigned> faults = run(dtype_of<Tr>(), steps_of(packets[0]), own_code_bits(packets), tasks, true);
    for (const unsigned fault : faults) require(fault == 0, name + ": fault " + std::to_string(fault));
    require(output.back() == Storage(77), name + ": written behind the end");
    output.pop_back();
    require(same_bytes(output, expected), name + ": sum");
}

// Damages a packet in every way that passes its header checksum, and requires the CPU's verdict and values.
template <class Tr>
void damage(const Bytes& packet, int rounds, std::uint64_t seed, const std::string& name) {
    using Storage = typename Tr::Storage;
    Random random(seed);
    const auto below = [&](std::size_t n) {
        return static_cast<std::size_t>(random.uniform() * static_cast<double>(n));
    };
    const auto n = static_cast<std::size_t>(elements_of(packet));
    int accepted = 0;
    for (int round = 0; round < rounds; ++round) {
        const std::string where = name + ", round " + std::to_string(round);
        Bytes bad = packet;
        if (round % 4 == 1) bad.resize(below(packet.size()));  // truncated
        for (std::size_t i = 0, flips = 1 + below(3); i < flips && !bad.empty(); ++i) {
            // Every second damage is to the metadata, where there is more to break.
            const std::size_t at = below(round % 2 == 0 ? std::min<std::size_t>(bad.size(), 160) : bad.size());
            bad[at] = static_cast<std::uint8_t>(random.uniform() < 0.5 ? bad[at] ^ 1u << below(8) : below(256));
        }
        // Checksums are off and the header's is made to fit again, so that what lies behind them is reached.
        if (bad.size() >= sizeof(PacketHeader) && round % 4 != 3) {
            const std::uint64_t total = bad.size();
            if (round % 8 != 5) std::memcpy(bad.data() + offsetof(PacketHeader, total_bytes), &total, sizeof(total));
            repair_header(&bad);
        }
        std::vector<Storage> expected(n + 1, Storage(0)), output(n + 1, Storage(77));
        PacketView view;
        Status status = parse_packet(bad.data(), static_cast<std::int64_t>(bad.size()), &view);
        const bool same_shape = status.ok() && view.header.element_count == n && view.header.dtype == dtype_of<Tr>() &&
                                view.header.steps == steps_of(packet) && view.header.segment_count <= kMaxSegments;
        if (same_shape) status = decode_packet(view, expected.data(), false);
        const auto copy = exact_copy(bad);
        const std::vector<cuda::DecodeTask> task = {{reinterpret_cast<const std::uint8_t*>(copy.get()),
                                                     static_cast<std::int64_t>(bad.size()), output.data(),
                                                     static_cast<std::int64_t>(n), true}};
        const unsigned fault = run(dtype_of<Tr>(), steps_of(packet), kMaxCodedBits, task, false)[0];
        require(
            (fault == 0) == (same_shape && status.ok()),
            where + ": fault " + std::to_string(fault) + ", but the CPU says: " + (status.ok() ? "fine" : status.what));
        require(output.back() == Storage(77), where + ": written behind the end");
        if (fault != 0) continue;
        ++accepted;
        for (std::size_t i = 0; i < n; ++i) {
            const auto a = Tr::widen(output[i]), b = Tr::widen(expected[i]);
            require(std::memcmp(&output[i], &expected[i], sizeof(Storage)) == 0 || a == b, where + ": decoded values");
        }
    }
    require(accepted > 0 && accepted < rounds, name + ": " + std::to_string(accepted) + " accepted");
}

template void decode_both<Traits<DType::kFloat32>>(const std::vector<Bytes>&, const std::string&);
template void decode_both<Traits<DType::kFloat16>>(const std::vector<Bytes>&, const std::string&);
template void decode_both<Traits<DType::kBFloat16>>(const std::vector<Bytes>&, const std::string&);
template void decode_both<Traits<DType::kFloat64>>(const std::vector<Bytes>&, const std::string&);
template void refuse_sum<Traits<DType::kFloat32>>(const std::vector<Bytes>&, const std::string&);
template void sum_both<Traits<DType::kFloat32>>(const std::vector<Bytes>&, const std::string&);
template void sum_both<Traits<DType::kFloat64>>(const std::vector<Bytes>&, const std::string&);
template void damage<Traits<DType::kFloat32>>(const Bytes&, int, std::uint64_t, const std::string&);
template void damage<Traits<DType::kFloat16>>(const Bytes&, int, std::uint64_t, const std::string&);

}  // namespace qcomm::test
