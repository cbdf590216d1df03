// Arbitrary bytes as a packet: parsed, decoded, added to a tensor, counted. Whatever they are, the answer is a status
// or values; nothing outside the packet is read and nothing outside the destination written; and every version of the
// inner loops gives the same answer. Zero runs that are accepted have the form of docs/format.md.
#include <cmath>
#include <memory>
#include <numeric>
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

// Blocks of up to 32 K elements are for one input in 16, others are small: elements are what costs time.
constexpr std::uint64_t kMaxElements = 1 << 16, kMostlyElements = 1 << 12;

// All that can be observed of a packet.
struct Answer {
    std::vector<Status> statuses;
    std::unique_ptr<Guarded> values, sums, counts;  // counts: of each symbol; null where there are none

    bool operator==(const Answer& other) const {
        return std::equal(statuses.begin(), statuses.end(), other.statuses.begin(), other.statuses.end(),
                          same_status) &&
               same(values, other.values) && same(sums, other.sums) && same(counts, other.counts);
    }

private:
    static bool same(const std::unique_ptr<Guarded>& a, const std::unique_ptr<Guarded>& b) {
        if (a == nullptr || b == nullptr) return a == b;
        return a->size() == b->size() && same_bytes(a->data(), b->data(), static_cast<std::size_t>(a->size()));
    }
};

// Decodes, or adds; only the packet may be at fault, and nothing beside the destination is touched. What is left in
// the destination of a packet that is refused is no part of an answer.
Status decode(const PacketView& view, bool accumulate, std::unique_ptr<Guarded>* out) {
    const Status status = decode_packet(view, (*out)->data(), accumulate);
    require((*out)->intact(), "decoding writes inside the destination only");
    require(status.ok() || status.code == (accumulate && item_bytes(view.header.dtype) < 4 ? StatusCode::kBadArgument
                                                                                           : StatusCode::kBadPacket),
            "decoding fails because of the packet only");
    if (!status.ok()) out->reset();
    return status;
}

// Decodes to three places, the last part first: the values are those of decoding to one.
void check_places(const PacketView& view, const Status& status, const Guarded* values) {
    const auto count = static_cast<std::int64_t>(view.header.element_count);
    const std::int64_t item = item_bytes(view.header.dtype), first = count / 3, second = count / 2;
    static std::vector<Place> places(3);
    places[0] = {count - first, first};
    places[1] = {0, second - first};
    places[2] = {second - first, count - second};
    Guarded out(count * item);
    const Status found = decode_packet_to(view, places, out.data(), count);
    require(out.intact() && same_status(found, status), "decoding to places answers as decoding does");
    std::int64_t at = 0;
    for (const Place& place : places) {
        require(!found.ok() || same_bytes(out.data() + place.offset * item, values->data() + at * item,
                                          static_cast<std::size_t>(place.count * item)),
                "places get the values in order");
        at += place.count;
    }
}

