// Damage that gets past the front door. Every packet begins with sizes and a checksum of its metadata, which random
// mutations would break nearly always; these functions make them fit again, so that the checks behind them are met.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "qcomm/checksum.h"
#include "qcomm/packet.h"
#include "qcomm/zero_runs.h"

namespace qcomm::fuzz {

// Where the parts of a packet lie by what its header and records say; false when they do not fit its bytes.
struct Layout {
    std::uint64_t records = 0, block_ends = 0, payload = 0;  // offsets
    std::uint64_t elements = 0, blocks = 0;
    std::uint64_t run_blocks = 0, run_values = 0;  // the last of `blocks` and their values
    bool ends_with_block = false;
};

// Block ends and checksums follow from the records, as for a reader; nothing is read behind `bytes`.
inline bool find_layout(const PacketHeader& h, const std::uint8_t* packet, std::uint64_t bytes, Layout* layout) {
    layout->records = sizeof(PacketHeader) + std::uint64_t{8} * h.ndim;
    if (!is_valid(h.dtype)) return false;
    const auto record = static_cast<std::uint64_t>(record_bytes(h.dtype));
    layout->block_ends = layout->records + record * h.segment_count;
    layout->block_ends += std::uint64_t{4} * h.lengths_words;
    if (h.segment_count == 0 || h.steps == 0 || layout->block_ends > bytes) return false;
    std::uint64_t sums = 0;
    for (std::uint64_t i = 0; i < h.segment_count; ++i) {
        const SegmentRecord r = load_record(h.dtype, packet + layout->records + record * i);
        layout->elements += r.count;
        layout->blocks += static_cast<std::uint64_t>(blocks_in(r, h.steps));
        layout->ends_with_block = is_block_coded(r.coding);
        sums += static_cast<std::uint64_t>(checksums_in(r, h.steps));
        if (r.coding == Coding::kRuns) layout->run_values += r.count;
    }
    layout->run_blocks = static_cast<std::uint64_t>(run_blocks(static_cast<std::int64_t>(layout->run_values), h.steps));
    layout->ends_with_block |= layout->run_blocks > 0;
    layout->blocks += layout->run_blocks;
    sums += layout->run_blocks;
    layout->payload = layout->block_ends + 4 * layout->blocks + ((h.flags & kFlagChecksums) != 0 ? 4 * sums : 0);
    return layout->payload <= bytes;
}

// Rewrites magic number, version, sizes, a flat shape, the last block's end and the header checksum. Returns the new
// size: packets consist of 4-byte units.
inline std::size_t repair(std::uint8_t* packet, std::size_t bytes) {
    if (bytes < sizeof(PacketHeader)) return bytes;
    bytes = bytes / 4 * 4;
    PacketHeader h;
    std::memcpy(&h, packet, sizeof(h));
    h.magic = kMagic;
    h.version = kVersion;
    h.total_bytes = bytes;
    Layout layout;
    const bool found = find_layout(h, packet, bytes, &layout);
    if (found) {
        // Of several dimensions none could be told to be the wrong one: they are left for check_dims() to refuse.
        if (h.ndim == 1) {
            h.element_count = layout.elements;
            std::memcpy(packet + sizeof(h), &layout.elements, sizeof(layout.elements));
        }
        if (layout.blocks > 0 && layout.ends_with_block) {
            const auto end = static_cast<std::uint32_t>((bytes - layout.payload) / 4);
            std::memcpy(packet + layout.block_ends + 4 * (layout.blocks - 1), &end, sizeof(end));
        }
    }
    h.header_checksum = 0;
    std::memcpy(packet, &h, sizeof(h));
    h.header_checksum = checksum(packet, static_cast<std::int64_t>(found ? layout.payload : bytes));
    std::memcpy(packet, &h, sizeof(h));
    return bytes;
}

// Takes the payload's checksums out, so that a damaged payload is read at all. Returns the new size.
inline std::size_t strip_checksums(std::uint8_t* packet, std::size_t bytes) {
    PacketHeader h;
    Layout with, without;
    if (bytes < sizeof(h)) return bytes;
    std::memcpy(&h, packet, sizeof(h));
    if ((h.flags & kFlagChecksums) == 0 || !find_layout(h, packet, bytes, &with)) return bytes;
    // The layout is found twice, since without checksums the payload begins earlier: it moves down to there.
    h.flags = 0;
    std::memcpy(packet, &h, sizeof(h));
    if (!find_layout(h, packet, bytes, &without)) return bytes;
    std::memmove(packet + without.payload, packet + with.payload, bytes - with.payload);
    return bytes - (with.payload - without.payload);
}

// Numbers that follow from a seed.
class Random {
public:
    explicit Random(unsigned seed) : state_(seed) {}
    int below(int bound) {
        state_ = state_ * 1664525u + 1013904223u;
        return static_cast<int>((state_ >> 16) % static_cast<std::uint32_t>(bound));
    }

private:
    std::uint32_t state_;
};

constexpr std::uint64_t kTokenBytes = 4 + 4 * kLanes;  // of a coded run block without words

// Writes a coded run block whose tokens all fit the start windows. They mostly fit `values` as well, but any may be a
// skip, the last one too. Mutations hardly ever make such a block: a codeword that changes moves all bits behind it.
inline void write_tokens(std::uint8_t* block, std::int64_t values, Random* random) {
    const int table = random->below(kRunTableCount);
    const RunCode& code = run_code(table);
    std::uint32_t windows[kLanes], bits[kLanes] = {};
    std::fill_n(windows, kLanes, 1u);  // the sentinel
    const int wanted = 1 + random->below(4 * kLanes);
    int tokens = 0;
    for (; tokens < wanted; ++tokens) {
        const int run = random->below(random->below(2) > 0 ? kSkipZeros : 8);
        const bool skip = random->below(4) == 0;
        const std::uint32_t token = skip ? code.skip : code.tokens[8 * run + random->below(kTokenLevels)];
        const std::uint32_t length = token >> 16;
        std::uint32_t &window = windows[tokens % kLanes], &held = bits[tokens % kLanes];
        values -= skip ? kSkipZeros : run + 1;
        if (held + length > 31 || (values < 0 && random->below(4) > 0)) break;
        window = (window & ((1u << held) - 1u)) | (token & 0xFFFFu) << held | 1u << (held + length);
        held += length;
    }
    const std::uint32_t word = RunInfo{RunMode::kCoded, table, tokens}.pack();
    std::memcpy(block, &word, sizeof(word));
    std::memcpy(block + sizeof(word), windows, sizeof(windows));
}

// Changes a run block of `bytes` bytes and `values` values: the mode, the table or, by little, the number of tokens in
// its first word, each of which is checked against the others, or all of its tokens.
inline void change_run_block(std::uint8_t* block, std::uint64_t bytes, std::int64_t values, Random* random) {
    std::uint32_t word = 0;
    std::memcpy(&word, block, sizeof(word));
    RunInfo info = RunInfo::unpack(word);
    const int kind = random->below(6);
    if (kind == 0) info.mode = static_cast<RunMode>(random->below(4));
    if (kind == 1) info.table = random->below(64);
    if (kind == 2) info.tokens += random->below(15) - 7;
    word = info.pack();
    std::memcpy(block, &word, sizeof(word));
    if (kind > 2 && bytes >= kTokenBytes) write_tokens(block, values, random);
}

// Changes one of the run blocks, if there are any, and its checksum with it.
inline void change_run_blocks(std::uint8_t* packet, std::size_t bytes, unsigned seed) {
    PacketHeader h;
    Layout layout;
    if (bytes < sizeof(h)) return;
    std::memcpy(&h, packet, sizeof(h));
    if (!find_layout(h, packet, bytes, &layout) || layout.run_blocks == 0) return;
    Random random(seed);
    const auto blocks = static_cast<std::int64_t>(layout.run_blocks);  // at most bytes / 4, as their ends are there
    const auto values = static_cast<std::int64_t>(layout.run_values);
    const std::int64_t i = random.below(static_cast<int>(blocks));
    // Without another block before it, the first run block is taken to begin where the payload does.
    const std::uint64_t number = layout.blocks - layout.run_blocks + static_cast<std::uint64_t>(i);
    std::uint32_t before = 0, end = 0;
    if (number > 0) std::memcpy(&before, packet + layout.block_ends + 4 * (number - 1), sizeof(before));
    std::memcpy(&end, packet + layout.block_ends + 4 * number, sizeof(end));
    const std::uint64_t at = layout.payload + std::uint64_t{4} * before, size = std::uint64_t{4} * (end - before);
    if (end <= before || at + size > bytes) return;
    change_run_block(packet + at, size, run_block_begin(values, blocks, i + 1) - run_block_begin(values, blocks, i),
                     &random);
    if ((h.flags & kFlagChecksums) == 0) return;
    // Checksums of run blocks are the last.
    const std::uint32_t sum = checksum(packet + at, static_cast<std::int64_t>(size));
    std::memcpy(packet + layout.payload - 4 * static_cast<std::uint64_t>(blocks - i), &sum, sizeof(sum));
}

}  // namespace qcomm::fuzz
