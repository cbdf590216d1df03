// The sum of several packets (specification: decode_packet() of qcomm/reference/decode.py; the sum is a decode of the
// first packet and accumulates of the others, in order).
//
//   out[i] = value(0, i) + value(1, i) + ... rounded after each addition
//
//   chunk  | packet 0: values | packet 1 ... |   of a tile, by a warp each
//
// Warp: a packet. Block: 64 * steps values of a segment; the warps decode a chunk each into shared memory (1 or 2 KiB),
// then all threads add them and store once. If all packets have one code, as is usual, it is in shared memory (16 KiB),
// otherwise codes are read through the first-level cache. 8 packets a launch; more are added to the sum that the launch
// before has stored. Passes: one, and one over the code's bytes before it for the checksum, which is compared before a
// value is used. Zero runs are decoded from the begin of a run block on by each tile that has values of it. Limits:
// codes of at most 15 bits. Safety: every read is inside the block, whose place read_packets has checked; every loop is
// over values of the block. Determinism: a warp owns its unit; additions are in the packets' order. Bytes moved per
// value: the codes' from memory, one store for all packets.
#include <type_traits>

#include "decode_units.cuh"
#include "kernels.cuh"
#include "zero_runs_reader.cuh"

namespace qcomm::cuda {
namespace {

// Bytes of a packet's values: as many as leave room for a code beside 8 packets.
template <class Storage>
constexpr int kChunkBytes = sizeof(Storage) == 8 ? 1024 : 2048;

// Values [0, ...) of a chunk, in shared memory.
template <class Storage>
struct ChunkSink {
    Storage* out;
    __device__ __forceinline__ bool takes_pairs() const { return true; }
    // A chunk is aligned and `i` is even.
    __device__ __forceinline__ void put_pair(int i, Storage first, Storage second) const {
        auto* const place = reinterpret_cast<PairOf<Storage>*>(out + i);
        QCOMM_ASSUME_SHARED(place);
        *place = {first, second};
    }
    __device__ __forceinline__ void put(int i, Storage value) const {
        Storage* const place = out + i;
        QCOMM_ASSUME_SHARED(place);
        *place = value;
    }
    __device__ __forceinline__ Storage get(int i) const { return out[i]; }
};

template <class Tr>
struct SumShared {
    static constexpr int kChunk = kChunkBytes<typename Tr::Storage> / static_cast<int>(sizeof(typename Tr::Storage));
    typename Tr::Storage chunk[kMaxSumPackets][kChunk];
    typename Tr::Storage values[kMaxSumPackets][kMaxValueTable];
    LaneBuffer words[kMaxSumPackets];
    std::uint32_t entries[StaticTables::kMaxEntries];  // lookup_entry() of each
    DecodeCode code;                                   // of the launch's first packet
};
static_assert(sizeof(SumShared<Traits<DType::kFloat64>>) <= 48 << 10, "more would have to be asked for");

// One packet's part in a tile of a sum: values in order, over block boundaries. Packets may code a segment in different
// ways, so one has blocks of single symbols where another has blocks of pairs; a tile is the size of the larger. Run
// blocks begin anywhere in it, and the first one is read from its begin, though the values in front of the tile are
// other tiles'.
template <class Tr, bool kRuns, class Entries>
class SumSource {
    using Storage = typename Tr::Storage;

public:
    // `zero` is the value of a level 0 of zero runs: they add nothing, and x + -0.0 is x for every x.
    __device__ SumSource(const DecodeTables& d, int number, const SegmentView& segment, std::int64_t tile,
                         const Entries& entries, Storage zero, SumShared<Tr>* shared)
        : packet_(d.tasks[number].packet),
          view_(d.packets[number]),
          codes_(d.codes),
          steps_(d.steps),
          zero_(zero),
          values_(shared->values[warp_number()]),
          buffer_(&shared->words[warp_number()]),
          segment_(segment),
          tile_(tile - segment.first_sum_tile),
          begin_(tile_ * sum_tile_values(steps_)),
          entries_(entries) {}

