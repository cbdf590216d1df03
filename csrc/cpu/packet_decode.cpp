// Packets, reading the values. A SegmentDecoder reads a segment and hands its contents to a sink, of which there are
// two: values are stored or added, symbols are counted. Segments follow each other in the payload, so they are read in
// order; each one's blocks are shared by threads.
#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>

#include "packet_parts.h"
#include "qcomm/packet.h"
#include "qcomm/parallel.h"
#include "segment_decoder.h"
#include "zero_runs_decoder.h"

namespace qcomm {
namespace {

// Stores a segment's values, or adds them to those in memory: in the arithmetic of the dtype, with one rounding.
template <class Tr, bool kAdds>
class ValueSink {
public:
    using Storage = typename Tr::Storage;
    static constexpr bool kAccumulates = kAdds;

    explicit ValueSink(Storage* out) : out_(out) {}

    // Symbols are decoded to here by the loops themselves, which add if kAccumulates says so.
    void* values(std::int64_t begin) const { return out_ + begin; }
    void symbols(const std::uint16_t*, int) const {}  // never called, since there is a place for values
    void raw(std::int64_t begin, const std::uint8_t* bytes, std::int64_t n) const {
        for (std::int64_t i = 0; i < n; ++i) escape(begin + i, bytes + i * static_cast<std::int64_t>(sizeof(Storage)));
    }
    void escape(std::int64_t i, const std::uint8_t* bytes) const {
        Storage stored;
        // Values in a packet have no alignment.
        std::memcpy(&stored, bytes, sizeof(stored));
        put(i, stored);
    }
    void put(std::int64_t i, Storage stored) const {
        out_[i] = kAdds ? Tr::narrow(Tr::widen(out_[i]) + Tr::widen(stored)) : stored;
    }

private:
    Storage* out_;
};

// Counts how often each symbol occurs. It is used by one thread only.
class CountSink {
public:
    static constexpr bool kAccumulates = false;

    explicit CountSink(std::uint64_t* counts) : counts_(counts) {}

    void* values(std::int64_t) const { return nullptr; }
    void symbols(const std::uint16_t* symbols, int n) const {
        for (int i = 0; i < n; ++i) ++counts_[symbols[i]];
    }
    // Values without a symbol do not count.
    void raw(std::int64_t, const std::uint8_t*, std::int64_t) const {}
    void escape(std::int64_t, const std::uint8_t*) const {}

private:
    std::uint64_t* counts_;
};

// Values of coding runs: nearly all are 0, which storing writes in one go and adding leaves as they are.
template <class Tr, bool kAdds>
class RunSink {
public:
    using Storage = typename Tr::Storage;

    // Adds a part, whose values begin at `out`.
    void add(Storage* out, double step) {
        Part part{out, {}};
        const RunQuantizer<typename Tr::Arithmetic> grid(step);
        for (int level = -kMaxLevel; level <= kMaxLevel; ++level)
            part.values[level + kMaxLevel] = Tr::narrow(grid.decode(level));
        parts_.push_back(part);
    }
    void put(std::size_t number, std::int64_t begin, std::int64_t n, const std::uint16_t* positions,
             const std::int8_t* levels, int count, int base) const {
        const Part& part = parts_[number];
        Storage* const out = part.out + begin;
        if (!kAdds) std::memset(static_cast<void*>(out), 0, sizeof(Storage) * static_cast<std::size_t>(n));
        // A level's line of memory comes from far away, so it is asked for some levels ahead.
        constexpr int kAhead = 96;
        for (int i = 0; i < count; ++i) {
            if (kAdds && i + kAhead < count) __builtin_prefetch(out + (positions[i + kAhead] - base), 1);
            Storage& at = out[positions[i] - base];
            const Storage value = part.values[levels[i] + kMaxLevel];
            at = kAdds ? Tr::narrow(Tr::widen(at) + Tr::widen(value)) : value;
        }
    }
    void put_nan(std::size_t number, std::int64_t begin, std::int64_t n) const {
        using T = typename Tr::Arithmetic;
        std::fill_n(parts_[number].out + begin, n, Tr::narrow(std::numeric_limits<T>::quiet_NaN()));
    }

private:
    struct Part {
        Storage* out;
        Storage values[2 * kMaxLevel + 1];
    };
    std::vector<Part> parts_;
};

// Counts the levels + 3 of one part. It is used by one thread only.
class RunCountSink {
public:
    RunCountSink(std::size_t part, std::uint64_t* counts) : part_(part), counts_(counts) {}

