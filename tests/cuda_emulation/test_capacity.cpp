// Packets with less room than they need: which blocks become zeros, and that the residual keeps what they held.
#include <algorithm>

#include "cases.h"
#include "qcomm/block.h"
#include "qcomm/packet.h"
#include "qcomm/zero_runs.h"
#include "suite.h"

namespace qcomm::test {
namespace {

using Bytes = std::vector<std::uint8_t>;

// Values of one segment, which begin at `begin` of the packet's.
struct Range {
    std::size_t segment;
    std::int64_t begin, count;
};
// A block, or a whole segment without blocks.
struct Part {
    std::vector<Range> ranges;
    std::int64_t bytes;  // of payload
    bool is_block;

    std::int64_t count() const {
        std::int64_t sum = 0;
        for (const Range& range : ranges) sum += range.count;
        return sum;
    }
};

// The parts of values [begin, end) of zero runs, of which `runs` are the segments.
std::vector<Range> ranges_of(const std::vector<Range>& runs, std::int64_t begin, std::int64_t end) {
    std::vector<Range> ranges;
    for (const Range& r : runs) {
        const std::int64_t first = std::clamp<std::int64_t>(begin, 0, r.count);
        const std::int64_t last = std::clamp<std::int64_t>(end, 0, r.count);
        if (last > first) ranges.push_back({r.segment, r.begin + first, last - first});
        begin -= r.count;
        end -= r.count;
    }
    return ranges;
}

std::vector<Part> parts_of(const PacketView& view) {
    std::vector<Part> parts;
    std::vector<Range> runs;
    std::int64_t value = 0, at = 0, block = 0, run_values = 0;
    const auto add_block = [&](std::vector<Range> ranges) {
        std::uint32_t end;
        std::memcpy(&end, view.block_ends + 4 * block++, sizeof(end));
        parts.push_back({std::move(ranges), 4 * std::int64_t{end} - at, true});
        at = 4 * std::int64_t{end};
    };
    for (std::size_t s = 0; s < view.records.size(); ++s) {
        const SegmentRecord& r = view.records[s];
        const auto count = static_cast<std::int64_t>(r.count);
        const std::int64_t blocks = blocks_in(r, view.header.steps);
        const std::int64_t per_block = values_per_block(r.coding, view.header.steps);
        for (std::int64_t b = 0; b < blocks; ++b)
            add_block({{s, value + b * per_block, std::min(per_block, count - b * per_block)}});
        std::int64_t bytes = 0;
        if (r.coding == Coding::kRaw) bytes = align4(4 * count);
        if (r.coding == Coding::kFixed) bytes = align4(packed_bytes(count, r.num_bits));
        if (r.coding == Coding::kRuns) {
            runs.push_back({s, value, count});
            run_values += count;
        } else if (!is_block_coded(r.coding)) {
            parts.push_back({{{s, value, count}}, bytes, false});
        }
        at += bytes;
        value += count;
    }
    const std::int64_t shared = run_blocks(run_values, view.header.steps);
    for (std::int64_t b = 0; b < shared; ++b)
        add_block(ranges_of(runs, run_block_begin(run_values, shared, b), run_block_begin(run_values, shared, b + 1)));
    return parts;
}

std::vector<float> decode(const Bytes& packet, std::int64_t bytes, PacketView* view, const std::string& name) {
    Status status = parse_packet(packet.data(), bytes, view);
    std::vector<float> values(status.ok() ? view->header.element_count : 0);
    if (status.ok()) status = decode_packet(*view, values.data(), false);
    require(status.ok(), name + ": " + status.what);
    return values;
}

}  // namespace

void encode_capped(const EncodeCase<Traits<DType::kFloat32>>& c, double fraction, const std::string& name) {
    std::vector<std::vector<float>> whole_residuals = c.residuals, residuals = c.residuals;
    const Made whole = encode_emulated(c, whole_residuals, {}, name);
    std::vector<std::int64_t> capacities;
    for (const std::int64_t total : whole.totals)
        capacities.push_back(static_cast<std::int64_t>(fraction * static_cast<double>(total)) / 4 * 4);
    const Made capped = encode_emulated(c, residuals, capacities, name);
    std::size_t first_segment = 0;
    for (std::size_t p = 0; p < capacities.size(); ++p) {
        const std::string where = name + ", packet " + std::to_string(p);
        const std::int64_t total = capped.totals[p], capacity = capacities[p];
        const bool sent = total > 0;
        require(std::abs(total) <= whole.totals[p] && sent == (std::abs(total) <= capacity), where + ": size");
        for (std::int64_t i = sent ? total : 0; i < capacity; ++i)
            require(capped.outputs[p][static_cast<std::size_t>(i)] == 0xC5, where + ": written behind the end");

        PacketView full, view;
        const std::vector<float> full_values = decode(whole.outputs[p], whole.totals[p], &full, where);
        const std::vector<float> values = sent ? decode(capped.outputs[p], total, &view, where) : full_values;
        const std::vector<Part> full_parts = parts_of(full), parts = sent ? parts_of(view) : full_parts;
        require(parts.size() == full_parts.size(), where + ": blocks");
        std::int64_t dropped = 0, first_saved = 0;
        for (std::size_t i = 0; i < parts.size(); ++i) {
            const Part &part = parts[i], &before = full_parts[i];
            const auto tensor_of = [&](const Range& range) {
                return static_cast<std::size_t>(c.segments[first_segment + range.segment].tensor);
            };
            const std::size_t first = part.ranges[0].segment;
            const bool feedback = !c.residuals[tensor_of(part.ranges[0])].empty();
            const bool may_drop =
                feedback && part.is_block && full.records[first].grid == Grid::kSigma && before.bytes > 4;
            const bool zeros = part.bytes != before.bytes;
            require(!zeros || (may_drop && part.bytes == 4), where + ": a block's size");
            require(zeros || !may_drop || first_saved == 0, where + ": a block behind the first dropped one stays");
            if (zeros && first_saved == 0) first_saved = before.bytes - 4;
            dropped += zeros ? part.count() : 0;
            for (const Range& range : part.ranges) {
                const std::size_t t = tensor_of(range);
                std::int64_t begin = 0;  // of the segment
                for (std::size_t s = 0; s < range.segment; ++s) begin += c.segments[first_segment + s].count;
                const std::int64_t offset = c.segments[first_segment + range.segment].offset - begin;
                for (std::int64_t j = range.begin; j < range.begin + range.count; ++j) {
                    const auto at = static_cast<std::size_t>(j), in = static_cast<std::size_t>(offset + j);
                    require(values[at] == (zeros ? 0.0f : full_values[at]), where + ": value");
                    if (c.residuals[t].empty()) continue;
                    const float u = c.values[t][in] * static_cast<float>(c.inv_scale) + c.residuals[t][in];
                    require(residuals[t][in] == (zeros || !sent ? u : whole_residuals[t][in]), where + ": residual");
                }
            }
        }
        first_segment += full.records.size();
        require(dropped == capped.dropped[p], where + ": values counted as dropped");
        require(first_saved == 0 || total + first_saved > capacity, where + ": too many blocks dropped");
    }
}

}  // namespace qcomm::test
