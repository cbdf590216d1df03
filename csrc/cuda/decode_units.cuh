// Values of a segment's part, as decode_packets and sum_packets read them: of a block, or of a segment without blocks.
#pragma once

#include "block_reader.cuh"
#include "checksum.cuh"

namespace qcomm::cuda {

// Values [0, ...) of a unit, in memory.
template <class Storage>
struct Sink {
    Storage* out;
    // Whether pairs of values, the first of which has an even number, may be stored together.
    __device__ __forceinline__ bool takes_pairs() const { return holds_pairs(out); }
    __device__ __forceinline__ void put_pair(int i, Storage first, Storage second) const {
        *reinterpret_cast<PairOf<Storage>*>(out + i) = {first, second};
    }
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
                           LaneBuffer* buffer, BlockReader<Tr, Entries>* reader) {
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
    return reader->open(data, bytes, n, segment.quantizer, entries, values, buffer);
}

}  // namespace qcomm::cuda
