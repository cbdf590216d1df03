// What the encoding kernels are told, and what they tell each other: arrays of these structs in device memory. The host
// fills the tasks (encode_plan.cu), the device the states.
//
//   tensor   is measured as a whole and gets a quantizer             statistics.cu
//   segment  is a run of a tensor's values inside a packet           encode.cu: blocks into slots
//   packet   is a list of segments, with its own place in memory     layout.cu, payload.cu: slots into packets
#pragma once

#include <cstdint>

#include "qcomm/cuda.h"
#include "qcomm/format.h"
#include "qcomm/quantize.h"
#include "qcomm/statistics.h"

namespace qcomm::cuda {

constexpr int kEncodeWarps = 4;  // blocks (encode) or units (payload) that a thread block works on
constexpr int kMaxStaticSymbols = 256;

struct TensorTask {
    const void* values;
    const float* residual;    // null: none
    const double* inv_scale;  // null: 1
    std::int64_t count;
    std::int64_t first_tile;  // of measure_tensors, among those of all tensors
    double k;                 // sigma: the step in units of the RMS
    Quantizer wanted;         // what it is if it is neither constant nor raw; sigma: p1 is yet to be measured
    bool nonfinite_is_constant;
};

struct SegmentTask {
    std::int32_t tensor, packet;
    std::int64_t offset, count;  // its values in the tensor
    float* residual_out;         // of its first value; null: not wanted
    std::int64_t first_tile;     // of encode_blocks; a tile is kEncodeWarps blocks of one segment
    std::int64_t first_unit;     // of write_payload: a block, or a piece of a raw or fixed segment
    std::int64_t units;
    std::int64_t first_block;  // of its results
    std::int64_t blocks;       // 0 unless the tensor's wanted coding has blocks
    std::int64_t slots;        // byte offset of its first slot in the workspace
};

struct PacketTask {
    std::uint8_t* out;  // 4-byte aligned
    std::int64_t capacity;
    std::int64_t first_dim;
    std::int32_t ndim;
    std::int32_t first_segment, segments;
    std::int64_t first_block, blocks;
    std::int64_t first_unit, units;  // the first one is a multiple of kEncodeWarps
};

// A block after encode_blocks: its info word, its words if it is coded, its size in the packet in units of 4 bytes.
struct BlockResult {
    std::uint32_t info, words, units;
};

// A segment after layout_packets.
struct SegmentState {
    Quantizer quantizer;          // as in its record
    std::int64_t payload;         // byte offset of its first byte from the packet's payload
    std::int64_t units_before;    // of the packet's blocks before its own, in BlockResult units
    std::int64_t first_end;       // number of its first block end among the packet's ...
    std::int64_t first_checksum;  // ... and of its first checksum
};

struct PacketState {
    std::int64_t ends, checksums, payload;  // byte offsets in the packet
    bool fits;                              // in its capacity; otherwise nothing is written
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
        return kLanes * steps * (pairs ? 2 : 1) / 16;
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
    int tensor_count, segment_count, packet_count;
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
    unsigned* counters;  // zeroed: one a tensor, then one a packet
    std::uint8_t* slots;
};

}  // namespace qcomm::cuda
