// The tasks of the encoding kernels, and the results that one leaves for the next: arrays of these structs in device
// memory. The host fills the tasks once (encode_plan.cu), the device the states in every step.
//
//   tensor   is measured as a whole and gets a quantizer             statistics.cu
//   segment  is a run of a tensor's values inside a packet           encode.cu: blocks into slots
//   packet   is a list of segments, with its own place in memory     layout.cu, payload.cu: slots into packets
#pragma once

#include <cstdint>

#include "qcomm/block.h"
#include "qcomm/cuda.h"
#include "qcomm/format.h"
#include "qcomm/quantize.h"
#include "qcomm/statistics.h"

namespace qcomm::cuda {

using Count = unsigned long long;  // the type of 64 bits that atomicAdd has

constexpr int kEncodeWarps = 4;  // blocks (encode) or units (payload) that a thread block works on
constexpr int kMaxStaticSymbols = 256;

// The sample of a tensor, which decides the number of bits of a range grid, or the code on a sigma grid.
struct SampleTask {
    std::int64_t count = 0;      // values, or pairs of neighbours on a sigma grid; 0: nothing is decided
    std::int64_t first_bin = 0;  // of its histogram
    std::uint32_t seed = 0;
    int bins = 0;    // sigma: of single symbols, or 256 of pairs, whose histogram has that of single symbols in it
    double c = 0.0;  // range: added to the entropy, at most `most` bits
    int most = 0;
    std::uint8_t single_table = kNoTable, pair_table = kNoTable;  // sigma: the static codes made for this k
};

// A tensor to measure, with all that is known of it beforehand. first_tile and its like count the thread blocks of one
// launch over all tensors: a block finds its task by a binary search (find_task).
struct TensorTask {
    const void* values;
    const float* residual;    // null: none
    const double* inv_scale;  // null: 1
    std::int64_t count;
    std::int64_t first_tile;  // of measure_tensors, among those of all tensors
    double k;                 // sigma: the step in units of the RMS
    Quantizer wanted;         // unless it turns out constant or raw; sigma: p1 is yet to be measured
    bool nonfinite_is_constant, as_it_is, zero_keeps_residual;
    std::int64_t first_sample_tile;  // of sample_tensors
    SampleTask sample;
};

// A segment to encode. Blocks, slots and codewords are numbered over all segments of the plan, since they share arrays.
struct SegmentTask {
    std::int32_t tensor, packet;
    std::int64_t offset, count;  // its values in the tensor
    float* residual_out;         // of its first value; null: not wanted
    std::int64_t first_tile;     // of encode_blocks; a tile is kEncodeWarps blocks of one segment
    std::int64_t first_unit;     // of write_payload: a block, or a piece of a raw or fixed segment
    std::int64_t units;
    std::int64_t first_block;  // of its results
    std::int64_t blocks;       // the most that it can have, with any code; the last ones may stay empty
    std::int64_t slots;        // byte offset of its first slot in the workspace
    std::int64_t first_histogram_tile;
    std::int64_t first_codeword;  // of its own code; a multiple of 4
};

// A packet to write. Its segments, blocks and units follow each other.
struct PacketTask {
    std::uint8_t* out;  // 4-byte aligned
    std::int64_t capacity;
    std::int64_t first_dim;
    std::int32_t ndim;
    std::int32_t first_segment, segments;
    std::int64_t first_block, blocks;
    std::int64_t run_blocks;         // of `blocks`, the last ones: those of zero runs at most
    std::int64_t run_slots;          // byte offset of the first one's slot in the workspace
    std::int64_t first_run_tile;     // of encode_run_blocks and write_run_blocks; a tile is kEncodeWarps blocks
    std::int64_t first_unit, units;  // the first one is a multiple of kEncodeWarps
    bool may_drop;                   // its capacity is below the bound
};

// A block after encode_blocks: its info word, its words if it is coded, its size in the packet in units of 4 bytes.
struct BlockResult {
    std::uint32_t info, words, units;
};
constexpr std::uint32_t kDropped = ~0u;  // as `words`: a constant block of zeros in place of one that was too large

// Zero runs, once tensors are measured: where a segment's values begin among those of its packet, and of all of them
// how many there are, in how many blocks. A segment of another coding has none.
struct RunPlace {
    std::int64_t first_run, count;
};
struct RunTotal {
    std::int64_t values, blocks;
};

// A segment after layout_packets.
struct SegmentState {
    Quantizer quantizer;          // as in its record
    std::int64_t payload;         // byte offset of its first byte from the packet's payload
    std::int64_t units_before;    // of the packet's blocks before its own, in BlockResult units
    std::int64_t first_end;       // number of its first block end among the packet's ...
    std::int64_t first_checksum;  // ... and of its first checksum
    std::int64_t lengths;         // byte offset of its list among the packet's
    int list_bytes;
};

// A packet after layout_packets.
struct PacketState {
    std::int64_t ends, checksums, payload;  // byte offsets in the packet
    std::int64_t lengths;                   // of the lists of code lengths
    std::int64_t runs;                      // byte offset of the run blocks in the payload
    std::int64_t first_run_end, first_run_checksum;
    std::int64_t units_before_runs;  // of the packet's blocks before those, as SegmentState::units_before
    bool fits;                       // in its capacity; otherwise nothing is written
};

// Where one block lies between encode_blocks and write_payload. Escapes and words are written from the last to the
// first, so they end where their areas end.
//
//   32 start windows u32 | escape values | words u16 (or packed symbols, from the front) | escape positions u16
struct SlotShape {
    int values_at, words_at, positions_at, bytes;
    int max_escapes;

