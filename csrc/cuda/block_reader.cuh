// One block of a packet in one warp: its parts told apart and checked, its codewords looked up 32 a step, its escapes
// put in their places (specification: decode_block() of qcomm/reference/decode.py, decode_lanes() of
// qcomm/reference/lanes.py). csrc/include/qcomm/block.h has the layout.
//
// A value comes from a table of values in shared memory, one a symbol, so neither the grid's arithmetic nor the
// narrowing to the dtype is done per value; for alphabets of more than 8 bits it is. The escape symbol stands there as
// -0.0, which no level of a sigma grid is: where an escape's value goes, that must be found.
#pragma once

#include <type_traits>

#include "coder.cuh"
#include "lane_reader.cuh"
#include "packet_view.cuh"
#include "warp.cuh"

namespace qcomm::cuda {

// A lookup gives length | symbol << 16. A shift looks at the 5 lowest bits only, so nothing has to be cut out.
constexpr int kSymbolAt = 16;
__device__ __forceinline__ std::uint32_t lookup_entry(std::uint16_t entry) {
    return (entry & 0xFFFu) << kSymbolAt | static_cast<std::uint32_t>(entry >> 12);
}

// Values of symbols, by three ways with one interface: of a symbol, and of an entry that a lookup gave. Two compute
// them, as the quantizers' decode() does; the third looks them up.
template <class Tr>
class RangeValues {
public:
    __device__ explicit RangeValues(const Quantizer& q) : grid_(q.grid, q.num_bits, q.p0, q.p1) {}
    __device__ __forceinline__ typename Tr::Storage operator()(std::uint32_t symbol) const {
        return Tr::narrow(grid_.decode(symbol));
    }
    __device__ __forceinline__ typename Tr::Storage of_entry(std::uint32_t entry) const {
        return (*this)(entry >> kSymbolAt);
    }

private:
    RangeQuantizer grid_;
};
template <class Tr>
class SigmaValues {
public:
    __device__ explicit SigmaValues(const Quantizer& q)
        : grid_(q.num_bits, q.p1, Tr::kMax), escape_(static_cast<std::uint32_t>(escape_symbol(q.num_bits))) {}
    __device__ __forceinline__ typename Tr::Storage operator()(std::uint32_t symbol) const {
        return Tr::narrow(symbol == escape_ ? -T(0) : grid_.decode(symbol));
    }
    __device__ __forceinline__ typename Tr::Storage of_entry(std::uint32_t entry) const {
        return (*this)(entry >> kSymbolAt);
    }

private:
    using T = typename Tr::Arithmetic;
    SigmaQuantizer<T> grid_;
    std::uint32_t escape_;
};
template <class Storage>
struct TableValues {
    const Storage* values;
    __device__ __forceinline__ Storage operator()(std::uint32_t symbol) const { return values[symbol]; }
    // A shift and an addition are one instruction. The bits between a length and a symbol are 0.
    __device__ __forceinline__ Storage of_entry(std::uint32_t entry) const {
        constexpr int kBytesAt = kSymbolAt - (sizeof(Storage) == 8 ? 3 : sizeof(Storage) == 4 ? 2 : 1);
        return *reinterpret_cast<const Storage*>(reinterpret_cast<const std::uint8_t*>(values) + (entry >> kBytesAt));
    }
};

// The table of values of a small alphabet, by `threads` threads that call with their numbers. A barrier must follow.
template <class Tr>
__device__ void fill_values(typename Tr::Storage* values, const Quantizer& q, int thread, int threads) {
    // Of a raw or constant segment num_bits means nothing and may be any byte of a hostile record.
    if (!has_symbols(q.coding) || (1 << q.num_bits) > kMaxValueTable) return;
    const auto fill = [&](const auto& value) {
        for (int s = thread; s < 1 << q.num_bits; s += threads) values[s] = value(static_cast<std::uint32_t>(s));
    };
    q.grid == Grid::kSigma ? fill(SigmaValues<Tr>(q)) : fill(RangeValues<Tr>(q));
}

// Element i of values that are aligned to 2 bytes (escapes) or 4 (raw ones).
template <class Tr>
__device__ __forceinline__ typename Tr::Storage load_value(const std::uint8_t* at, std::int64_t i) {
    const auto* halves =
        reinterpret_cast<const std::uint16_t*>(at) + i * static_cast<std::int64_t>(sizeof(typename Tr::Storage) / 2);
    if constexpr (sizeof(typename Tr::Storage) == 2) {
        return halves[0];
    } else if constexpr (sizeof(typename Tr::Storage) == 4) {
        return bit_cast<float>(halves[0] | static_cast<std::uint32_t>(halves[1]) << 16);
    } else {
        std::uint64_t bits = 0;
        for (int h = 0; h < 4; ++h) bits |= static_cast<std::uint64_t>(halves[h]) << (16 * h);
        return bit_cast<double>(bits);
    }
}

// Symbol i of symbols packed with num_bits bits, in `halves` u16 at an even address.
__device__ __forceinline__ std::uint32_t load_symbol(const std::uint8_t* at, std::int64_t halves, std::int64_t i,
                                                     int num_bits) {
    const std::int64_t bit = i * num_bits, half = bit / 16;
    const auto* row = reinterpret_cast<const std::uint16_t*>(at);
    std::uint32_t window = row[half];
    if (half + 1 < halves) window |= static_cast<std::uint32_t>(row[half + 1]) << 16;
    return window >> (bit % 16) & ((1u << num_bits) - 1u);
}

// A segment's code in device memory: static, or made for the packet by decode_tables.cu.
struct DecodeCode {
    const std::uint16_t* entries;  // symbol | length << 12
    std::uint32_t mask;            // 0: no code
};
__device__ inline DecodeCode find_decode_code(const DecodeTables& d, int packet, int segment) {
    const SegmentView& view = d.segments_of(packet)[segment];
    if (!is_block_coded(view.quantizer.coding)) return {nullptr, 0};
    if (view.quantizer.table == kTableOnWire) return {d.entries_of(packet, segment), view.code_mask};
    const int index = StaticTables::index(view.quantizer.table);
    return index < 0 ? DecodeCode{nullptr, 0} : DecodeCode{d.codes->decode[index], d.codes->decode_mask[index]};
}

// Copies the entries of a code as lookups give them, two at a time, by `threads` threads that call with their numbers.
// A barrier must follow.
__device__ inline void copy_entries(const DecodeCode& code, std::uint32_t* to, int thread, int threads) {
    if (code.mask == 0) return;
    const auto* const pairs = reinterpret_cast<const std::uint32_t*>(code.entries);
    QCOMM_ASSUME_GLOBAL(pairs);
#pragma unroll 8
    for (int i = thread; i < static_cast<int>(code.mask + 1) / 2; i += threads) {
        const std::uint32_t pair = pairs[i];
        to[2 * i] = lookup_entry(static_cast<std::uint16_t>(pair));
        to[2 * i + 1] = lookup_entry(static_cast<std::uint16_t>(pair >> 16));
    }
}

// Where the entry of the bits `rest`, with those of `word` above them, shifted by `shift`, is in a table of entries of
// 2^kBytesAt bytes. A shift of 32 or more leaves none of the word.
template <int kBytesAt>
__device__ __forceinline__ std::uint32_t entry_place(std::uint32_t rest, std::uint32_t word, std::uint32_t shift,
                                                     std::uint32_t mask) {
    return (rest << kBytesAt | shift_left(word, shift + kBytesAt)) & mask << kBytesAt;
}

// A code's entries, turned round by each lookup or beforehand: as they are in device memory, and as lookups give them
// in shared memory. place() is that of an entry in bytes, at() looks it up.
struct FarEntries {
    DecodeCode code;
    __device__ __forceinline__ bool empty() const { return code.mask == 0; }
    __device__ __forceinline__ std::uint32_t place(std::uint32_t rest, std::uint32_t word, std::uint32_t shift) const {
        return entry_place<1>(rest, word, shift, code.mask);
    }
    __device__ __forceinline__ std::uint32_t at(std::uint32_t place) const {
        return lookup_entry(code.entries[place / 2]);
    }
};
struct NearEntries {
    const std::uint32_t* entries;
    std::uint32_t mask;
    __device__ __forceinline__ bool empty() const { return mask == 0; }
    __device__ __forceinline__ std::uint32_t place(std::uint32_t rest, std::uint32_t word, std::uint32_t shift) const {
        return entry_place<2>(rest, word, shift, mask);
    }
    __device__ __forceinline__ std::uint32_t at(std::uint32_t place) const {
        const auto* const entry =
            reinterpret_cast<const std::uint32_t*>(reinterpret_cast<const std::uint8_t*>(entries) + place);
        QCOMM_ASSUME_SHARED(entry);
        return *entry;
    }
};

// Reads a block front to back, possibly in several parts; all 32 lanes call together. Nothing of the block is trusted:
// open() checks its sizes, and read() stays inside whatever the bits are; whether they made sense is known at close().
template <class Tr, class Entries>
class BlockReader {
public:
    using Storage = typename Tr::Storage;

