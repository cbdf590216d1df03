// Reads the run blocks of a packet, which all segments of coding runs share. The bytes are hostile; those of the
// metadata have been checked by parse_packet.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "packet_parts.h"
#include "qcomm/block.h"
#include "qcomm/checksum.h"
#include "qcomm/packet.h"
#include "qcomm/parallel.h"
#include "qcomm/zero_runs.h"
#include "segment_decoder.h"
#include "zero_runs_parts.h"

namespace qcomm {

// Decodes run blocks and hands their levels to a sink:
//
//   put(part, begin, n, positions, levels, count, base)
//       of values [begin, begin + n) of part number `part` in order, those with a level are levels[0, count), at
//       positions[] - base behind `begin`
//   put_nan(part, begin, n)    these are NaN
//
// Calls come from several threads, each for values of its own.
template <class Sink>
class RunDecoder {
public:
    // `counts`: values of each part; `place`: where the run blocks begin.
    RunDecoder(const PacketView& view, const std::vector<std::int64_t>& counts, const SegmentPlace& place, int threads,
               const Sink& sink)
        : view_(view), place_(place), threads_(threads), sink_(sink) {
        firsts_.reserve(counts.size() + 1);
        firsts_.push_back(0);
        for (const std::int64_t count : counts) firsts_.push_back(firsts_.back() + count);
        blocks_ = run_blocks(firsts_.back(), view.header.steps);
    }

    Status run() const {
        if (blocks_ == 0) return {};
        const std::int64_t per_block = ceil_div(firsts_.back(), blocks_);
        const int parts = part_count(blocks_, ceil_div(kValuesPerThread, per_block), threads_);
        std::vector<Workspace> workspaces(static_cast<std::size_t>(parts));
        std::vector<Status> found(static_cast<std::size_t>(parts));
        parallel_for(blocks_, parts, [&](int part, std::int64_t first, std::int64_t last) {
            const auto p = static_cast<std::size_t>(part);
            for (std::int64_t i = first; i < last && found[p].ok(); ++i) found[p] = run_block(workspaces[p], i);
        });
        // Of several damaged blocks the first one is told, whatever the number of threads.
        for (const Status& status : found) QCOMM_RETURN_IF_ERROR(status);
        return {};
    }

private:
    // The memory of one thread. A coded block has at most as many tokens as values, and a fixed one as many levels.
    struct Workspace {
        std::unique_ptr<std::uint16_t[]> positions{new std::uint16_t[kMaxRunBlockValues + kRunSlack]};
        std::unique_ptr<std::int8_t[]> levels{new std::int8_t[kMaxRunBlockValues + kRunSlack]};
        std::unique_ptr<std::uint16_t[]> symbols{new std::uint16_t[kMaxRunBlockValues]};
    };

    Status run_block(Workspace& workspace, std::int64_t i) const {
        const std::int64_t number = place_.block + i;
        const auto end_of = [&](std::int64_t block) {
            return 4 * static_cast<std::int64_t>(load_u32(view_.block_ends + 4 * block));
        };
        const std::int64_t at = i == 0 ? place_.at : end_of(number - 1), bytes = end_of(number) - at;
        const std::uint8_t* const block = view_.payload + at;
        if (view_.checksums != nullptr &&
            load_u32(view_.checksums + 4 * (place_.checksum + i)) != checksum(block, bytes))
            return bad_packet("a block is damaged: wrong checksum; block", number);
        const std::int64_t begin = run_block_begin(firsts_.back(), blocks_, i);
        const std::int64_t end = run_block_begin(firsts_.back(), blocks_, i + 1);
        if (end - begin > kMaxRunBlockValues) return bad_packet("a run block has too many values; block", number);
        int count = 0;
        QCOMM_RETURN_IF_ERROR(read_block(workspace, block, bytes, static_cast<int>(end - begin), number, &count));
        if (RunInfo::unpack(load_u32(block)).mode == RunMode::kNotFinite) {
            for_parts(firsts_, begin, end, [&](std::size_t part, std::int64_t from, std::int64_t to) {
                sink_.put_nan(part, from, to - from);
            });
        } else {
            emit(workspace, begin, end, count);
        }
        return {};
    }

    // Fills positions and levels of a block of n values.
    Status read_block(Workspace& workspace, const std::uint8_t* block, std::int64_t bytes, int n, std::int64_t number,
                      int* count) const {
        Cursor cursor(block, bytes);
        const RunInfo info = RunInfo::unpack(load_u32(cursor.take(4)));
        if (!is_readable(info, n)) return bad_packet("a run block's first word is invalid; block", number);
        if (info.mode == RunMode::kFixed) {
            const std::uint8_t* const packed = cursor.take(static_cast<std::uint64_t>(packed_bytes(n, kRunsBits)));
            if (packed == nullptr) return bad_packet("a block is truncated; block", number);
            return read_fixed(workspace, packed, n, number, count);
        }
        if (info.mode == RunMode::kZeros || info.mode == RunMode::kNotFinite) return {};
        RunBlock coded{};
        coded.start = cursor.take(4 * kLanes);
        if (coded.start == nullptr) return bad_packet("a block is truncated; block", number);
        coded.word_count = cursor.left() / 2;
        coded.words = cursor.take(static_cast<std::uint64_t>(cursor.left()));
        coded.tokens = info.tokens;
        coded.values = n;
        coded.code = &run_code(info.table);
        coded.positions = workspace.positions.get();
        coded.levels = workspace.levels.get();
        kernels().decode_runs(coded);
        if (!coded.whole) return bad_packet("a run block's bits do not end where its tokens do; block", number);
        *count = coded.count;
        return {};
    }

    Status read_fixed(Workspace& workspace, const std::uint8_t* packed, int n, std::int64_t number, int* count) const {
        unpack_bits(packed, n, kRunsBits, workspace.symbols.get());
        int found = 0;
        for (int i = 0; i < n; ++i) {
            const int level = workspace.symbols[static_cast<std::size_t>(i)] - kMaxLevel;
            if (level > kMaxLevel) return bad_packet("a level is out of range; block", number);
            workspace.positions[static_cast<std::size_t>(found)] = static_cast<std::uint16_t>(i);
            workspace.levels[static_cast<std::size_t>(found)] = static_cast<std::int8_t>(level);
            found += level != 0;
        }
        *count = found;
        return {};
    }

    // Deals the levels of values [begin, end) to the parts they belong to.
    void emit(const Workspace& workspace, std::int64_t begin, std::int64_t end, int count) const {
        const std::uint16_t* positions = workspace.positions.get();
        const std::int8_t* levels = workspace.levels.get();
        const std::uint16_t* const last = positions + count;
        for_parts(firsts_, begin, end, [&](std::size_t part, std::int64_t from, std::int64_t to) {
            // Positions ascend; those of this part are below its end. The last part's end may be beyond a u16.
            const std::int64_t base = firsts_[part] + from - begin, limit = base + to - from;
            const std::uint16_t* const stop =
                firsts_[part] + to == end ? last : std::lower_bound(positions, last, static_cast<std::uint16_t>(limit));
            const auto found = static_cast<int>(stop - positions);
            sink_.put(part, from, to - from, positions, levels, found, static_cast<int>(base));
            positions = stop;
            levels += found;
        });
    }

    const PacketView& view_;
    SegmentPlace place_;
    int threads_;
    const Sink& sink_;
    std::vector<std::int64_t> firsts_;  // of each part, and the number of all values
    std::int64_t blocks_ = 0;
};

}  // namespace qcomm
