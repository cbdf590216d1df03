// Blocks from their slots, and raw and fixed segments from their values, into the packets; all checksums
// (specification: block() and Writer of qcomm/reference/packet.py).
//
//   block  | info u32 | start windows | escape values | escape positions | words u16 ... | zeros to 4 bytes
//            lane 0     lane 1 2 ...   each lane puts together the 32-bit words i = lane, lane + 32, ...
//
// Thread: a word of the packet at a time. Warp: a unit, which is a block, or 64 KiB of a raw or fixed segment: words
// pass through the lanes in the order of the checksum, so it costs no access to memory. Block: 4 units of one packet.
// No shared memory.
// Passes: one. The last block of a packet combines the checksums of pieces and computes that of the metadata.
// Limits: steps <= 512, so that a block's offsets fit an int.
// Determinism: a warp owns its unit; which block is last only decides where the header's checksum is computed.
// Bytes moved per value: twice the code's; of raw ones a read (with a residual 8 and a write of 4) and a write. In a
// packet from which blocks may be dropped residuals are written here, too: 8 and a write of 4 more, for which encode.cu
// then does not do so.
#include "checksum.cuh"
#include "coder.cuh"
#include "kernels.cuh"
#include "last_block.cuh"
#include "payload.cuh"
#include "source.cuh"

namespace qcomm::cuda {
namespace {

constexpr int kThreads = kEncodeWarps * kWarpLanes;
constexpr std::int64_t kPieceWords = kChecksumPiece / 4;

// Word k of n values' storage, with zeros behind the last one.
// Narrow values are two a word, wide ones two words a value; neighbouring lanes still read neighbouring memory.
template <class Tr, class Values>
__device__ __forceinline__ std::uint32_t value_word(const Values& u, std::int64_t begin, std::int64_t n,
                                                    std::int64_t k) {
    if constexpr (sizeof(typename Tr::Storage) == 4) {
        return bit_cast<std::uint32_t>(u.stored(begin + k));
    } else if constexpr (sizeof(typename Tr::Storage) == 8) {
        return static_cast<std::uint32_t>(bit_cast<std::uint64_t>(u.stored(begin + k / 2)) >> (k % 2 * 32));
    } else {
        const std::uint32_t low = u.stored(begin + 2 * k);
        return 2 * k + 1 < n ? low | static_cast<std::uint32_t>(u.stored(begin + 2 * k + 1)) << 16 : low;
    }
}

// The parts of a fixed or coded block behind its start windows, as one row of u16: they follow each other without gaps
// in a packet, so a word of 32 bits may have the end of one part and the begin of the next.
//
//   | escape values | escape positions | words, or packed symbols |   zeros behind
class BlockTail {
public:
    __device__ BlockTail(const std::uint8_t* slot, const SlotShape& shape, const BlockResult& block, int n,
                         int num_bits, int item)
        : info_(BlockInfo::unpack(block.info)),
          value_halves_(info_.escape_count * item / 2),
          body_halves_(info_.mode == BlockMode::kCoded ? static_cast<int>(block.words)
                                                       : static_cast<int>(ceil_div(packed_bytes(n, num_bits), 2))),
          values_(reinterpret_cast<const std::uint16_t*>(slot + shape.words_at) - value_halves_),
          positions_(reinterpret_cast<const std::uint16_t*>(slot + shape.positions_at) + shape.max_escapes -
                     info_.escape_count),
          body_(info_.mode == BlockMode::kCoded
                    ? reinterpret_cast<const std::uint16_t*>(slot + shape.positions_at) - body_halves_
                    : reinterpret_cast<const std::uint16_t*>(slot + shape.words_at)) {}

    __device__ std::uint32_t word(int i) const { return half(2 * i) | half(2 * i + 1) << 16; }

private:
    // Without a branch, so that loads of many words can be under way at once.
    __device__ std::uint32_t half(int k) const {
        const int positions_at = value_halves_, body_at = positions_at + info_.escape_count;
        const std::uint16_t* from = k < positions_at ? values_ + k : positions_ + (k - positions_at);
        if (k >= body_at) from = body_ + (k - body_at);
        return k < body_at + body_halves_ ? *from : 0u;
    }