    // False where the block is malformed. `values` is the table of fill_values(), for a small alphabet; `buffer` is the
    // warp's own.
    __device__ bool open(const std::uint8_t* block, int bytes, int n, const Quantizer& q, const Entries& entries,
                         const Storage* values, LaneBuffer* buffer) {
        n_ = n;
        quantizer_ = q;
        entries_ = entries;
        values_ = (1 << q.num_bits) <= kMaxValueTable ? values : nullptr;
        const BlockInfo info = BlockInfo::unpack(load_u32(block));
        mode_ = info.mode;
        symbol_ = info.symbol;
        escapes_ = info.escape_count;
        next_escape_ = 0;
        ordered_ = true;
        pending_ = false;
        const bool coded = mode_ == BlockMode::kCoded, sigma = q.grid == Grid::kSigma;
        const bool may_escape = sigma && (coded || mode_ == BlockMode::kFixed);
        const int item = static_cast<int>(sizeof(Storage)), values_at = coded ? 4 + 4 * kLanes : 4;
        const int positions_at = values_at + escapes_ * item, body_at = positions_at + 2 * escapes_;
        if ((escapes_ != 0 && !may_escape) || escapes_ > n || body_at > bytes) return false;
        escape_values_ = block + values_at;
        positions_ = reinterpret_cast<const std::uint16_t*>(block + positions_at);
        body_ = block + body_at;
        QCOMM_ASSUME_GLOBAL(body_);
        halves_ = (bytes - body_at) / 2;
        if (mode_ == BlockMode::kFixed) return bytes - body_at >= packed_bytes(n, q.num_bits);
        if (mode_ == BlockMode::kRaw) return bytes - body_at >= n * item;
        if (mode_ == BlockMode::kConstant) return static_cast<int>(symbol_) < (1 << q.num_bits) - (sigma ? 1 : 0);
        if (entries.empty()) return false;
        return lanes_.open(block + 4, body_, halves_, buffer);
    }

