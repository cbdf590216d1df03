// Arbitrary bytes as a packet: parsed, decoded, added to a tensor, counted. Whatever they are, the answer is a status
// or values; nothing outside the packet is read and nothing outside the destination written; and every version of the
// inner loops gives the same answer. Zero runs that are accepted have the form of docs/format.md.
#include <cmath>
#include <memory>
#include <utility>

#include "fuzz.h"
#include "qcomm/block.h"
#include "qcomm/packet.h"
#include "qcomm/zero_runs.h"
#include "repair.h"

using namespace qcomm;
using namespace qcomm::fuzz;

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

namespace {

constexpr std::uint64_t kMaxElements = 1 << 16;  // two of the largest blocks; more only costs time

// All that can be observed of a packet.
struct Answer {
    std::vector<Status> statuses;
    std::vector<std::uint8_t> values, sums;
    std::vector<std::pair<std::size_t, std::uint64_t>> counts;  // of the symbols that occur

    bool operator==(const Answer& other) const {
        return std::equal(statuses.begin(), statuses.end(), other.statuses.begin(), other.statuses.end(),
                          same_status) &&
               values == other.values && sums == other.sums && counts == other.counts;
    }
};

// Decodes, or adds; only the packet may be at fault, and nothing beside the destination is touched.
Status decode(const PacketView& view, bool accumulate, Guarded* out, std::vector<std::uint8_t>* decoded) {
    const Status status = decode_packet(view, out->data(), accumulate);
    require(out->intact(), "decoding writes inside the destination only");
    require(status.ok() || status.code == (accumulate && item_bytes(view.header.dtype) < 4 ? StatusCode::kBadArgument
                                                                                           : StatusCode::kBadPacket),
            "decoding fails because of the packet only");
    if (status.ok()) decoded->assign(out->data(), out->data() + out->size());
    return status;
}

// Decodes to three places, the last part first: the values are those of decoding to one.
void check_places(const PacketView& view, const Status& status, const std::vector<std::uint8_t>& values) {
    const auto count = static_cast<std::int64_t>(view.header.element_count);
    const std::int64_t item = item_bytes(view.header.dtype), first = count / 3, second = count / 2;
    const std::vector<Place> places{{count - first, first}, {0, second - first}, {second - first, count - second}};
    Guarded out(count * item);
    const Status found = decode_packet_to(view, places, out.data(), count);
    require(out.intact() && same_status(found, status), "decoding to places answers as decoding does");
    std::int64_t at = 0;
    for (const Place& place : places) {
        require(!found.ok() || same_bytes(out.data() + place.offset * item, values.data() + at * item,
                                          static_cast<std::size_t>(place.count * item)),
                "places get the values in order");
        at += place.count;
    }
}

// Adding to `base` gives it plus what decoding gives, rounded once.
template <class T>
void check_sums(const Answer& answer, T base) {
    for (std::size_t at = 0; at < answer.values.size(); at += sizeof(T)) {
        T value, sum;
        std::memcpy(&value, answer.values.data() + at, sizeof(T));
        std::memcpy(&sum, answer.sums.data() + at, sizeof(T));
        require(sum == base + value || (sum != sum && value != value), "accumulate adds what decoding stores");
    }
}

// Checks each run block against its first word. A run of zeros can be written in one way only, so the values tell the
// number of tokens; more of them could only be skips behind the last level.
template <class T>
void check_run_blocks(const PacketView& view, const Answer& answer) {
    const auto* stored = answer.values.data();
    std::vector<T> values;
    std::int64_t at = 0, block = 0;  // where the run blocks begin, and the number of the first
    const auto end_of = [&](std::int64_t number) {
        std::uint32_t end;
        std::memcpy(&end, view.block_ends + 4 * number, sizeof(end));
        return std::int64_t{4} * end;
    };
    for (const SegmentRecord& r : view.records) {
        const auto count = static_cast<std::int64_t>(r.count), blocks = blocks_in(r, view.header.steps);
        block += blocks;
        if (blocks > 0) at = end_of(block - 1);
        if (r.coding == Coding::kRaw) at += align4(count * static_cast<std::int64_t>(sizeof(T)));
        if (r.coding == Coding::kFixed) at += align4(packed_bytes(count, r.num_bits));
        for (std::int64_t i = 0; i < count; ++i, stored += sizeof(T)) {
            if (r.coding != Coding::kRuns) continue;
            T value;
            std::memcpy(&value, stored, sizeof(T));
            const T step = static_cast<T>(r.p1), size = std::fabs(value);
            require(value != value || size == T(0) || size == step || size == T(2) * step || size == T(3) * step,
                    "values of coding runs are levels or NaN");
            values.push_back(value);
        }
    }
    const auto total = static_cast<std::int64_t>(values.size());
    const std::int64_t blocks = run_blocks(total, view.header.steps);
    for (std::int64_t i = 0; i < blocks; at = end_of(block + i), ++i) {
        std::uint32_t word;
        std::memcpy(&word, view.payload + at, sizeof(word));
        const RunInfo info = RunInfo::unpack(word);
        int tokens = 0, run = 0;
        const std::int64_t end = run_block_begin(total, blocks, i + 1);
        for (std::int64_t j = run_block_begin(total, blocks, i); j < end; ++j) {
            const T value = values[static_cast<std::size_t>(j)];
            require((value != value) == (info.mode == RunMode::kNotFinite), "whole blocks are NaN");
            if (value != T(0)) tokens += 1 + run / kSkipZeros;
            run = value != T(0) ? 0 : run + 1;
        }
        require(info.mode != RunMode::kZeros || tokens == 0, "a block of zeros has no levels");
        require(info.mode != RunMode::kCoded || tokens == info.tokens, "a run block has the tokens of its levels");
    }
}

// Adds the packet to zeros, which looks like storing, and then to ones.
template <class T>
Status accumulate(const PacketView& view, Answer* answer) {
    Status status;
    for (const T base : {T(0), T(1)}) {
        Guarded sums(static_cast<std::int64_t>(view.header.element_count * sizeof(T)));
        std::fill_n(reinterpret_cast<T*>(sums.data()), view.header.element_count, base);
        status = decode(view, true, &sums, &answer->sums);
        require(same_status(status, answer->statuses.back()), "accumulate fails where decoding fails");
        if (status.ok()) check_sums<T>(*answer, base);
    }
    if (status.ok()) check_run_blocks<T>(view, *answer);
    return status;
}

// Counts the symbols of all segments: where decoding succeeds, of their alphabets, and no more than there are elements.
void count(const PacketView& view, Answer* answer) {
    static std::vector<std::uint64_t> counts(65536), zeros(65536);  // static: page faults would take longest of all
    const bool decodes = answer->statuses[1].ok();
    bool counted = true;
    std::size_t alphabet = 1;
    for (std::size_t i = 0; i < view.records.size(); ++i) {
        // Raw and constant records may hold any number of bits, since it means nothing there.
        if (view.records[i].num_bits <= 16) alphabet = std::max(alphabet, std::size_t{1} << view.records[i].num_bits);
        answer->statuses.push_back(count_symbols(view, i, counts.data()));
        counted &= answer->statuses.back().ok();
    }
    require(counted == decodes, "symbols can be counted where they can be decoded");
    require(same_bytes(counts.data() + alphabet, zeros.data(), (counts.size() - alphabet) * sizeof(counts[0])),
            "symbols are of their alphabet");
    std::uint64_t total = 0;
    for (std::size_t symbol = 0; symbol < alphabet; ++symbol) {
        if (counts[symbol] == 0) continue;
        answer->counts.emplace_back(symbol, counts[symbol]);
        total += counts[symbol];
        // For the next packet, as the vector is kept.
        counts[symbol] = 0;
    }
    require(!decodes || total <= view.header.element_count, "there are no more symbols than elements");
}

// `fill` differs between calls: an element that is not written shows as a difference.
Answer ask(const std::uint8_t* packet, std::int64_t bytes, std::uint8_t fill) {
    Answer answer;
    PacketView view;
    answer.statuses.push_back(parse_packet(packet, bytes, &view));
    if (!answer.statuses[0].ok()) {
        require(answer.statuses[0].code == StatusCode::kBadPacket, "parsing fails because of the packet only");
        return answer;
    }
    // A packet says how long it is, so no prefix of one is another.
    PacketView shorter;
    require(!parse_packet(packet, bytes - 1, &shorter).ok(), "a packet without its last byte is refused");
    // A constant segment of a few bytes may claim 2^42 values.
    if (view.header.element_count > kMaxElements) return answer;
    const std::int64_t item = item_bytes(view.header.dtype);
    Guarded out(static_cast<std::int64_t>(view.header.element_count) * item, fill);
    answer.statuses.push_back(decode(view, false, &out, &answer.values));
    check_places(view, answer.statuses.back(), answer.values);
    if (item == 2) {
        Guarded unused(out.size(), fill);
        require(!decode(view, true, &unused, &answer.sums).ok() && unused.holds_only(fill),
                "16-bit packets are not accumulated");
    } else {
        answer.statuses.push_back(item == 4 ? accumulate<float>(view, &answer) : accumulate<double>(view, &answer));
    }
    count(view, &answer);
    return answer;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    // At an odd address, because packets need no alignment, and up to the end of an allocation.
    const std::unique_ptr<std::uint8_t[]> copy(new std::uint8_t[size + 1]);
    if (size > 0) std::memcpy(copy.get() + 1, data, size);
    Answer scalar;
    on_every_version([&](int version) {
        Answer answer = ask(copy.get() + 1, static_cast<std::int64_t>(size), static_cast<std::uint8_t>(version));
        if (version == 0)
            scalar = std::move(answer);
        else
            require(answer == scalar, "every version gives the same answer");
    });
    return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size,
                                               unsigned seed) {
    // Mostly a mutation that is then repaired; sometimes one that is not, sometimes the packet without its checksums,
    // and sometimes another run block.
    if (seed % 16 == 0)
        size = strip_checksums(data, size);
    else if (seed % 16 == 2 || seed % 16 == 3)
        change_run_blocks(data, size, seed / 16);
    else
        size = LLVMFuzzerMutate(data, size, max_size);
    return seed % 16 == 1 ? size : repair(data, size);
}