    BlockInfo info_;
    int value_halves_, body_halves_;
    const std::uint16_t *values_, *positions_, *body_;
};

// A unit of a packet being written, by one warp: a block from its slot, or a piece of a segment without blocks.
template <class Tr, bool kAdjusted>
struct Unit {
    const EncodeTables& e;
    const SegmentTask& segment;
    const SegmentState& state;
    const PacketState& packet;
    std::uint8_t* out;
    bool may_drop;
    Source<Tr, kAdjusted> u;

    static constexpr int kItem = sizeof(typename Tr::Storage);

    // Offsets are from the segment's first byte.
    __device__ std::uint32_t* payload_word(std::int64_t offset) const {
        return reinterpret_cast<std::uint32_t*>(out + packet.payload + state.payload + offset);
    }
    // Raw values lose nothing.
    __device__ void clear_residual(std::int64_t begin, std::int64_t n) const {
        if (segment.residual_out == nullptr) return;
        __syncwarp();  // it may be part of u, which all lanes have read by now
        for (std::int64_t i = lane_number(); i < n; i += kWarpLanes) segment.residual_out[begin + i] = 0.0f;
    }

    // Puts a block together: its words in order, in rows of 32 that pass through the checksum. The first two rows have
    // the info and the start windows in them, and take the slower way; raw blocks have their values behind the info.
    __device__ void write_block(std::int64_t b) const {
        const Quantizer& q = state.quantizer;
        const BlockResult block = e.blocks[segment.first_block + b];
        const BlockInfo info = BlockInfo::unpack(block.info);
        const std::int64_t per_block = values_per_block(q.coding, e.steps), begin = b * per_block;
        const int n = static_cast<int>(segment.count - begin < per_block ? segment.count - begin : per_block);
        const SlotShape shape(e.steps, q.coding == Coding::kPair, kItem);
        const std::uint8_t* slot = e.slots + segment.slots + b * shape.bytes;
        const BlockTail tail(slot, shape, block, n, q.num_bits, kItem);
        const int head = info.mode == BlockMode::kCoded ? 1 + kLanes : 1;
        const std::int64_t end = e.ends[segment.first_block + b] - state.units_before;
        std::uint32_t* const to = payload_word(4 * (end - block.units));
        WarpChecksum sum;
        const int lane = lane_number(), words = static_cast<int>(block.units);
        if (info.mode == BlockMode::kRaw) {
            write_words(to, lane, words, sum,
                        [&](int i) { return i == 0 ? block.info : value_word<Tr>(u, begin, n, i - 1); });
        } else {
            const int first_rows = words < 2 * kWarpLanes ? words : 2 * kWarpLanes;  // the head is in these
            write_words(to, lane, first_rows, sum, [&](int i) {
                if (i >= head) return tail.word(i - head);
                return i == 0 ? block.info : reinterpret_cast<const std::uint32_t*>(slot)[i - 1];
            });
            write_words(to, lane + 2 * kWarpLanes, words, sum, [&](int i) { return tail.word(i - head); });
        }
        const std::uint32_t checksum = sum.finish(4 * static_cast<std::int64_t>(block.units));
        if (lane_number() == 0) {
            const auto total = static_cast<std::uint32_t>(state.payload / 4 + end);
            reinterpret_cast<std::uint32_t*>(out + packet.ends)[state.first_end + b] = total;
            if (e.checksums) checksum_at(state.first_checksum + b) = checksum;
        }
        if (info.mode == BlockMode::kRaw) {
            clear_residual(begin, n);
        } else if (may_drop && q.grid == Grid::kSigma && segment.residual_out != nullptr) {
            update_residual(q, begin, n, block.words == kDropped && info.mode == BlockMode::kConstant);
        }
    }

