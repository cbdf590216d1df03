// Blocks to values: each packet to its own tensor, or the sum of several packets (specification: decode_packet() of
// qcomm/reference/decode.py; the sum is a decode of the first packet and accumulates of the others, in order).
//
//   out[i] = value(packet, i)            decode_packets
//   out[i] = value(0, i) + value(1, i) + ... rounded after each addition            sum_packets
//
//   block  | info u32 | start windows | escape values | escape positions | words u16 ... | see block_reader.cuh
//
// decode_packets. Thread: a lane of a block. Warp: a block, or 32 * steps values of a segment without blocks. Block: 4
// units of one segment, which share its code (16 KiB of shared memory; one of more than 12 bits stays in device memory,
// for the first-level cache) and its table of values (at most 2 KiB).
// sum_packets. Warp: a packet. Block: 64 * steps values of a segment; the warps decode a chunk each into shared memory
// (1 or 2 KiB), then all threads add them and store once. Codes are read through the first-level cache, as packets may
// differ in them. 8 packets a launch; more are added to the sum that the launch before has stored.
// Passes: one, and one over the code's bytes before it for the checksum, which is compared before a value is used.
// Limits: codes of at most 15 bits.
// Safety: every read is inside the block, whose place read_packets has checked; every loop is over values of the block.
// Determinism: a warp owns its unit; additions are in the packets' order.
// Bytes moved per value: the code's from memory, its size to memory; in a sum one store for all packets.
// The lanes: F. Giesen, "Interleaved entropy coders", arXiv:1402.3392, 2014.
#include "block_reader.cuh"
#include "checksum.cuh"
#include "kernels.cuh"

