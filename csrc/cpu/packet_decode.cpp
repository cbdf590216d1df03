// Packets, reading. The bytes are hostile: every size is checked before it is used, and in an order in which no sum can
// overflow.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>

#include "kernels.h"
#include "qcomm/block.h"
#include "qcomm/checksum.h"
#include "qcomm/packet.h"
#include "qcomm/parallel.h"

namespace qcomm {
namespace {

// Far above any tensor, and safe to multiply by an item's bits.
constexpr std::uint64_t kMaxElements = std::uint64_t{1} << 42;

std::uint32_t load_u32(const std::uint8_t* at) {
    std::uint32_t word;
    std::memcpy(&word, at, sizeof(word));
    return word;
}

// Takes `bytes` from what is left of a packet; null when there are not so many.
class Cursor {
public:
    Cursor(const std::uint8_t* begin, std::int64_t bytes) : at_(begin), left_(bytes) {}
    const std::uint8_t* take(std::uint64_t bytes) {
        if (bytes > static_cast<std::uint64_t>(left_)) return nullptr;
        const std::uint8_t* taken = at_;
        at_ += bytes;
        left_ -= static_cast<std::int64_t>(bytes);
        return taken;
    }
    std::int64_t left() const { return left_; }

private:
    const std::uint8_t* at_;
    std::int64_t left_;
};

Status check_header(const PacketHeader& h, std::int64_t bytes) {
    if (h.magic != kMagic) return bad_packet("these bytes are not a qcomm packet: wrong magic number");
    if (h.version != kVersion)
        return bad_packet("the packet has another version; this library reads version 1, found", h.version);
    if (!is_valid(h.dtype)) return bad_packet("unknown dtype", static_cast<std::int64_t>(h.dtype));
    if (h.flags > kFlagChecksums || h.reserved != 0) return bad_packet("unknown flags or reserved fields");
    if (h.ndim > kMaxDims) return bad_packet("too many dimensions", h.ndim);
    if (h.segment_count < 1) return bad_packet("a packet needs at least one segment");
    if (h.element_count > kMaxElements) return bad_packet("element count out of range");
    if (h.steps < 1 || h.steps > kMaxSteps) return bad_packet("steps must be 1..512, found", h.steps);
    if (h.total_bytes > static_cast<std::uint64_t>(bytes))
        return bad_packet("the packet is truncated; bytes present", bytes);
    if (h.total_bytes < static_cast<std::uint64_t>(bytes))
        return bad_packet("there are bytes after the end of the packet; its size",
                          static_cast<std::int64_t>(h.total_bytes));
    return {};
}

Status check_dims(const std::vector<std::int64_t>& dims, std::uint64_t elements) {
    // Of the dimensions that are not 0: torch computes strides from them also for an empty tensor.
    std::uint64_t product = 1;
    bool empty = false;
    for (const std::int64_t d : dims) {
        if (d < 0 || static_cast<std::uint64_t>(d) > kMaxElements) return bad_packet("a dimension is out of range", d);
        empty |= d == 0;
    }
    for (const std::int64_t d : dims) {
        if (d == 0) continue;
        product = product > kMaxElements / static_cast<std::uint64_t>(d) ? kMaxElements + 1
                                                                         : product * static_cast<std::uint64_t>(d);
        if (product > kMaxElements) return bad_packet("the dimensions' product is out of range");
    }
    return (empty ? 0 : product) == elements ? Status{}
                                             : bad_packet("the dimensions do not agree with the element count");
}

Status check_record(const SegmentRecord& r, DType dtype, std::int64_t index) {
    if (r.count > kMaxElements) return bad_packet("a segment's count is out of range; segment", index);
    if (static_cast<unsigned>(r.grid) > 3 || static_cast<unsigned>(r.coding) > 4 || r.reserved != 0)
        return bad_packet("unknown grid or coding; segment", index);
    if (r.coding == Coding::kRaw || r.coding == Coding::kConstant) return {};
    const Quantizer q{r.grid, r.num_bits, r.coding, r.table, r.p0, r.p1};
    if (q.grid == Grid::kNone || q.num_bits < (q.grid == Grid::kSigma ? 2 : 1) || q.num_bits > 16)
        return bad_packet("num_bits does not fit the grid; segment", index);
    if (!is_usable(q, dtype)) return bad_packet("a grid's parameters are not usable; segment", index);
    if (q.coding == Coding::kFixed)
        return is_range(q.grid) ? Status{} : bad_packet("coding fixed needs a range grid; segment", index);
    if (q.coding == Coding::kPair && (q.grid != Grid::kSigma || q.num_bits != kPairBits))
        return bad_packet("coding pair needs a sigma grid of 4 bits; segment", index);
    if (q.table == kNoTable) return {};
    if (q.table == kTableOnWire)
        return q.num_bits <= kMaxCodedBits ? Status{} : bad_packet("no codes exist for so many bits; segment", index);
    const StaticCode* code = find_static_code(q.table);
    const bool fits = code != nullptr && code->coding == q.coding && code->num_bits == q.num_bits;
    return fits ? Status{} : bad_packet("unknown static table; segment", index);
}

bool has_lengths(const SegmentRecord& r) { return is_block_coded(r.coding) && r.table == kTableOnWire; }

// Bytes of a segment that is not block-coded.
std::int64_t plain_bytes(const SegmentRecord& r, DType dtype) {
    const auto count = static_cast<std::int64_t>(r.count);
    if (r.coding == Coding::kRaw) return align4(count * item_bytes(dtype));
    return r.coding == Coding::kFixed ? align4(packed_bytes(count, r.num_bits)) : 0;
}

// Checks that the code lengths of all segments are codes and fill their area exactly.
Status check_lengths(PacketView* view, std::int64_t bytes) {
    std::vector<std::uint8_t> lengths(std::size_t{1} << kMaxCodedBits);
    std::int64_t at = 0;
    view->lengths_at.assign(view->records.size(), 0);
    for (std::size_t i = 0; i < view->records.size(); ++i) {
        const SegmentRecord& r = view->records[i];
        if (!has_lengths(r)) continue;
        std::int64_t used = 0;
        view->lengths_at[i] = at;
        QCOMM_RETURN_IF_ERROR(unpack_lengths(view->lengths + at, bytes - at, alphabet_size(r.coding, r.num_bits),
                                             length_limit(r.coding, r.num_bits), lengths.data(), &used));
        at += used;
    }
    return at == bytes ? Status{} : bad_packet("the code lengths do not fill their area");
}

// Checks that segments and blocks divide the payload without gaps.
Status check_layout(const PacketView& view) {
    std::int64_t at = 0, block = 0;
    for (const SegmentRecord& r : view.records) {
        const std::int64_t blocks = blocks_in(r, view.header.steps);
        for (std::int64_t i = 0; i < blocks; ++i, ++block) {
            const std::int64_t end = 4 * static_cast<std::int64_t>(load_u32(view.block_ends + 4 * block));
            if (end <= at || end > view.payload_bytes) return bad_packet("a block's end is out of order; block", block);
            at = end;
        }
        at += plain_bytes(r, view.header.dtype);
        if (at > view.payload_bytes) return bad_packet("the payload is truncated; bytes present", view.payload_bytes);
    }
    return at == view.payload_bytes ? Status{} : bad_packet("the payload has bytes that belong to no segment");
}

// The two sinks of a decoder: a value is stored, or added to what is there.
template <class Tr>
struct Store {
    static constexpr bool kAccumulates = false;
    typename Tr::Storage* out;
    void put(std::int64_t i, typename Tr::Storage stored) const { out[i] = stored; }
};
template <class Tr>
struct Add {
    static constexpr bool kAccumulates = true;
    typename Tr::Storage* out;
    void put(std::int64_t i, typename Tr::Storage stored) const {
        out[i] = Tr::narrow(Tr::widen(out[i]) + Tr::widen(stored));
    }
};

// One block after its parts have been told apart and checked to lie inside it.
struct BlockParts {
    BlockInfo info{};
    const std::uint8_t* start = nullptr;
    const std::uint8_t* escape_values = nullptr;
    const std::uint8_t* escape_positions = nullptr;
    const std::uint8_t* body = nullptr;
    std::int64_t body_bytes = 0;
};

Status split_block(const std::uint8_t* block, std::int64_t bytes, int n, const SegmentRecord& r, std::int64_t item,
                   std::int64_t index, BlockParts* parts) {
    Cursor cursor(block, bytes);
    parts->info = BlockInfo::unpack(load_u32(cursor.take(4)));
    const BlockInfo& info = parts->info;
    const bool escapes_allowed =
        r.grid == Grid::kSigma && (info.mode == BlockMode::kFixed || info.mode == BlockMode::kCoded);
    if ((info.escape_count != 0 && !escapes_allowed) || info.escape_count > n)
        return bad_packet("a block has escapes where none can be; block", index);
    if (info.mode == BlockMode::kCoded && (parts->start = cursor.take(4 * kLanes)) == nullptr)
        return bad_packet("a block is truncated; block", index);
    parts->escape_values = cursor.take(static_cast<std::uint64_t>(info.escape_count * item));
    parts->escape_positions = cursor.take(static_cast<std::uint64_t>(info.escape_count) * 2);
    parts->body_bytes = cursor.left();
    parts->body = cursor.take(static_cast<std::uint64_t>(cursor.left()));
    std::int64_t needed = 0;
    if (info.mode == BlockMode::kFixed) needed = packed_bytes(n, r.num_bits);
    if (info.mode == BlockMode::kRaw) needed = n * item;
    if (parts->escape_values == nullptr || parts->escape_positions == nullptr || parts->body_bytes < needed) {
        return bad_packet("a block is truncated; block", index);
    }
    return {};
}

// Decodes what `on_symbols(begin, symbols, n)` and `on_raw(begin, bytes, n)` and `on_escape(i, bytes)` want to know of
// a segment.
template <class Tr>
class SegmentDecoder {
public:
    SegmentDecoder(const PacketView& view, std::size_t index, int threads)
        : view_(view), record_(view.records[index]), threads_(threads) {
        if (!is_block_coded(record_.coding)) return;
        if (record_.table == kTableOnWire) {
            const int size = alphabet_size(record_.coding, record_.num_bits);
            std::vector<std::uint8_t> lengths(static_cast<std::size_t>(size));
            std::int64_t used = 0;
            const std::int64_t at = view.lengths_at[index];
            status_ = unpack_lengths(view.lengths + at, 4 * static_cast<std::int64_t>(view.header.lengths_words) - at,
                                     size, length_limit(record_.coding, record_.num_bits), lengths.data(), &used);
            if (status_.ok()) own_ = DecodeTable(lengths.data(), size);
            table_ = &own_;
        } else if (const StaticCode* code = find_static_code(record_.table)) {
            table_ = &code->decode;
        }
    }