    // The residual of a block's values; a dropped block's is all of u.
    __device__ void update_residual(const Quantizer& q, std::int64_t begin, int n, bool dropped) const {
        __syncwarp();
        const auto grid = sigma_quantizer<Tr>(q);
        const int escape = escape_of(q);
        for (int i = lane_number(); i < n; i += kWarpLanes)
            segment.residual_out[begin + i] =
                dropped ? static_cast<float>(u[begin + i]) : residual_of<Tr>(u[begin + i], grid, escape);
    }

    // Writes a piece of a segment without blocks, word i of which is word_at(i), and leaves its checksum for the
    // packet's last thread block. Pieces are of the checksum's size, so each is one warp's whole sum.
    template <class WordAt>
    __device__ void write_piece(std::int64_t piece, std::int64_t words, std::uint32_t* piece_sum,
                                const WordAt& word_at) const {
        const std::int64_t first = piece * kPieceWords;
        if (first >= words) return;
        const std::int64_t end = words - first < kPieceWords ? words : first + kPieceWords;
        WarpChecksum sum;
        write_words(payload_word(0), first + lane_number(), end, sum, word_at);
        const std::uint32_t checksum = sum.finish(4 * (end - first));
        if (lane_number() == 0) *piece_sum = checksum;
    }
    __device__ void write_raw_piece(std::int64_t piece, std::uint32_t* piece_sum) const {
        const std::int64_t words = align4(segment.count * kItem) / 4;
        write_piece(piece, words, piece_sum, [&](std::int64_t i) { return value_word<Tr>(u, 0, segment.count, i); });
        const std::int64_t begin = piece * kPieceWords * 4 / kItem, end = begin + kPieceWords * 4 / kItem;
        clear_residual(begin, (end < segment.count ? end : segment.count) - begin);
    }
    // Symbols reach over the borders of words: a word's symbols are quantized again where it begins inside one.
    __device__ void write_fixed_piece(std::int64_t piece, std::uint32_t* piece_sum) const {
        const Quantizer& q = state.quantizer;
        const RangeQuantizer grid(q.grid, q.num_bits, q.p0, q.p1);
        const std::int64_t words = align4(packed_bytes(segment.count, q.num_bits)) / 4;
        write_piece(piece, words, piece_sum,
                    [&](std::int64_t i) { return packed_word(u, grid, 0, segment.count, q.num_bits, i); });
    }

    // A constant segment has no payload, only residuals: its units take every units-th row of 32 values.
    __device__ void lose_constant(std::int64_t unit) const {
        const double value = state.quantizer.p0;
        if (segment.residual_out == nullptr || !__builtin_isfinite(value) || e.absent[segment.tensor] != 0) return;
#pragma unroll 1  // otherwise the turns are counted first, by a division
        for (std::int64_t i = unit * kWarpLanes + lane_number(); i < segment.count; i += segment.units * kWarpLanes)
            segment.residual_out[i] = static_cast<float>(u[i] - static_cast<typename Tr::Arithmetic>(value));
    }

    // Of a packet that cannot be written no value is sent, and all that are finite are kept.
    __device__ void keep_everything(std::int64_t unit) const {
        const Quantizer& q = state.quantizer;
        if (segment.residual_out == nullptr || (q.coding == Coding::kConstant && !__builtin_isfinite(q.p0)) ||
            e.absent[segment.tensor] != 0)
            return;
#pragma unroll 1
        for (std::int64_t i = unit * kWarpLanes + lane_number(); i < segment.count; i += segment.units * kWarpLanes) {
            const auto x = static_cast<float>(u[i]);
            segment.residual_out[i] = __builtin_isfinite(x) ? x : 0.0f;
        }
    }