    // Values [begin, end) to sink.put(i, value); begin is where the last call ended, a multiple of 32, of 64 with
    // pairs.
    template <class Sink>
    __device__ void read(int begin, int end, const Sink& sink) {
        const TableValues<Storage> table{values_};
        if (mode_ == BlockMode::kRaw) {
            for (int i = begin + lane_number(); i < end; i += kWarpLanes) sink.put(i, load_value<Tr>(body_, i));
        } else if (mode_ == BlockMode::kCoded && quantizer_.coding == Coding::kPair) {
            if (sink.takes_pairs()) {
                read_coded<true, true>(begin, end, table, sink);
            } else {
                read_coded<true, false>(begin, end, table, sink);
            }
        } else if (values_ != nullptr) {
            read_single(begin, end, table, sink);
        } else if (quantizer_.grid == Grid::kSigma) {
            read_single(begin, end, SigmaValues<Tr>(quantizer_), sink);
        } else {
            read_single(begin, end, RangeValues<Tr>(quantizer_), sink);
        }
        if (next_escape_ < escapes_) put_escapes(begin, end, sink);
    }

    // After the last read: false where the bits do not end with the codewords, or escapes were not in their places.
    __device__ bool close() const {
        const bool whole = mode_ != BlockMode::kCoded || lanes_.whole();
        return __all_sync(kAllLanes, whole && ordered_ && next_escape_ == escapes_);
    }

private:
    // Reads one symbol a codeword, whatever the block's mode.
    template <class ValueOf, class Sink>
    __device__ __forceinline__ void read_single(int begin, int end, const ValueOf& value_of, const Sink& sink) {
        if (mode_ == BlockMode::kCoded) return read_coded<false, false>(begin, end, value_of, sink);
        for (int i = begin + lane_number(); i < end; i += kWarpLanes) {
            const bool constant = mode_ == BlockMode::kConstant;
            sink.put(i, value_of(constant ? symbol_ : load_symbol(body_, halves_, i, quantizer_.num_bits)));
        }
    }