namespace qcomm::cuda {
namespace {

constexpr int kThreads = kDecodeWarps * kWarpLanes;
constexpr int kChunkBytes = 2048;  // of a packet's values in sum_packets

// A code and its values, as all four warps look them up.
template <class Tr>
struct Shared {
    std::uint32_t entries[StaticTables::kMaxEntries];  // lookup_entry() of each
    typename Tr::Storage values[kMaxValueTable];
};

template <class Tr>
struct SumShared {
    static constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(typename Tr::Storage));
    typename Tr::Storage chunk[kMaxSumPackets][kChunk];
    typename Tr::Storage values[kMaxSumPackets][kMaxValueTable];
};
static_assert(sizeof(SumShared<Traits<DType::kFloat64>>) <= 48 << 10, "more would have to be asked for");

// Values [0, ...) of a unit, in memory.
template <class Storage>
struct Sink {
    Storage* out;
    __device__ __forceinline__ void put(int i, Storage value) const { out[i] = value; }
    __device__ __forceinline__ Storage get(int i) const { return out[i]; }
};

// Reads values [begin, begin + n) of a segment without blocks. Its checksum is check_pieces', compared before this
// launch.
template <class Tr, class S>
__device__ void read_plain(const SegmentView& segment, const std::uint8_t* payload, std::int64_t begin, int n,
                           const S& sink) {
    const Quantizer& q = segment.quantizer;
    const std::uint8_t* const data = payload + segment.payload;
    if (q.coding == Coding::kConstant) {
        const auto value = Tr::narrow(static_cast<typename Tr::Arithmetic>(q.p0));
        for (int i = lane_number(); i < n; i += kWarpLanes) sink.put(i, value);
    } else if (q.coding == Coding::kRaw) {
        for (int i = lane_number(); i < n; i += kWarpLanes) sink.put(i, load_value<Tr>(data, begin + i));
    } else {
        const RangeValues<Tr> value_of(q);
        const int num_bits = q.num_bits;
        const std::int64_t halves = segment.plain_bytes / 2;
        for (int i = lane_number(); i < n; i += kWarpLanes)
            sink.put(i, value_of(load_symbol(data, halves, begin + i, num_bits)));
    }
}

// Opens a block of a segment, if its checksum is right. read_packets has checked that its ends ascend inside the
// payload.
template <class Tr, class Entries>
__device__ bool open_block(const std::uint8_t* packet, const PacketView& view, const SegmentView& segment,
                           std::int64_t block, int n, const Entries& entries, const typename Tr::Storage* values,
                           BlockReader<Tr, Entries>* reader) {
    const std::uint8_t* const ends = packet + view.ends + 4 * (segment.first_end + block);
    const std::int64_t begin = block == 0 ? segment.payload : 4 * static_cast<std::int64_t>(load_u32(ends - 4));
    const auto bytes = static_cast<int>(4 * static_cast<std::int64_t>(load_u32(ends)) - begin);
    const std::uint8_t* const data = packet + view.payload + begin;
    if (view.checksums != 0) {
#ifdef QCOMM_PLANT_OUT_OF_BOUNDS
        const int words = bytes / 4 + 1;
#else
        const int words = bytes / 4;
#endif
        const std::uint32_t sum = warp_checksum(reinterpret_cast<const std::uint32_t*>(data), words);
        if (sum != load_u32(packet + view.checksums + 4 * (segment.first_checksum + block))) return false;
    }
    return reader->open(data, bytes, n, segment.quantizer, entries, values);
}

// Decodes a unit of a segment, by a warp; false where it is malformed. Values may have been written by then.
template <class Tr, class Entries>
__device__ __forceinline__ bool decode_unit(const DecodeTables& d, int number, const SegmentView& segment, int tile,
                                            const Entries& entries, const typename Tr::Storage* values) {
    using Storage = typename Tr::Storage;
    const DecodeTask task = d.tasks[number];
    const PacketView& view = d.packets[number];
    const std::int64_t unit = (tile - segment.first_tile) * kDecodeWarps + warp_number();
    const Quantizer& q = segment.quantizer;
    const std::int64_t size = is_block_coded(q.coding) ? values_per_block(q.coding, d.steps) : unit_values(d.steps);
    const std::int64_t begin = unit * size;
    if (begin >= segment.count) return true;
    const int n = static_cast<int>(segment.count - begin < size ? segment.count - begin : size);
    Sink<Storage> sink{static_cast<Storage*>(task.out) + segment.first_value + begin};
    QCOMM_KEEP_POINTER(sink.out);
    QCOMM_ASSUME_GLOBAL(sink.out);
    if (!is_block_coded(q.coding)) {
        read_plain<Tr>(segment, task.packet + view.payload, begin, n, sink);
        return true;
    }
    BlockReader<Tr, Entries> reader;
    if (!open_block<Tr>(task.packet, view, segment, unit, n, entries, values, &reader)) return false;
    reader.read(0, n, sink);
    return reader.close();
}

// A unit a warp, tile_count blocks a packet.
template <class Tr>
__global__ void __launch_bounds__(kThreads, 1) decode_packets(DecodeTables d, int tile_count) {
    DYNAMIC_SHARED(Shared<Tr>, shared);
    const int number = static_cast<int>(blockIdx.x) / tile_count, tile = static_cast<int>(blockIdx.x) % tile_count;
    // Only faults of earlier launches must be seen; whether those of this one are does not matter.
    if (__syncthreads_or(threadIdx.x == 0 && atomicOr(&d.faults[number], 0u) != 0)) return;
    if (tile >= d.packets[number].tiles) return;
    const SegmentView* const segments = d.segments_of(number);
    const int s = find_task(segments, d.packets[number].segments, tile, &SegmentView::first_tile);
    const DecodeCode code = find_decode_code(d, number, s);
    const bool near = code.mask < StaticTables::kMaxEntries;
    for (std::uint32_t i = threadIdx.x; near && code.mask != 0 && i <= code.mask; i += kThreads)
        shared->entries[i] = lookup_entry(code.entries[i]);
    fill_values<Tr>(shared->values, segments[s].quantizer, static_cast<int>(threadIdx.x), kThreads);
    __syncthreads();
    const SegmentView& segment = segments[s];
    const bool good =
        near ? decode_unit<Tr>(d, number, segment, tile, NearEntries{shared->entries, code.mask}, shared->values)
             : decode_unit<Tr>(d, number, segment, tile, FarEntries{code}, shared->values);
    if (!good && lane_number() == 0) report(&d.faults[number], Fault::kBlock);
}

// One packet's part in a tile of a sum: values in order, over block boundaries. Packets may code a segment in different
// ways, so one has blocks of single symbols where another has blocks of pairs; a tile is the size of the larger.
template <class Tr>
class SumSource {
public:
    __device__ SumSource(const DecodeTables& d, int number, std::int64_t tile, typename Tr::Storage* values)
        : packet_(d.tasks[number].packet), view_(d.packets[number]), steps_(d.steps), values_(values) {
        const SegmentView* const segments = d.segments_of(number);
        const int s = find_task(segments, view_.segments, tile, &SegmentView::first_sum_tile);
        segment_ = &segments[s];
        tile_ = tile - segment_->first_sum_tile;
        begin_ = tile_ * sum_tile_values(steps_);
        entries_ = FarEntries{find_decode_code(d, number, s)};
        fill_values<Tr>(values, segment_->quantizer, lane_number(), kWarpLanes);
        __syncwarp();
    }

    // Whether a packet's tile covers the same values as another's.
    __device__ bool matches(const SegmentView& other) const {
        return segment_->count == other.count && segment_->first_value == other.first_value &&
               segment_->first_sum_tile == other.first_sum_tile;
    }