// Checks each run block against its first word. A run of zeros can be written in one way only, so the values tell the
// number of tokens; more of them could only be skips behind the last level.
template <class T>
void check_run_blocks(const PacketView& view, const Guarded& decoded) {
    const std::uint8_t* stored = decoded.data();
    static std::vector<T> values;
    values.clear();
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

// Adds the packet to ones and zeros by turns, beginning with either; adding to zero looks like storing.
template <class T>
void accumulate(const PacketView& view, bool begins_with_one, const Status& decoded, Answer* answer) {
    const std::size_t count = view.header.element_count;
    const auto base = [&](std::size_t i) { return static_cast<T>((i & 1) != begins_with_one); };
    answer->sums = std::make_unique<Guarded>(static_cast<std::int64_t>(count * sizeof(T)));
    auto* const sums = reinterpret_cast<T*>(answer->sums->data());
    for (std::size_t i = 0; i < count; ++i) sums[i] = base(i);
    const Status status = decode(view, true, &answer->sums);
    require(same_status(status, decoded), "accumulate fails where decoding fails");
    if (!status.ok()) return;
    const auto* const values = reinterpret_cast<const T*>(answer->values->data());
    bool added = true;
    for (std::size_t i = 0; i < count; ++i)
        added &= sums[i] == base(i) + values[i] || (sums[i] != sums[i] && values[i] != values[i]);
    require(added, "accumulate adds what decoding stores, rounded once");
}

// Counts the symbols of all segments: where decoding succeeds, of their alphabets, and no more than there are elements.
// Behind the alphabet memory ends.
void count(const PacketView& view, bool decodes, Answer* answer) {
    std::int64_t alphabet = 1;
    for (const SegmentRecord& r : view.records) {
        // Raw and constant records may hold any number of bits, since it means nothing there.
        if (r.coding == Coding::kRaw || r.coding == Coding::kConstant) continue;
        alphabet = std::max(alphabet, std::int64_t{1} << r.num_bits);
    }
    answer->counts = std::make_unique<Guarded>(alphabet * static_cast<std::int64_t>(sizeof(std::uint64_t)), 0);
    auto* const counts = reinterpret_cast<std::uint64_t*>(answer->counts->data());
    bool counted = true;
    for (std::size_t i = 0; i < view.records.size(); ++i) {
        answer->statuses.push_back(count_symbols(view, i, counts));
        counted &= answer->statuses.back().ok();
    }
    require(answer->counts->intact(), "symbols are of their alphabet");
    require(counted == decodes, "symbols can be counted where they can be decoded");
    const std::uint64_t total = std::accumulate(counts, counts + alphabet, std::uint64_t{0});
    require(!decodes || total <= view.header.element_count, "there are no more symbols than elements");
}

// `version` fills the destination: an element that is not written shows as a difference. `choice` is the input's hash.
Answer ask(const std::uint8_t* packet, std::int64_t bytes, int version, std::uint64_t choice) {
    Answer answer;
    static PacketView view, shorter;  // static: their memory is used again
    answer.statuses.push_back(parse_packet(packet, bytes, &view));
    if (!answer.statuses[0].ok()) {
        require(answer.statuses[0].code == StatusCode::kBadPacket, "parsing fails because of the packet only");
        return answer;
    }
    // A packet says how long it is, so no prefix of one is another.
    require(!parse_packet(packet, bytes - 1, &shorter).ok(), "a packet without its last byte is refused");
    // A constant segment of a few bytes may claim 2^42 values.
    if (view.header.element_count > (choice % 16 == 0 ? kMaxElements : kMostlyElements)) return answer;
    const std::int64_t item = item_bytes(view.header.dtype);
    const std::int64_t size = static_cast<std::int64_t>(view.header.element_count) * item;
    const auto fill = static_cast<std::uint8_t>(version);
    answer.values = std::make_unique<Guarded>(size, fill);
    const Status status = decode(view, false, &answer.values);
    answer.statuses.push_back(status);
    // Each of these decodes the packet once more, so most inputs are for one of them.
    const std::uint64_t test = choice / 16 % 4;
    if (test == 0 || test == 1) check_places(view, status, answer.values.get());
    if (test == 0 || test == 2) count(view, status.ok(), &answer);
    if (item == 2) {
        Guarded unused(size, fill);
        require(decode_packet(view, unused.data(), true).code == StatusCode::kBadArgument && unused.intact() &&
                    unused.holds_only(fill),
                "16-bit packets are not accumulated");
    } else {
        const bool one = choice / 64 % 2 == 0;
        if (test == 0 || test == 3)
            item == 4 ? accumulate<float>(view, one, status, &answer) : accumulate<double>(view, one, status, &answer);
        // All versions have the same values.
        if (status.ok() && version == 0)
            item == 4 ? check_run_blocks<float>(view, *answer.values) : check_run_blocks<double>(view, *answer.values);
    }
    return answer;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const std::uint64_t choice = hash(data, size);
    // Up to the end of memory or, at an odd address because packets need no alignment, from its beginning.
    Guarded copy(static_cast<std::int64_t>(size));
    std::uint8_t* const packet = choice / 128 % 4 == 0 ? copy.begin() + 1 : copy.data();
    if (size > 0) std::memcpy(packet, data, size);
    Answer scalar;
    on_two_versions(choice / 512, [&](int version) {
        Answer answer = ask(packet, static_cast<std::int64_t>(size), version, choice);
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
