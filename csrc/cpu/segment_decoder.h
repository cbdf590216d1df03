// Reads one segment of a packet: its blocks, or its plain bytes. The bytes are hostile; those of the metadata have been
// checked by parse_packet.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"
#include "packet_parts.h"
#include "qcomm/block.h"
#include "qcomm/checksum.h"
#include "qcomm/packet.h"
#include "qcomm/parallel.h"

namespace qcomm {

// One block after its parts have been told apart and checked to lie inside it. They point into the packet, unaligned.
struct BlockParts {
    BlockInfo info{};
    const std::uint8_t* start = nullptr;
    const std::uint8_t* escape_values = nullptr;
    const std::uint8_t* escape_positions = nullptr;
    const std::uint8_t* body = nullptr;
    std::int64_t body_bytes = 0;
};

// Splits a block of n values. It reads only [block, block + bytes), where bytes >= 4. Contents are checked where they
// are decoded; here sizes are, so that decoding need not. Bytes behind the contents are padding and not looked at.
inline Status split_block(const std::uint8_t* block, std::int64_t bytes, int n, const SegmentRecord& r,
                          std::int64_t item, std::int64_t index, BlockParts* parts) {
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

// Where a segment's block ends, checksums and payload begin among the packet's.
struct SegmentPlace {
    std::int64_t block = 0, checksum = 0;  // numbers
    std::int64_t at = 0;                   // payload offset
};

// Decodes a segment to a sink:
//
//   kAccumulates           whether values are added to what is there
//   void* values(begin)    where the values of symbols go, an escape's as 0; null to get the symbols
//   symbols(symbols, n)    these, then
//   raw(begin, bytes, n)   n values in the dtype's storage, unaligned
//   escape(i, bytes)       one such value, for the place of an escape
//
// Calls come from several threads, each for values of its own.
template <class Tr, class Sink>
class SegmentDecoder {
public:
    SegmentDecoder(const PacketView& view, std::size_t index, int threads, const Sink& sink)
        : view_(view), record_(view.records[index]), threads_(threads), sink_(sink) {
        if (!is_block_coded(record_.coding)) return;
        // The list was checked when the packet was parsed, and its code is needed only now: a packet of many segments
        // would otherwise hold many tables at once.
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

    // Decodes from `place`, which moves on behind the segment.
    Status run(SegmentPlace* place) {
        QCOMM_RETURN_IF_ERROR(status_);
        if (record_.coding == Coding::kConstant) return {};
        return is_block_coded(record_.coding) ? run_coded(place) : run_plain(place);
    }

private:
    static constexpr std::int64_t kItem = sizeof(typename Tr::Storage);
    // Blocks decoded together: two hide each other's lookups where lanes are in registers (decode_lanes_avx512.inl).
    static constexpr int kBatch = 2;

    struct Block {
        BlockParts parts;
        std::int64_t begin = 0, number = 0;
        int n = 0;
        // Left uninitialised: clearing it would cost more than decoding a small packet.
        std::unique_ptr<std::uint16_t[]> symbols{new std::uint16_t[kMaxBlockValues + 1]};
    };

    // The memory of one thread.
    struct Workspace {
        Block blocks[kBatch];
    };

    std::int64_t count() const { return static_cast<std::int64_t>(record_.count); }
    std::int64_t block_end(std::int64_t block) const {
        return 4 * static_cast<std::int64_t>(load_u32(view_.block_ends + 4 * block));
    }
    // Compares with a checksum of the packet; nothing is computed where it has none.
    template <class Compute>
    bool matches(std::int64_t index, Compute compute) const {
        return view_.checksums == nullptr || load_u32(view_.checksums + 4 * index) == compute();
    }

    // A raw or fixed segment: its checksum is verified before the first value is written.
    Status run_plain(SegmentPlace* place) {
        const std::int64_t bytes = plain_bytes(record_, view_.header.dtype);
        const std::uint8_t* data = view_.payload + place->at;
        if (!matches(place->checksum++, [&] { return checksum_pieces(data, bytes, threads_); }))
            return bad_packet("a segment is damaged: wrong checksum; payload byte", place->at);
        place->at += bytes;
        if (record_.coding == Coding::kFixed) {
            unpack_all(data);
        } else {
            parallel_for_values(count(), threads_, [&](std::int64_t begin, std::int64_t end) {
                sink_.raw(begin, data + kItem * begin, end - begin);
            });
        }
        return {};
    }

    // A fixed segment, in runs of symbols that begin at whole bytes.
    void unpack_all(const std::uint8_t* data) {
        constexpr std::int64_t kRun = 4096;  // a multiple of 8 values begins at a whole byte
        const std::int64_t runs = ceil_div(count(), kRun);
        const int parts = part_count(runs, kValuesPerThread / kRun, threads_);
        parallel_for(runs, parts, [&](int, std::int64_t first, std::int64_t last) {
            std::uint16_t symbols[kRun];
            for (std::int64_t begin = first * kRun; begin < std::min(last * kRun, count()); begin += kRun) {
                const std::int64_t n = std::min(kRun, count() - begin);
                unpack_bits(data + packed_bytes(begin, record_.num_bits), n, record_.num_bits, symbols);
                put_symbols(begin, symbols, static_cast<int>(n));
            }
        });
    }

    // Blocks are independent of each other, so each thread takes a run of them, with a status of its own.
    Status run_coded(SegmentPlace* place) {
        const std::int64_t per_block = values_per_block(record_.coding, view_.header.steps);
        const std::int64_t blocks = blocks_in(record_, view_.header.steps);
        const int parts = part_count(blocks, ceil_div(kValuesPerThread, per_block), threads_);
        std::vector<Workspace> workspaces(static_cast<std::size_t>(parts));
        std::vector<Status> found(static_cast<std::size_t>(parts));
        parallel_for(blocks, parts, [&](int part, std::int64_t first, std::int64_t last) {
            const auto p = static_cast<std::size_t>(part);
            found[p] = run_blocks(workspaces[p], *place, first, last);
        });
        place->block += blocks;
        place->checksum += blocks;
        if (blocks > 0) place->at = block_end(place->block - 1);
        // Of several damaged blocks the first one is told, whatever the number of threads.
        for (const Status& status : found) QCOMM_RETURN_IF_ERROR(status);
        return {};
    }

    // Decodes blocks [first, last) in pairs. Checksums are compared first, so damage is mostly found before a value is
    // written; the checks behind them are for bytes that were made to deceive.
    Status run_blocks(Workspace& workspace, const SegmentPlace& place, std::int64_t first, std::int64_t last) {
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
                b.n = static_cast<int>(std::min(per_block, count() - b.begin));
                b.number = number;
                QCOMM_RETURN_IF_ERROR(split_block(data, bytes, b.n, record_, kItem, number, &b.parts));
                at = end;
            }
            QCOMM_RETURN_IF_ERROR(decode_coded(workspace, batch));
            for (int j = 0; j < batch; ++j) QCOMM_RETURN_IF_ERROR(emit(workspace.blocks[j]));
        }
        return {};
    }

    // Decodes the coded ones of the first `batch` blocks.
    Status decode_coded(Workspace& workspace, int batch) {
        const LaneDecoding how{record_.coding == Coding::kPair, table_, quantizer_of(record_), view_.header.dtype,
                               Sink::kAccumulates};
        CodedBlock coded[kBatch];
        Block* of[kBatch];
        int found = 0;
        for (int i = 0; i < batch; ++i) {
            Block& b = workspace.blocks[i];
            if (b.parts.info.mode != BlockMode::kCoded) continue;
            if (table_ == nullptr) return bad_packet("a coded block in a segment without a code; block", b.number);
            of[found] = &b;
            coded[found++] = {b.parts.start,         b.parts.body, b.parts.body_bytes / 2, b.n, b.symbols.get(),
                              sink_.values(b.begin), false};
        }
        if (found > 0) kernels().decode_lanes(coded, found, how);
        for (int i = 0; i < found; ++i) {
            if (!coded[i].whole)
                return bad_packet("a block's bits do not end where its symbols do; block", of[i]->number);
        }
        return {};
    }

    // Symbols that are not coded go to the sink, as values if it wants values.
    void put_symbols(std::int64_t begin, const std::uint16_t* symbols, int n) const {
        if (void* const values = sink_.values(begin)) {
            kernels().dequantize(symbols, n, quantizer_of(record_), view_.header.dtype, values, Sink::kAccumulates);
        } else {
            sink_.symbols(symbols, n);
        }
    }

    // Hands a block's contents to the sink, then its escapes, in whose places it got 0. Symbols of a sigma grid beyond
    // the alphabet cannot come from a code or from N bits, but a constant's 16 bits may hold anything.
    Status emit(Block& b) const {
        const BlockInfo& info = b.parts.info;
        const int alphabet = 1 << record_.num_bits;
        switch (info.mode) {
            case BlockMode::kConstant:
                if (static_cast<int>(info.symbol) >= alphabet - (record_.grid == Grid::kSigma))
                    return bad_packet("a constant block's symbol is out of range; block", b.number);
                std::fill_n(b.symbols.get(), b.n, static_cast<std::uint16_t>(info.symbol));
                put_symbols(b.begin, b.symbols.get(), b.n);
                break;
            case BlockMode::kFixed:
                unpack_bits(b.parts.body, b.n, record_.num_bits, b.symbols.get());
                put_symbols(b.begin, b.symbols.get(), b.n);
                break;
            case BlockMode::kCoded:
                if (sink_.values(b.begin) == nullptr) sink_.symbols(b.symbols.get(), b.n);
                break;
            case BlockMode::kRaw:
                sink_.raw(b.begin, b.parts.body, b.n);
                return {};
        }
        for (int i = 0, previous = -1; i < info.escape_count; ++i) {
            std::uint16_t position;
            std::memcpy(&position, b.parts.escape_positions + 2 * i, sizeof(position));
            if (position >= b.n || position <= previous)
                return bad_packet("an escape's position is out of order; block", b.number);
            // Otherwise a level's value would be replaced when stored but kept when added to.
            if (b.symbols[position] != escape_symbol(record_.num_bits))
                return bad_packet("an escape's position is that of another symbol; block", b.number);
            previous = position;
            sink_.escape(b.begin + position, b.parts.escape_values + i * kItem);
        }
        return {};
    }

    const PacketView& view_;
    const SegmentRecord& record_;
    int threads_;
    const Sink& sink_;
    DecodeTable own_;
    const DecodeTable* table_ = nullptr;
    Status status_;
};

}  // namespace qcomm