    // `block` and `checksum` are the numbers of the segment's first block and checksum, `at` the payload offset where
    // it begins; all three are advanced.
    template <class OnSymbols, class OnRaw, class OnEscape>
    Status run(std::int64_t* block, std::int64_t* checksum_index, std::int64_t* at, OnSymbols on_symbols, OnRaw on_raw,
               OnEscape on_escape) {
        QCOMM_RETURN_IF_ERROR(status_);
        const auto count = static_cast<std::int64_t>(record_.count);
        if (record_.coding == Coding::kConstant) return {};
        if (!is_block_coded(record_.coding)) {
            const std::int64_t bytes = plain_bytes(record_, view_.header.dtype);
            const std::uint8_t* data = view_.payload + *at;
            if (!matches((*checksum_index)++, [&] { return checksum_pieces(data, bytes, threads_); }))
                return bad_packet("a segment is damaged: wrong checksum; payload byte", *at);
            *at += bytes;
            if (record_.coding == Coding::kRaw) {
                parallel_for_values(count, threads_, [&](std::int64_t begin, std::int64_t end) {
                    on_raw(begin, data + kItem * begin, end - begin);
                });
            }
            if (record_.coding == Coding::kFixed) unpack_all(data, count, on_symbols);
            return {};
        }
        const std::int64_t per_block = values_per_block(record_.coding, view_.header.steps);
        const std::int64_t blocks = blocks_in(record_, view_.header.steps);
        const int parts = part_count(blocks, ceil_div(kValuesPerThread, per_block), threads_);
        while (static_cast<int>(workspaces_.size()) < parts) workspaces_.push_back(std::make_unique<Workspace>());
        std::vector<Status> found(static_cast<std::size_t>(parts));
        const Place place{*block, *checksum_index, *at};
        parallel_for(blocks, parts, [&](int part, std::int64_t first, std::int64_t last) {
            const auto p = static_cast<std::size_t>(part);
            found[p] = run_blocks(*workspaces_[p], place, first, last, on_symbols, on_raw, on_escape);
        });
        *block += blocks;
        *checksum_index += blocks;
        if (blocks > 0) *at = block_end(*block - 1);
        // Of several damaged blocks the first one is told, whatever the number of threads.
        for (const Status& status : found) QCOMM_RETURN_IF_ERROR(status);
        return {};
    }

private:
    static constexpr std::int64_t kItem = sizeof(typename Tr::Storage);