    void put_nan(std::size_t, std::int64_t, std::int64_t) const {}  // NaN has no symbol
    void put(std::size_t part, std::int64_t, std::int64_t n, const std::uint16_t*, const std::int8_t* levels, int count,
             int) const {
        if (part != part_) return;
        counts_[kMaxLevel] += static_cast<std::uint64_t>(n - count);
        for (int i = 0; i < count; ++i) ++counts_[levels[i] + kMaxLevel];
    }

private:
    std::size_t part_;
    std::uint64_t* counts_;
};

// Decodes each segment to its own place in `outs`.
template <class Tr, bool kAdds>
Status decode_segments(const PacketView& view, const std::vector<typename Tr::Storage*>& outs, int threads) {
    SegmentPlace place;
    RunSink<Tr, kAdds> runs;
    std::vector<std::int64_t> run_counts;
    for (std::size_t i = 0; i < view.records.size(); ++i) {
        const SegmentRecord& r = view.records[i];
        const auto count = static_cast<std::int64_t>(r.count);
        const ValueSink<Tr, kAdds> sink(outs[i]);
        // Neither these nor a constant have a payload of their own, so `place` stays.
        if (r.coding == Coding::kRuns) {
            runs.add(outs[i], r.p1);
            run_counts.push_back(count);
        } else if (r.coding == Coding::kConstant) {
            const typename Tr::Storage value = Tr::narrow(static_cast<typename Tr::Arithmetic>(r.p0));
            parallel_for_values(count, threads, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t j = begin; j < end; ++j) sink.put(j, value);
            });
        } else {
            SegmentDecoder<Tr, ValueSink<Tr, kAdds>> decoder(view, i, threads, sink);
            QCOMM_RETURN_IF_ERROR(decoder.run(&place));
        }
    }
    return RunDecoder<RunSink<Tr, kAdds>>(view, run_counts, place, threads, runs).run();
}

// Decodes segments to where they lie one behind the other.
template <class Tr, bool kAdds>
Status decode_contiguous(const PacketView& view, typename Tr::Storage* out, int threads) {
    std::vector<typename Tr::Storage*> outs;
    outs.reserve(view.records.size());
    for (const SegmentRecord& r : view.records) {
        outs.push_back(out);
        out += r.count;
    }
    return decode_segments<Tr, kAdds>(view, outs, threads);
}

// Decodes segments to where the places of their values are. A segment in several places is decoded to memory of its
// own, and copied when all are decoded: run blocks come last.
template <class Tr>
Status decode_to_places(const PacketView& view, const std::vector<Place>& places, typename Tr::Storage* buffer,
                        int threads) {
    using Storage = typename Tr::Storage;
    struct Copy {
        std::unique_ptr<Storage[]> values;
        std::size_t place;   // the first one
        std::int64_t begin;  // in it
        std::int64_t count;
    };
    std::vector<Storage*> outs;
    outs.reserve(view.records.size());
    std::vector<Copy> copies;
    std::size_t place = 0;
    std::int64_t begin = 0;  // in `place`
    for (const SegmentRecord& r : view.records) {
        auto left = static_cast<std::int64_t>(r.count);
        while (place < places.size() && begin == places[place].count) {
            ++place;
            begin = 0;
        }
        if (left == 0) {
            outs.push_back(buffer);  // nothing is written
        } else if (left <= places[place].count - begin) {
            outs.push_back(buffer + places[place].offset + begin);
            begin += left;
        } else {
            copies.push_back(
                {std::unique_ptr<Storage[]>(new Storage[static_cast<std::size_t>(left)]), place, begin, left});
            outs.push_back(copies.back().values.get());
            for (; left > places[place].count - begin; ++place, begin = 0) left -= places[place].count - begin;
            begin += left;
        }
    }
    QCOMM_RETURN_IF_ERROR((decode_segments<Tr, false>(view, outs, threads)));
    for (const Copy& copy : copies) {
        const Storage* from = copy.values.get();
        const Storage* const end = from + copy.count;
        for (std::size_t i = copy.place; from < end; ++i) {
            const std::int64_t first = i == copy.place ? copy.begin : 0;
            const std::int64_t n = std::min<std::int64_t>(places[i].count - first, end - from);
            std::copy_n(from, n, buffer + places[i].offset + first);
            from += n;
        }
    }
    return {};
}

}  // namespace