    __device__ std::uint32_t& checksum_at(std::int64_t number) const {
        return reinterpret_cast<std::uint32_t*>(out + packet.checksums)[number];
    }
};

// Combines the checksums of the pieces of segment s; by a warp.
__device__ void finish_pieces(const EncodeTables& e, const PacketTask& packet, const PacketState& layout, int s,
                              std::int64_t item) {
    const SegmentState& state = e.segment_states[s];
    const Quantizer& q = state.quantizer;
    if (q.coding != Coding::kRaw && q.coding != Coding::kFixed) return;
    const std::int64_t count = e.segments[s].count;
    const std::int64_t bytes = align4(q.coding == Coding::kRaw ? count * item : packed_bytes(count, q.num_bits));
    const std::int64_t pieces = ceil_div(bytes, kChecksumPiece);
    const std::uint32_t sum = warp_checksum(e.piece_sums + e.segments[s].first_unit, pieces);
    if (lane_number() == 0) reinterpret_cast<std::uint32_t*>(packet.out + layout.checksums)[state.first_checksum] = sum;
}

// A unit a warp; the last block of a packet completes its checksums.
template <class Tr, bool kAdjusted>
__global__ void __launch_bounds__(kThreads, 1) write_payload(EncodeTables e) {
    const std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * kEncodeWarps + warp_number();
    const int p = find_task(e.packets, e.packet_count, unit, &PacketTask::first_unit);
    const PacketTask packet = e.packets[p];
    const PacketState layout = e.packet_states[p];
    if (unit - packet.first_unit < packet.units) {
        const int s = packet.first_segment +
                      find_task(e.segments + packet.first_segment, packet.segments, unit, &SegmentTask::first_unit);
        const SegmentTask segment = e.segments[s];
        const SegmentState state = e.segment_states[s];
        const Unit<Tr, kAdjusted> writer{e,
                                         segment,
                                         state,
                                         layout,
                                         packet.out,
                                         packet.may_drop,
                                         Source<Tr, kAdjusted>(e.tensors[segment.tensor], segment.offset)};
        const std::int64_t at = unit - segment.first_unit;
        if (!layout.fits) {
            writer.keep_everything(at);
        } else if (is_block_coded(state.quantizer.coding)) {
            if (at * values_per_block(state.quantizer.coding, e.steps) < segment.count) writer.write_block(at);
        } else if (state.quantizer.coding == Coding::kRaw) {
            writer.write_raw_piece(at, &e.piece_sums[unit]);
        } else if (state.quantizer.coding == Coding::kFixed) {
            writer.write_fixed_piece(at, &e.piece_sums[unit]);
        } else if (state.quantizer.coding == Coding::kConstant) {
            writer.lose_constant(at);
        }
    }
    const auto blocks = static_cast<unsigned>(packet.units == 0 ? 1 : ceil_div(packet.units, kEncodeWarps));
    // The rest needs the results of the packet's other blocks: checksums of pieces and blocks, and block ends.
    if (!is_last_block(&e.counters[2 * e.tensor_count + p], blocks) || !layout.fits) return;
    if (e.checksums) {
        for (int s = warp_number(); s < packet.segments; s += kEncodeWarps)
            finish_pieces(e, packet, layout, packet.first_segment + s, Unit<Tr, kAdjusted>::kItem);
    }
    __syncthreads();
    if (warp_number() != 0) return;
    auto* const words = reinterpret_cast<std::uint32_t*>(packet.out);
    const std::uint32_t sum = warp_checksum(words, layout.payload / 4);
    __syncwarp();  // other lanes have read the word that lane 0 writes
    if (lane_number() == 0) words[offsetof(PacketHeader, header_checksum) / 4] = sum;
}

}  // namespace

#ifndef __CUDACC_RTC__
void launch_payload(const EncodeTables& e, bool adjusted, std::int64_t tiles, void* stream) {
    with_source(e.dtype, adjusted, [&](auto traits, auto is_adjusted) {
        launch_kernel(write_payload<decltype(traits), decltype(is_adjusted)::value>, static_cast<unsigned>(tiles),
                      kThreads, 0, stream, e);
    });
}
#endif

}  // namespace qcomm::cuda