    static constexpr int kBatch = 2;  // blocks decoded together

    struct Block {
        BlockParts parts;
        std::int64_t begin = 0, number = 0;
        int n = 0;
        // Left uninitialised: clearing them would cost more than decoding a small packet.
        std::unique_ptr<std::uint16_t[]> codewords{new std::uint16_t[kMaxCodewords]};
        std::unique_ptr<std::uint16_t[]> symbols{new std::uint16_t[kMaxBlockValues + 1]};
    };

    struct Workspace {
        Block blocks[kBatch];
    };

    // Where a segment begins: number of its first block and checksum, offset in the payload.
    struct Place {
        std::int64_t block, checksum, at;
    };

    std::int64_t block_end(std::int64_t block) const {
        return 4 * static_cast<std::int64_t>(load_u32(view_.block_ends + 4 * block));
    }

    // Decodes blocks [first, last) of the segment.
    template <class OnSymbols, class OnRaw, class OnEscape>
    Status run_blocks(Workspace& workspace, const Place& place, std::int64_t first, std::int64_t last,
                      const OnSymbols& on_symbols, const OnRaw& on_raw, const OnEscape& on_escape) {
        const std::int64_t per_block = values_per_block(record_.coding, view_.header.steps);
        std::int64_t at = first == 0 ? place.at : block_end(place.block + first - 1);
        for (std::int64_t i = first; i < last;) {
            int batch = 0;
            for (; batch < kBatch && i < last; ++batch, ++i) {
                const std::int64_t number = place.block + i, end = block_end(number);
                const std::uint8_t* data = view_.payload + at;
                const std::int64_t bytes = end - at;
                if (!matches(place.checksum + i, [&] { return checksum(data, bytes); }))
                    return bad_packet("a block is damaged: wrong checksum; block", number);
                Block& b = workspace.blocks[batch];
                b.begin = i * per_block;
                b.n = static_cast<int>(std::min(per_block, static_cast<std::int64_t>(record_.count) - b.begin));
                b.number = number;
                QCOMM_RETURN_IF_ERROR(split_block(data, bytes, b.n, record_, kItem, number, &b.parts));
                at = end;
            }
            QCOMM_RETURN_IF_ERROR(decode_coded(workspace, batch));
            for (int j = 0; j < batch; ++j)
                QCOMM_RETURN_IF_ERROR(emit(workspace.blocks[j], on_symbols, on_raw, on_escape));
        }
        return {};
    }