// One dispatch for the whole packet: below it dtype and sink are known at compile time.
Status decode_packet(const PacketView& view, void* out, bool accumulate, int threads) {
    if (accumulate && item_bytes(view.header.dtype) < 4)
        return bad_argument("accumulate needs a float32 or float64 packet");
    return dispatch(view.header.dtype, [&](auto traits) {
        using Tr = decltype(traits);
        auto* const typed = static_cast<typename Tr::Storage*>(out);
        return accumulate ? decode_contiguous<Tr, true>(view, typed, threads)
                          : decode_contiguous<Tr, false>(view, typed, threads);
    });
}

Status decode_packet_to(const PacketView& view, const std::vector<Place>& places, void* buffer, std::int64_t count,
                        int threads) {
    auto left = static_cast<std::int64_t>(view.header.element_count);
    for (const Place& place : places) {
        if (place.offset < 0 || place.count < 0 || place.offset > count || place.count > count - place.offset)
            return bad_argument("a place lies outside the buffer; its first element is", place.offset);
        if (place.count > left)
            return bad_argument("the places hold more values than the packet, which has",
                                static_cast<std::int64_t>(view.header.element_count));
        left -= place.count;
    }
    if (left > 0) return bad_argument("the places hold fewer values than the packet; missing are", left);
    return dispatch(view.header.dtype, [&](auto traits) {
        using Tr = decltype(traits);
        return decode_to_places<Tr>(view, places, static_cast<typename Tr::Storage*>(buffer), threads);
    });
}

Status count_symbols(const PacketView& view, std::size_t index, std::uint64_t* counts) {
    // The segments before this one are passed over by their metadata alone.
    SegmentPlace place;
    const bool counts_runs = view.records[index].coding == Coding::kRuns;
    const std::size_t passed = counts_runs ? view.records.size() : index;
    std::size_t part = 0;  // of the run blocks
    std::vector<std::int64_t> run_counts;
    // parse_packet() has checked that block ends ascend and stay in the payload, so they may be relied on.
    for (std::size_t i = 0; i < passed; ++i) {
        const SegmentRecord& r = view.records[i];
        if (i == index) part = run_counts.size();
        if (r.coding == Coding::kRuns) run_counts.push_back(static_cast<std::int64_t>(r.count));
        const std::int64_t blocks = blocks_in(r, view.header.steps);
        place.block += blocks;
        place.checksum += checksums_in(r, view.header.steps);
        place.at = blocks > 0 ? 4 * static_cast<std::int64_t>(load_u32(view.block_ends + 4 * (place.block - 1)))
                              : place.at + plain_bytes(r, view.header.dtype);
    }
    if (counts_runs) {
        const RunCountSink sink(part, counts);
        return RunDecoder<RunCountSink>(view, run_counts, place, 1, sink).run();
    }
    return dispatch(view.header.dtype, [&](auto traits) {
        // One thread, since threads would add to the same counters.
        const CountSink sink(counts);
        return SegmentDecoder<decltype(traits), CountSink>(view, index, 1, sink).run(&place);
    });
}

}  // namespace qcomm