    // Values [at, at + n) of the tile to sink.put(0 ... n - 1); false where a block is malformed.
    template <class S>
    __device__ bool read(int at, int n, const S& sink) {
        const Quantizer& q = segment_.quantizer;
        if constexpr (kRuns) {
            if (q.coding == Coding::kRuns) return read_runs(at, n, sink);
        }
        if (!is_block_coded(q.coding)) {
            read_plain<Tr>(segment_, packet_ + view_.payload, begin_ + at, n, sink);
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
        const std::int64_t rest = segment_.count - block * size;
        block_values_ = static_cast<int>(rest < size ? rest : size);
        return open_block<Tr>(packet_, view_, segment_, block, block_values_, entries_, values_, buffer_, &reader_);
    }

    template <class S>
    __device__ bool read_runs(int at, int n, const S& sink) {
        for (int i = lane_number(); i < n; i += kWarpLanes) sink.put(i, zero_);
        __syncwarp();  // a level's lane is another than its zero's
        const RunQuantizer<typename Tr::Arithmetic> grid(segment_.quantizer.p1);
        for (int done = 0; done < n;) {
            const std::int64_t value = segment_.first_run + begin_ + at + done;
            if ((at + done == 0 || value == runs_.end) && !open_runs(value)) return false;
            const std::int64_t rest = runs_.end - value;
            const int m = rest < n - done ? static_cast<int>(rest) : n - done;
            const auto first = static_cast<int>(value - runs_.begin), before = first - done;
            runs_.reader.read(first, first + m, grid,
                              [&](int position, Storage level) { sink.put(position - before, level); });
            done += m;
            if (value + m == runs_.end && !runs_.reader.close()) return false;
        }
        return true;
    }
    // The run block that holds a value of the packet's zero runs.
    __device__ bool open_runs(std::int64_t value) {
        const std::int64_t block = run_block_of(view_.run_values, view_.run_blocks, value);
        runs_.begin = run_block_begin(view_.run_values, view_.run_blocks, block);
        runs_.end = run_block_begin(view_.run_values, view_.run_blocks, block + 1);
        return open_run_block<Tr>(packet_, view_, block, static_cast<int>(runs_.end - runs_.begin), codes_, buffer_,
                                  &runs_.reader);
    }

    struct Runs {
        std::int64_t begin, end;  // of the open block
        RunReader<Tr> reader;
    };
    struct Nothing {};

    const std::uint8_t* packet_;
    PacketView view_;
    const StaticTables* codes_;
    int steps_;
    Storage zero_;
    const Storage* values_;
    LaneBuffer* buffer_;
    const SegmentView& segment_;
    std::int64_t tile_, begin_;  // in the segment
    Entries entries_;
    BlockReader<Tr, Entries> reader_;
    std::conditional_t<kRuns, Runs, Nothing> runs_;
    int block_values_;
};

// Whether the tile covers the same values in both packets.
__device__ bool match(const SegmentView& one, const SegmentView& other) {
    return one.count == other.count && one.first_value == other.first_value &&
           one.first_sum_tile == other.first_sum_tile;
}

// Adds m values of all packets, in the packets' order, to `out` if wanted; a thread adds two at a time. All that is
// loaded is loaded before the first addition.
template <class Tr>
__device__ __forceinline__ void add_chunk(const SumShared<Tr>* shared, int packets, typename Tr::Storage* out, int m,
                                          bool add) {
    using Storage = typename Tr::Storage;
    using Pair = PairOf<Storage>;
    const bool together = holds_pairs(out);
    QCOMM_ASSUME_GLOBAL(out);
    for (int i = 2 * static_cast<int>(threadIdx.x); i < m; i += 2 * static_cast<int>(blockDim.x)) {
        Pair of[kMaxSumPackets];
#pragma unroll
        for (int p = 0; p < kMaxSumPackets; ++p)
            if (p < packets) of[p] = *reinterpret_cast<const Pair*>(&shared->chunk[p][i]);
        Pair sum = of[0];
        // Of an odd number the last one has no second value: what was read for it is never stored.
        const bool both = i + 1 < m;
        if (add) {
            sum.first = out[i] + sum.first;
            if (both) sum.second = out[i + 1] + sum.second;
        }
#pragma unroll
        for (int p = 1; p < kMaxSumPackets; ++p) {
            if (p >= packets) break;
            sum.first += of[p].first;
            sum.second += of[p].second;
        }
        // One store for both where the address allows it, so that a warp's requests are whole sectors.
        if (together && both) {
            *reinterpret_cast<Pair*>(out + i) = sum;
        } else {
            out[i] = sum.first;
            if (both) out[i + 1] = sum.second;
        }
    }
}

// Adds n values of a tile: warps decode a chunk each, then all threads add.
template <class Tr, class Source>
__device__ void add_tile(const DecodeTables& d, int number, Source source, SumShared<Tr>* shared,
                         typename Tr::Storage* out, int n, bool add) {
    constexpr int kChunk = SumShared<Tr>::kChunk;
    const int packets = static_cast<int>(blockDim.x) / kWarpLanes;
    const ChunkSink<typename Tr::Storage> sink{shared->chunk[warp_number()]};
    for (int at = 0; at < n; at += kChunk) {
        const int m = n - at < kChunk ? n - at : kChunk;
        const bool good = source.read(at, m, sink);
        if (!good && lane_number() == 0) report(&d.faults[number], Fault::kBlock);
        if (__syncthreads_or(!good)) return;
        add_chunk(shared, packets, out + at, m, add);
        __syncthreads();  // the chunks are free again
    }
}

// Packets first, first + 1, ..., one a warp: their sum over a tile, with `add` added to `out`.
template <class Tr, bool kRuns>
__global__ void __launch_bounds__(kMaxSumPackets* kWarpLanes, 1) sum_packets(DecodeTables d, int first, bool add) {
    DYNAMIC_SHARED(SumShared<Tr>, shared);
    const int number = first + warp_number();
    const auto tile = static_cast<std::int64_t>(blockIdx.x);
    bool stop = false;
    for (int p = static_cast<int>(threadIdx.x); p < d.packet_count; p += static_cast<int>(blockDim.x))
        stop |= atomicOr(&d.faults[p], 0u) != 0;
    if (__syncthreads_or(stop) || tile >= d.packets[0].sum_tiles) return;

    const auto segment_of = [&](int packet) {
        return find_task(d.segments_of(packet), d.packets[packet].segments, tile, &SegmentView::first_sum_tile);
    };
    const SegmentView& model = d.segments_of(0)[segment_of(0)];
    const int s = segment_of(number);
    const SegmentView& segment = d.segments_of(number)[s];
    const DecodeCode code = find_decode_code(d, number, s);
    if (threadIdx.x == 0) shared->code = code;
    fill_values<Tr>(shared->values[warp_number()], segment.quantizer, lane_number(), kWarpLanes);
    const bool alike = match(segment, model);
    if (!alike && lane_number() == 0) report(&d.faults[number], Fault::kMismatch);
    if (__syncthreads_or(!alike)) return;
    // Codes that segments have of their own are others in each packet, and those of more than 12 bits have no room.
    const bool far = code.entries != shared->code.entries || code.mask != shared->code.mask ||
                     code.mask >= StaticTables::kMaxEntries;
    const bool near = __syncthreads_or(far) == 0;
    if (near) copy_entries(code, shared->entries, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
    __syncthreads();

    const std::int64_t begin = (tile - model.first_sum_tile) * sum_tile_values(d.steps), rest = model.count - begin;
    const auto n = static_cast<int>(rest < sum_tile_values(d.steps) ? rest : sum_tile_values(d.steps));
    const auto zero = static_cast<typename Tr::Storage>(number > 0 || add ? -0.0 : 0.0);
    auto* const out = static_cast<typename Tr::Storage*>(d.tasks[0].out) + model.first_value + begin;
    // The reader is compiled for either place of the code, as loads of shared memory have instructions of their own.
    const auto add_with = [&](const auto& entries) {
        using Entries = std::decay_t<decltype(entries)>;
        const SumSource<Tr, kRuns, Entries> source(d, number, segment, tile, entries, zero, shared);
        add_tile(d, number, source, shared, out, n, add);
    };
    near ? add_with(NearEntries{shared->entries, code.mask}) : add_with(FarEntries{code});
}

}  // namespace

#ifndef __CUDACC_RTC__
void launch_sum(const DecodeTables& d, std::int64_t tile_count, bool add, void* stream) {
    const auto launch = [&](auto traits) {
        using Tr = decltype(traits);
        const auto kernel = d.takes_runs ? sum_packets<Tr, true> : sum_packets<Tr, false>;
        for (int first = 0; first < d.packet_count; first += kMaxSumPackets) {
            const int packets = d.packet_count - first < kMaxSumPackets ? d.packet_count - first : kMaxSumPackets;
            launch_kernel(kernel, static_cast<unsigned>(tile_count), static_cast<unsigned>(packets * kWarpLanes),
                          sizeof(SumShared<Tr>), stream, d, first, add || first > 0);
        }
    };
    d.dtype == DType::kFloat64 ? launch(Traits<DType::kFloat64>{}) : launch(Traits<DType::kFloat32>{});
}
#endif

}  // namespace qcomm::cuda