    template <class Compute>
    bool matches(std::int64_t index, Compute compute) const {
        return view_.checksums == nullptr || load_u32(view_.checksums + 4 * index) == compute();
    }

    template <class OnSymbols>
    void unpack_all(const std::uint8_t* data, std::int64_t count, OnSymbols on_symbols) {
        constexpr std::int64_t kRun = 4096;  // a multiple of 8 values begins at a whole byte
        const std::int64_t runs = ceil_div(count, kRun);
        const int parts = part_count(runs, kValuesPerThread / kRun, threads_);
        parallel_for(runs, parts, [&](int, std::int64_t first, std::int64_t last) {
            std::uint16_t symbols[kRun];
            for (std::int64_t begin = first * kRun; begin < std::min(last * kRun, count); begin += kRun) {
                const std::int64_t n = std::min(kRun, count - begin);
                unpack_bits(data + packed_bytes(begin, record_.num_bits), n, record_.num_bits, symbols);
                on_symbols(begin, symbols, static_cast<int>(n));
            }
        });
    }

    // Decodes the coded ones of the first `batch` blocks to symbols.
    Status decode_coded(Workspace& workspace, int batch) {
        const bool pairs = record_.coding == Coding::kPair;
        CodedBlock coded[kBatch];
        Block* of[kBatch];
        int count = 0;
        for (int i = 0; i < batch; ++i) {
            Block& b = workspace.blocks[i];
            if (b.parts.info.mode != BlockMode::kCoded) continue;
            if (table_ == nullptr) return bad_packet("a coded block in a segment without a code; block", b.number);
            of[count] = &b;
            coded[count++] = {b.parts.start,
                              b.parts.body,
                              b.parts.body_bytes / 2,
                              pairs ? (b.n + 1) / 2 : b.n,
                              (pairs ? b.codewords : b.symbols).get(),
                              false};
        }
        if (count > 0) kernels().decode_lanes(coded, count, *table_);
        for (int i = 0; i < count; ++i) {
            if (!coded[i].whole)
                return bad_packet("a block's bits do not end where its symbols do; block", of[i]->number);
            if (pairs) split_pairs(coded[i].symbols, coded[i].count, of[i]->symbols.get());
        }
        return {};
    }

