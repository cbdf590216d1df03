// A packet's metadata as read_packets leaves it, checked, for the decoding kernels.
#pragma once

#include "launch.h"
#include "qcomm/block.h"
#include "qcomm/cuda.h"
#include "qcomm/huffman.h"

namespace qcomm::cuda {

constexpr int kDecodeWarps = 4;      // units that a block of decode_packets works on
constexpr int kMaxSumPackets = 8;    // packets that a block of sum_packets adds: a warp each
constexpr int kMaxValueTable = 256;  // alphabets up to here are decoded by a table of values
constexpr std::int64_t kMaxElements = kMaxSegmentValues;

// A segment, by its record and by the sizes of those before it.
struct SegmentView {
    std::int64_t count, first_value;
    std::int64_t plain_before, plain_bytes;  // payload bytes of raw and fixed segments: before this one, its own
    std::int64_t payload;                    // byte offset of its first byte in the payload
    std::int64_t first_end, first_checksum, blocks;        // block ends and checksums before its own, its blocks
    std::int64_t first_tile, first_sum_tile, first_piece;  // of decode_packets, sum_packets, check_pieces
    std::int64_t first_run;  // the packet's values of zero runs before its own, which it has if it is coded so
    Quantizer quantizer;
    std::uint32_t code_mask;  // of a code of its own, set by make_decode_tables
};

// A packet, by its header and the sizes of all segments.
struct PacketView {
    std::int64_t ends, checksums, payload;  // byte offsets in the packet; checksums is 0 where there are none
    std::int64_t tiles, sum_tiles, pieces;
    // The values of zero runs, their blocks, and where these begin in the payload, among the ends and the checksums.
    std::int64_t run_values, run_blocks, runs, first_run_end, first_run_checksum;
    int segments;
};

// All that the decoding kernels read and write. Arrays have room for the segments and pieces that the plan expects, so
// that where a packet's entries are does not depend on its contents.
struct DecodeTables {
    const DecodeTask* tasks;
    const StaticTables* codes;
    int packet_count, max_segments, steps;
    DType dtype;
    bool takes_runs;  // segments of zero runs are expected, not refused
    PacketView* packets;
    SegmentView* segments;      // [packet][max_segments]
    std::uint32_t* piece_sums;  // [packet][max_pieces]
    std::int64_t max_pieces;
    unsigned* counters;  // [packet], zeroed by read_packets
    unsigned* faults;    // [packet], set by read_packets

    // Of codes that segments have of their own: [packet][max_segments][max_alphabet], and [2^code_bits].
    int max_alphabet, code_bits;  // 0: none are expected
    std::uint8_t* code_lengths;
    std::uint16_t* code_entries;

    __device__ std::int64_t place_of(int packet, int segment) const {
        return static_cast<std::int64_t>(packet) * max_segments + segment;
    }
    __device__ const SegmentView* segments_of(int packet) const { return segments + place_of(packet, 0); }
    __device__ std::uint8_t* lengths_of(int packet, int segment) const {
        return code_lengths + place_of(packet, segment) * max_alphabet;
    }
    __device__ std::uint16_t* entries_of(int packet, int segment) const {
        return code_entries + (place_of(packet, segment) << code_bits);
    }
};

// Values of a unit of a segment without blocks, and of a block of single symbols.
constexpr std::int64_t unit_values(int steps) { return std::int64_t{kLanes} * steps; }
constexpr std::int64_t sum_tile_values(int steps) { return 2 * unit_values(steps); }  // a block of pairs

// Packets are aligned to 4 bytes only, so larger numbers are read in words.
__device__ __forceinline__ std::uint64_t load_u64(const std::uint8_t* at) {
    const auto* words = reinterpret_cast<const std::uint32_t*>(at);
    return words[0] | static_cast<std::uint64_t>(words[1]) << 32;
}
__device__ __forceinline__ std::uint32_t load_u32(const std::uint8_t* at) {
    return *reinterpret_cast<const std::uint32_t*>(at);
}

// The largest fault stays, whatever the order of threads.
__device__ __forceinline__ void report(unsigned* fault, Fault what) {
    if (what != Fault::kNone) atomicMax(fault, static_cast<unsigned>(what));
}

}  // namespace qcomm::cuda