    QCOMM_HOST_DEVICE constexpr SlotShape(int steps, bool pairs, int item)
        : values_at(4 * kLanes),
          words_at(values_at + max_escapes_in(steps, pairs) * item),
          positions_at(words_at + 2 * kLanes * steps),
          bytes((positions_at + 2 * max_escapes_in(steps, pairs) + 15) / 16 * 16),
          max_escapes(max_escapes_in(steps, pairs)) {}

    // A block with more escapes is raw.
    QCOMM_HOST_DEVICE static constexpr int max_escapes_in(int steps, bool pairs) {
        return kLanes * steps * (pairs ? 2 : 1) / kValuesPerEscape;
    }
};
static_assert(2 * kLanes >= kLanes * 16 / 8, "the words' area holds packed symbols of 16 bits as well");

// Everything that the encoding kernels read and write.
struct EncodeTables {
    const TensorTask* tensors;
    const SegmentTask* segments;
    const PacketTask* packets;
    const std::int64_t* dims;
    const StaticTables* codes;
    const std::int32_t* own_segments;  // those that may have a code of their own
    int tensor_count, segment_count, packet_count, own_count;
    DType dtype;
    int steps;
    bool checksums;

    Statistics* statistics;
    Quantizer* quantizers;  // of the tensors
    BlockResult* blocks;
    std::uint32_t* ends;        // of the blocks, in units, from their packet's first block
    std::uint32_t* piece_sums;  // checksums of the pieces of raw segments, by unit
    SegmentState* segment_states;
    PacketState* packet_states;
    RunPlace* run_places;        // by segment
    RunTotal* run_totals;        // by packet
    std::int64_t* dropped;       // values, by packet
    std::int64_t* wanted_bytes;  // of the packets before blocks were dropped
    std::uint8_t* absent;        // by tensor: it is zero throughout, and its residual takes no part
    unsigned* counters;          // zeroed: two a tensor, then one a packet
    std::uint8_t* slots;

    // Of codes that segments have of their own, by SegmentTask::first_codeword, but for the first.
    int* list_bytes;  // by segment; 0: it has none, and all its blocks are constant or fixed
    Count *counts, *packages;
    std::uint32_t* own_entries;
    std::uint8_t* lists;
    Count* sample_counts;  // by SampleTask::first_bin
};

}  // namespace qcomm::cuda