    template <class OnSymbols, class OnRaw, class OnEscape>
    Status emit(Block& b, OnSymbols on_symbols, OnRaw on_raw, OnEscape on_escape) {
        const BlockInfo& info = b.parts.info;
        const int alphabet = 1 << record_.num_bits;
        switch (info.mode) {
            case BlockMode::kConstant:
                if (static_cast<int>(info.symbol) >= alphabet - (record_.grid == Grid::kSigma))
                    return bad_packet("a constant block's symbol is out of range; block", b.number);
                std::fill_n(b.symbols.get(), b.n, static_cast<std::uint16_t>(info.symbol));
                break;
            case BlockMode::kFixed:
                unpack_bits(b.parts.body, b.n, record_.num_bits, b.symbols.get());
                break;
            case BlockMode::kCoded:
                break;
            case BlockMode::kRaw:
                on_raw(b.begin, b.parts.body, b.n);
                return {};
        }
        on_symbols(b.begin, b.symbols.get(), b.n);
        for (int i = 0, previous = -1; i < info.escape_count; ++i) {
            std::uint16_t position;
            std::memcpy(&position, b.parts.escape_positions + 2 * i, sizeof(position));
            if (position >= b.n || position <= previous)
                return bad_packet("an escape's position is out of order; block", b.number);
            // Otherwise a level's value would be replaced when stored but kept when added to.
            if (b.symbols[position] != escape_symbol(record_.num_bits))
                return bad_packet("an escape's position is that of another symbol; block", b.number);
            previous = position;
            on_escape(b.begin + position, b.parts.escape_values + i * kItem);
        }
        return {};
    }