    // Values [at, at + n) of the tile to sink.put(0 ... n - 1); false where a block is malformed.
    template <class S>
    __device__ bool read(int at, int n, const S& sink) {
        const Quantizer& q = segment_->quantizer;
        if (!is_block_coded(q.coding)) {
            read_plain<Tr>(*segment_, packet_ + view_.payload, begin_ + at, n, sink);
            return true;
        }
        const auto size = static_cast<int>(values_per_block(q.coding, steps_));
        for (int done = 0; done < n;) {
            const int in_block = (at + done) % size;
            if (in_block == 0 && !open_next(at + done, size)) return false;
            const int end = block_values_ - in_block < n - done ? block_values_ : in_block + n - done;
            reader_.read(in_block, end, S{sink.out + done - in_block});
            done += end - in_block;
            if (end == block_values_ && !reader_.close()) return false;
        }
        return true;
    }

private:
    // The block that begins at value `at` of the tile.
    __device__ bool open_next(int at, int size) {
        const std::int64_t block = tile_ * (static_cast<int>(sum_tile_values(steps_)) / size) + at / size;
        const std::int64_t rest = segment_->count - block * size;
        block_values_ = static_cast<int>(rest < size ? rest : size);
        return open_block<Tr>(packet_, view_, *segment_, block, block_values_, entries_, values_, &reader_);
    }

    const std::uint8_t* packet_;
    PacketView view_;
    int steps_;
    typename Tr::Storage* values_;
    const SegmentView* segment_;
    std::int64_t tile_, begin_;  // in the segment
    FarEntries entries_;
    BlockReader<Tr, FarEntries> reader_;
    int block_values_;
};

// Packets first, first + 1, ..., one a warp: their sum over a tile, with `add` added to `out`.
template <class Tr>
__global__ void __launch_bounds__(kMaxSumPackets* kWarpLanes, 1) sum_packets(DecodeTables d, int first, bool add) {
    DYNAMIC_SHARED(SumShared<Tr>, shared);
    constexpr int kChunk = SumShared<Tr>::kChunk;
    const int packets = static_cast<int>(blockDim.x) / kWarpLanes, number = first + warp_number();
    const auto tile = static_cast<std::int64_t>(blockIdx.x);
    bool stop = false;
    for (int p = static_cast<int>(threadIdx.x); p < d.packet_count; p += static_cast<int>(blockDim.x))
        stop |= atomicOr(&d.faults[p], 0u) != 0;
    if (__syncthreads_or(stop) || tile >= d.packets[0].sum_tiles) return;

    const SegmentView& model =
        d.segments_of(0)[find_task(d.segments_of(0), d.packets[0].segments, tile, &SegmentView::first_sum_tile)];
    const std::int64_t begin = (tile - model.first_sum_tile) * sum_tile_values(d.steps), rest = model.count - begin;
    const auto n = static_cast<int>(rest < sum_tile_values(d.steps) ? rest : sum_tile_values(d.steps));
    SumSource<Tr> source(d, number, tile, shared->values[warp_number()]);
    const bool alike = source.matches(model);
    if (!alike && lane_number() == 0) report(&d.faults[number], Fault::kMismatch);
    if (__syncthreads_or(!alike)) return;

    // Warps decode a chunk each; then every thread adds one value of all of them, in the packets' order.
    auto* const out = static_cast<typename Tr::Storage*>(d.tasks[0].out) + model.first_value + begin;
    const Sink<typename Tr::Storage> sink{shared->chunk[warp_number()]};
    for (int at = 0; at < n; at += kChunk) {
        const int m = n - at < kChunk ? n - at : kChunk;
        const bool good = source.read(at, m, sink);
        if (!good && lane_number() == 0) report(&d.faults[number], Fault::kBlock);
        if (__syncthreads_or(!good)) return;
        for (int i = static_cast<int>(threadIdx.x); i < m; i += static_cast<int>(blockDim.x)) {
            auto sum = shared->chunk[0][i];
            if (add) sum = out[at + i] + sum;
            for (int p = 1; p < packets; ++p) sum += shared->chunk[p][i];
            out[at + i] = sum;
        }
        __syncthreads();  // the chunks are free again
    }
}

}  // namespace

#ifndef __CUDACC_RTC__
void launch_decode(const DecodeTables& d, std::int64_t tile_count, void* stream) {
    with_source(d.dtype, false, [&](auto traits, auto) {
        using Tr = decltype(traits);
        launch_kernel(decode_packets<Tr>, static_cast<unsigned>(tile_count * d.packet_count), kThreads,
                      sizeof(Shared<Tr>), stream, d, static_cast<int>(tile_count));
    });
}

void launch_sum(const DecodeTables& d, std::int64_t tile_count, bool add, void* stream) {
    const auto launch = [&](auto traits) {
        using Tr = decltype(traits);
        for (int first = 0; first < d.packet_count; first += kMaxSumPackets) {
            const int packets = d.packet_count - first < kMaxSumPackets ? d.packet_count - first : kMaxSumPackets;
            launch_kernel(sum_packets<Tr>, static_cast<unsigned>(tile_count),
                          static_cast<unsigned>(packets * kWarpLanes), sizeof(SumShared<Tr>), stream, d, first,
                          add || first > 0);
        }
    };
    d.dtype == DType::kFloat64 ? launch(Traits<DType::kFloat64>{}) : launch(Traits<DType::kFloat32>{});
}
#endif

}  // namespace qcomm::cuda