    // Steps of 32 codewords, four at a time as long as nothing can run out, and then single ones; the last ones with
    // all that must be asked.
    template <bool kPairs, bool kTogether, class ValueOf, class Sink>
    __device__ __forceinline__ void read_coded(int begin, int end, const ValueOf& value_of, const Sink& sink) {
        constexpr int kRow = kWarpLanes * (kPairs ? 2 : 1), kRows = 4;
        int at = begin;
        if (!pending_ && at + kRow <= end && lanes_.may_enter(1)) {
            lanes_.enter(entries_);
            entry_ = lanes_.next(entries_);
            pending_ = true;
        }
        if (pending_) {
            // Values are put while the next codeword is looked up, so that no lookup stands behind their way. It may be
            // the first one of the next part.
            const int last =
                end - kRows * kRow < n_ - (kRows + 1) * kRow ? end - kRows * kRow : n_ - (kRows + 1) * kRow;
            do {
                for (; at <= last && lanes_.holds(kRows); at += kRows * kRow) {
#pragma unroll
                    for (int r = 0; r < kRows; ++r) {
                        const std::uint32_t following = lanes_.next(entries_);
                        put_codeword<kPairs, kTogether>(entry_, at + r * kRow, kRow, value_of, sink);
                        entry_ = following;
                    }
                }
            } while (lanes_.fetch() && at <= last);
#pragma unroll 1
            for (; at + kRow <= end && at + 2 * kRow <= n_ && lanes_.holds(1); at += kRow) {
                const std::uint32_t following = lanes_.next(entries_);
                put_codeword<kPairs, kTogether>(entry_, at, kRow, value_of, sink);
                entry_ = following;
            }
            if (at + kRow <= end) {
                put_codeword<kPairs, kTogether>(entry_, at, kRow, value_of, sink);
                at += kRow;
                lanes_.leave();
                pending_ = false;
            }
        }
#pragma unroll 1
        for (; at < end; at += kRow) {
            const int left = end - at < kRow ? end - at : kRow;
            const std::uint32_t entry = lanes_.next_guarded(entries_, lane_number() * (kPairs ? 2 : 1) < left);
            put_codeword<kPairs, false>(entry, at, left, value_of, sink);
        }
    }

    // Puts a lane's value, or two, of a row of values that may be short. kTogether: it is whole, and two values are one
    // store.
    template <bool kPairs, bool kTogether, class ValueOf, class Sink>
    __device__ __forceinline__ void put_codeword(std::uint32_t entry, int at, int row, const ValueOf& value_of,
                                                 const Sink& sink) const {
        if constexpr (kPairs) {
            const std::uint32_t symbol = entry >> kSymbolAt;
            const int i = 2 * lane_number();
            // Both are looked up before one is stored, which the other lookup would wait for.
            const Storage first = value_of(symbol & 15u), second = value_of(symbol >> kPairBits);
            if constexpr (kTogether) {
                sink.put_pair(at + i, first, second);
            } else {
                if (i < row) sink.put(at + i, first);
                if (i + 1 < row) sink.put(at + i + 1, second);
            }
        } else {
            if (lane_number() < row) sink.put(at + lane_number(), value_of.of_entry(entry));
        }
    }

    // Puts the escapes with positions in [begin, end), 32 at a time. Each lane compares its position with the one
    // before, so the order is checked without a loop over all.
    template <class Sink>
    __device__ void put_escapes(int begin, int end, const Sink& sink) {
        __syncwarp();  // the symbols' values are written by other lanes
        for (unsigned inside = kAllLanes; inside == kAllLanes && next_escape_ < escapes_;) {
            const int i = next_escape_ + lane_number();
            const int position = i < escapes_ ? positions_[i] : end,
                      previous = i > 0 && i < escapes_ ? positions_[i - 1] : -1;
            const bool mine = position < end;
            if (mine) {
                ordered_ = ordered_ && position > previous && position >= begin &&
                           bit_cast<Bits>(sink.get(position)) == bit_cast<Bits>(Tr::narrow(-0.0f));
                if (ordered_) sink.put(position, load_value<Tr>(escape_values_, i));
            }
            inside = __ballot_sync(kAllLanes, mine);
            next_escape_ += __popc(inside);
        }
    }

    using Bits = std::conditional_t<sizeof(Storage) == 2, std::uint16_t,
                                    std::conditional_t<sizeof(Storage) == 4, std::uint32_t, std::uint64_t>>;

    Quantizer quantizer_;
    Entries entries_;
    const Storage* values_;
    const std::uint8_t *escape_values_, *body_;
    const std::uint16_t* positions_;
    BlockMode mode_;
    std::uint32_t symbol_;
    int n_, escapes_, next_escape_, halves_;
    LaneReader lanes_;     // of a coded block
    std::uint32_t entry_;  // of the codeword that has been looked up last, ...
    bool pending_;         // ... whose values have not been put
    bool ordered_;         // escapes so far; in this lane
};

}  // namespace qcomm::cuda