    static void split_pairs(const std::uint16_t* codewords, int count, std::uint16_t* symbols) {
        for (int i = 0; i < count; ++i) {
            symbols[2 * i] = codewords[i] & 15u;
            symbols[2 * i + 1] = static_cast<std::uint16_t>(codewords[i] >> kPairBits);
        }
    }

    const PacketView& view_;
    const SegmentRecord& record_;
    DecodeTable own_;
    const DecodeTable* table_ = nullptr;
    Status status_;
    int threads_;
    std::vector<std::unique_ptr<Workspace>> workspaces_;  // one a thread
};

template <class Tr, class Sink>
Status decode_segments(const PacketView& view, typename Tr::Storage* out, int threads) {
    using Storage = typename Tr::Storage;
    std::int64_t block = 0, checksum_index = 0, at = 0;
    for (std::size_t i = 0; i < view.records.size(); ++i) {
        const SegmentRecord& r = view.records[i];
        const Sink sink{out};
        const auto load = [](const std::uint8_t* bytes) {
            Storage stored;
            std::memcpy(&stored, bytes, sizeof(stored));
            return stored;
        };
        if (r.coding == Coding::kConstant) {
            const Storage value = Tr::narrow(static_cast<typename Tr::Arithmetic>(r.p0));
            parallel_for_values(static_cast<std::int64_t>(r.count), threads, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t j = begin; j < end; ++j) sink.put(j, value);
            });
        } else {
            SegmentDecoder<Tr> decoder(view, i, threads);
            const auto on_raw = [&](std::int64_t begin, const std::uint8_t* bytes, std::int64_t n) {
                for (std::int64_t j = 0; j < n; ++j)
                    sink.put(begin + j, load(bytes + j * static_cast<std::int64_t>(sizeof(Storage))));
            };
            if (r.coding == Coding::kRaw) {
                const auto never = [](std::int64_t, const auto*, auto...) {};
                QCOMM_RETURN_IF_ERROR(decoder.run(&block, &checksum_index, &at, never, on_raw, never));
            } else {
                const Quantizer q{r.grid, r.num_bits, r.coding, r.table, r.p0, r.p1};
                // An escape's place first gets 0, so that with Add its value is then the only thing added.
                const auto on_symbols = [&](std::int64_t begin, const std::uint16_t* symbols, int n) {
                    kernels().dequantize(symbols, n, q, view.header.dtype, out + begin, Sink::kAccumulates);
                };
                const auto on_escape = [&](std::int64_t j, const std::uint8_t* bytes) { sink.put(j, load(bytes)); };
                QCOMM_RETURN_IF_ERROR(decoder.run(&block, &checksum_index, &at, on_symbols, on_raw, on_escape));
            }
        }
        out += r.count;
    }
    return {};
}

}  // namespace

Status parse_packet(const std::uint8_t* packet, std::int64_t bytes, PacketView* view) {
    Cursor cursor(packet, bytes);
    const std::uint8_t* header = cursor.take(sizeof(PacketHeader));
    if (header == nullptr) return bad_packet("a packet has at least 40 bytes; found", bytes);
    PacketHeader& h = view->header;
    std::memcpy(&h, header, sizeof(h));
    QCOMM_RETURN_IF_ERROR(check_header(h, bytes));

    const std::uint8_t* dims = cursor.take(std::uint64_t{8} * h.ndim);
    const std::uint8_t* records = cursor.take(sizeof(SegmentRecord) * std::uint64_t{h.segment_count});
    view->lengths = cursor.take(std::uint64_t{4} * h.lengths_words);
    if (dims == nullptr || records == nullptr || view->lengths == nullptr)
        return bad_packet("the packet's metadata is truncated");
    view->dims.resize(h.ndim);
    if (h.ndim > 0) std::memcpy(view->dims.data(), dims, std::size_t{8} * h.ndim);
    view->records.resize(h.segment_count);
    std::memcpy(view->records.data(), records, sizeof(SegmentRecord) * h.segment_count);

    std::uint64_t elements = 0, blocks = 0, sums = 0;
    for (std::size_t i = 0; i < view->records.size(); ++i) {
        const SegmentRecord& r = view->records[i];
        QCOMM_RETURN_IF_ERROR(check_record(r, h.dtype, static_cast<std::int64_t>(i)));
        elements += r.count;
        blocks += static_cast<std::uint64_t>(blocks_in(r, h.steps));
        sums += static_cast<std::uint64_t>(checksums_in(r, h.steps));
        if (elements > kMaxElements) return bad_packet("the segments' counts are out of range");
    }
    if (elements != h.element_count) return bad_packet("the segments' counts do not agree with the element count");
    QCOMM_RETURN_IF_ERROR(check_dims(view->dims, elements));
    const bool with_checksums = (h.flags & kFlagChecksums) != 0;
    view->block_ends = cursor.take(4 * blocks);
    view->checksums = cursor.take(with_checksums ? 4 * sums : 0);
    if (view->block_ends == nullptr || view->checksums == nullptr)
        return bad_packet("the packet's block table is truncated");
    if (!with_checksums) view->checksums = nullptr;
    view->payload_bytes = cursor.left();
    view->payload = cursor.take(static_cast<std::uint64_t>(cursor.left()));

    std::vector<std::uint8_t> metadata(packet, view->payload);
    std::memset(metadata.data() + offsetof(PacketHeader, header_checksum), 0, sizeof(std::uint32_t));
    if (checksum(metadata.data(), static_cast<std::int64_t>(metadata.size())) != h.header_checksum) {
        return bad_packet("the packet's metadata is damaged: wrong header checksum");
    }
    QCOMM_RETURN_IF_ERROR(check_lengths(view, std::int64_t{4} * h.lengths_words));
    return check_layout(*view);
}

Status decode_packet(const PacketView& view, void* out, bool accumulate, int threads) {
    if (accumulate && item_bytes(view.header.dtype) < 4)
        return bad_argument("accumulate needs a float32 or float64 packet");
    return dispatch(view.header.dtype, [&](auto traits) {
        using Tr = decltype(traits);
        auto* const typed = static_cast<typename Tr::Storage*>(out);
        return accumulate ? decode_segments<Tr, Add<Tr>>(view, typed, threads)
                          : decode_segments<Tr, Store<Tr>>(view, typed, threads);
    });
}

Status count_symbols(const PacketView& view, std::size_t index, std::uint64_t* counts) {
    std::int64_t block = 0, checksum_index = 0, at = 0;
    for (std::size_t i = 0; i < index; ++i) {
        const SegmentRecord& r = view.records[i];
        block += blocks_in(r, view.header.steps);
        checksum_index += checksums_in(r, view.header.steps);
        at = is_block_coded(r.coding) && block > 0 && r.count > 0
                 ? 4 * static_cast<std::int64_t>(load_u32(view.block_ends + 4 * (block - 1)))
                 : at + plain_bytes(r, view.header.dtype);
    }
    return dispatch(view.header.dtype, [&](auto traits) {
        SegmentDecoder<decltype(traits)> decoder(view, index, 1);
        const auto on_symbols = [&](std::int64_t, const std::uint16_t* symbols, int n) {
            for (int j = 0; j < n; ++j) ++counts[symbols[j]];
        };
        const auto on_raw = [](std::int64_t, const std::uint8_t*, std::int64_t) {};
        const auto on_escape = [](std::int64_t, const std::uint8_t*) {};
        return decoder.run(&block, &checksum_index, &at, on_symbols, on_raw, on_escape);
    });
}

}  // namespace qcomm
