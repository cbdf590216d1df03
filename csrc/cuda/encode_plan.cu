// The host's side of encoding: checks what is asked for, lays out the blob (tasks, as the kernels read them) and the
// workspace, and enqueues the kernels.
#include <algorithm>
#include <cstring>

#include "kernels.cuh"
#include "qcomm/block.h"
#include "qcomm/huffman.h"

namespace qcomm::cuda {
namespace {

constexpr std::int64_t kMaxElements = std::int64_t{1} << 42;
constexpr std::int64_t kMaxPayloadBytes = std::int64_t{4} << 32;  // block ends count 4-byte units in 32 bits
constexpr std::int64_t kMaxLaunch = 0x7FFFFFFF;                   // thread blocks

std::int64_t align16(std::int64_t bytes) { return (bytes + 15) / 16 * 16; }

Status check_tensor(const Tensor& tensor, DType dtype, std::int64_t index) {
    const Quantizer& q = tensor.quantizer;
    if (tensor.count < 0 || tensor.count > kMaxElements) return bad_argument("a tensor's count is out of range", index);
    if (item_bytes(dtype) < 4 && (tensor.residual != nullptr || tensor.inv_scale != nullptr)) {
        return bad_argument("a residual or a scale needs float32 or float64 values: 16 bits cannot carry them exactly",
                            index);
    }
    if (q.coding == Coding::kRaw) return {};
    if (q.grid != Grid::kSigma || q.num_bits < 2 || q.num_bits > 16 || !is_block_coded(q.coding))
        return bad_argument("a tensor is raw, or single or pair on a sigma grid of 2..16 bits", index);
    if (q.coding == Coding::kPair && q.num_bits != kPairBits)
        return bad_argument("coding pair needs a sigma grid with num_bits 4", index);
    if (q.table == kNoTable) return {};
    const StaticCode* code = find_static_code(q.table);
    const bool fits = code != nullptr && code->coding == q.coding && code->num_bits == q.num_bits;
    return fits ? Status{} : bad_argument("no static table of this number fits the coding and num_bits", index);
}

Status check_segment(const Segment& segment, const std::vector<Tensor>& tensors, std::int64_t index) {
    if (segment.tensor < 0 || segment.tensor >= static_cast<std::int32_t>(tensors.size()))
        return bad_argument("a segment's tensor does not exist", index);
    const std::int64_t count = tensors[static_cast<std::size_t>(segment.tensor)].count;
    if (segment.offset < 0 || segment.count < 0 || segment.offset > count || segment.count > count - segment.offset)
        return bad_argument("a segment lies outside its tensor", index);
    return {};
}

class BlobWriter {
public:
    explicit BlobWriter(std::vector<std::uint8_t>* blob) : blob_(blob) {}
    template <class T>
    std::int64_t put(const std::vector<T>& items) {
        const std::size_t at = blob_->size();
        blob_->resize(static_cast<std::size_t>(align16(static_cast<std::int64_t>(at + sizeof(T) * items.size()))));
        if (!items.empty()) std::memcpy(blob_->data() + at, items.data(), sizeof(T) * items.size());
        return static_cast<std::int64_t>(at);
    }

private:
    std::vector<std::uint8_t>* blob_;
};

template <class T>
T* at(const void* base, std::int64_t offset) {
    return reinterpret_cast<T*>(static_cast<std::uint8_t*>(const_cast<void*>(base)) + offset);
}

}  // namespace

void fill_static_tables(StaticTables* tables) {
    std::memset(tables, 0, sizeof(*tables));
    for (int id = 1; id < kNoTable; ++id) {
        const int index = StaticTables::index(id);
        if (index < 0) continue;
        const StaticCode& code = *find_static_code(static_cast<std::uint8_t>(id));
        std::copy(code.encode.entries.begin(), code.encode.entries.end(), tables->encode[index]);
        std::copy_n(code.decode.entries.begin(), code.decode.mask + 1, tables->decode[index]);
        tables->decode_mask[index] = code.decode.mask;
        tables->num_bits[index] = static_cast<std::uint8_t>(code.num_bits);
    }
}

// Where things are in the workspace.
enum EncodePlan::Place : int {
    kStatistics,
    kQuantizers,
    kTiles,
    kBlocks,
    kEnds,
    kPieces,
    kSegments,
    kPackets,
    kCounters,
    kSlots
};

EncodePlan::EncodePlan(DType dtype, int steps, bool checksums, const std::vector<Tensor>& tensors,
                       const std::vector<Segment>& segments, const std::vector<Packet>& packets)
    : dtype_(dtype),
      steps_(steps),
      checksums_(checksums),
      tensor_count_(static_cast<std::int32_t>(tensors.size())),
      segment_count_(static_cast<std::int32_t>(segments.size())),
      packet_count_(static_cast<std::int32_t>(packets.size())) {
    status_ = build(tensors, segments, packets);
}

Status EncodePlan::build(const std::vector<Tensor>& tensors, const std::vector<Segment>& segments,
                         const std::vector<Packet>& packets) {
    if (steps_ < 1 || steps_ > kMaxSteps) return bad_argument("steps must be 1..512", steps_);
    if (packets.empty()) return bad_argument("there must be at least one packet");
    const std::int64_t item = item_bytes(dtype_);

    std::vector<TensorTask> tensor_tasks;
    for (const Tensor& t : tensors) {
        QCOMM_RETURN_IF_ERROR(check_tensor(t, dtype_, static_cast<std::int64_t>(tensor_tasks.size())));
        tensor_tasks.push_back(
            {t.values, t.residual, t.inv_scale, t.count, tiles_, t.k, t.quantizer, t.nonfinite_is_constant});
        tiles_ += statistics_tiles(t.count);
        adjusted_ |= t.residual != nullptr || t.inv_scale != nullptr;
    }

    std::vector<SegmentTask> segment_tasks;
    std::vector<PacketTask> packet_tasks;
    std::vector<std::int64_t> dims;
    std::int64_t slots = 0;
    for (const Packet& packet : packets) {
        const auto number = static_cast<std::int64_t>(packet_tasks.size());
        if (packet.segments < 1) return bad_argument("a packet needs at least one segment", number);
        if (packet.dims.size() > kMaxDims) return bad_argument("a tensor has at most 64 dimensions", number);
        PacketTask task{packet.out,
                        packet.capacity,
                        static_cast<std::int64_t>(dims.size()),
                        static_cast<std::int32_t>(packet.dims.size()),
                        static_cast<std::int32_t>(segment_tasks.size()),
                        packet.segments,
                        blocks_,
                        0,
                        units_,
                        0};
        dims.insert(dims.end(), packet.dims.begin(), packet.dims.end());
        std::int64_t bound =
            static_cast<std::int64_t>(sizeof(PacketHeader) + 8 * packet.dims.size() +
                                      sizeof(SegmentRecord) * static_cast<std::size_t>(packet.segments));
        for (int i = 0; i < packet.segments; ++i) {
            const std::size_t s = segment_tasks.size();
            if (s == segments.size()) return bad_argument("the packets have more segments than there are", number);
            const Segment& segment = segments[s];
            QCOMM_RETURN_IF_ERROR(check_segment(segment, tensors, static_cast<std::int64_t>(s)));
            const Quantizer& q = tensors[static_cast<std::size_t>(segment.tensor)].quantizer;
            const SegmentRecord record{
                static_cast<std::uint64_t>(segment.count), q.grid, q.num_bits, q.coding, q.table, 0, 0.0, 0.0};
            const std::int64_t blocks = blocks_in(record, steps_);
            const std::int64_t bytes = align4(segment.count * item);
            const std::int64_t units = std::max(blocks, ceil_div(bytes, kChecksumPiece));
            segment_tasks.push_back({segment.tensor, static_cast<std::int32_t>(number), segment.offset, segment.count,
                                     segment.residual_out, encode_tiles_, units_, units, blocks_, blocks, slots});
            encode_tiles_ += ceil_div(blocks, kEncodeWarps);
            units_ += units;
            blocks_ += blocks;
            slots += blocks * SlotShape(steps_, q.coding == Coding::kPair, static_cast<int>(item)).bytes;
            bound += bytes + 16 * blocks + 4;  // every block may be raw, with its info, end, checksum and padding
        }
        task.blocks = blocks_ - task.first_block;
        task.units = units_ - task.first_unit;
        // Thread blocks do not straddle packets, and each packet has one to complete it.
        units_ = task.first_unit + kEncodeWarps * std::max<std::int64_t>(1, ceil_div(task.units, kEncodeWarps));
        packet_tasks.push_back(task);
        if (bound >= kMaxPayloadBytes) return bad_argument("a packet holds at most 16 GiB; split the tensor", number);
        bounds_.push_back(bound);
    }
    if (segment_tasks.size() != segments.size()) return bad_argument("there are segments that no packet holds");
    if (std::max({tiles_, encode_tiles_, units_ / kEncodeWarps}) > kMaxLaunch)
        return bad_argument("too many values for one launch");

    BlobWriter writer(&blob_);
    writer.put(tensor_tasks);
    segments_at_ = writer.put(segment_tasks);
    packets_at_ = writer.put(packet_tasks);
    dims_at_ = writer.put(dims);

    const auto reserve = [&](Place place, std::int64_t bytes) {
        workspace_at_[place] = workspace_bytes_;
        workspace_bytes_ += align16(bytes);
    };
    reserve(kStatistics, static_cast<std::int64_t>(sizeof(Statistics)) * tensor_count_);
    reserve(kQuantizers, static_cast<std::int64_t>(sizeof(Quantizer)) * tensor_count_);
    reserve(kTiles, static_cast<std::int64_t>(sizeof(TileStatistics)) * tiles_);
    reserve(kBlocks, static_cast<std::int64_t>(sizeof(BlockResult)) * blocks_);
    reserve(kEnds, 4 * blocks_);
    reserve(kPieces, 4 * units_);
    reserve(kSegments, static_cast<std::int64_t>(sizeof(SegmentState)) * segment_count_);
    reserve(kPackets, static_cast<std::int64_t>(sizeof(PacketState)) * packet_count_);
    reserve(kCounters, 4 * (std::int64_t{tensor_count_} + packet_count_));
    reserve(kSlots, slots);
    return {};
}

EncodeTables EncodePlan::tables(const void* blob, const StaticTables* codes, void* workspace) const {
    return {at<const TensorTask>(blob, 0),
            at<const SegmentTask>(blob, segments_at_),
            at<const PacketTask>(blob, packets_at_),
            at<const std::int64_t>(blob, dims_at_),
            codes,
            tensor_count_,
            segment_count_,
            packet_count_,
            dtype_,
            steps_,
            checksums_,
            statistics(workspace),
            quantizers(workspace),
            at<BlockResult>(workspace, workspace_at_[kBlocks]),
            at<std::uint32_t>(workspace, workspace_at_[kEnds]),
            at<std::uint32_t>(workspace, workspace_at_[kPieces]),
            at<SegmentState>(workspace, workspace_at_[kSegments]),
            at<PacketState>(workspace, workspace_at_[kPackets]),
            at<unsigned>(workspace, workspace_at_[kCounters]),
            at<std::uint8_t>(workspace, workspace_at_[kSlots])};
}

Statistics* EncodePlan::statistics(void* workspace) const {
    return at<Statistics>(workspace, workspace_at_[kStatistics]);
}
Quantizer* EncodePlan::quantizers(void* workspace) const {
    return at<Quantizer>(workspace, workspace_at_[kQuantizers]);
}

Status EncodePlan::measure(const void* blob, void* workspace, void* stream) const {
    QCOMM_RETURN_IF_ERROR(status_);
    const EncodeTables e = tables(blob, nullptr, workspace);
    launch_clear(e.counters, tensor_count_, stream);
    launch_measure(e, adjusted_, at<TileStatistics>(workspace, workspace_at_[kTiles]), tiles_, stream);
    return launch_status();
}

Status EncodePlan::encode(const void* blob, const StaticTables* codes, void* workspace, std::int64_t* total_bytes,
                          void* stream) const {
    QCOMM_RETURN_IF_ERROR(status_);
    const EncodeTables e = tables(blob, codes, workspace);
    launch_clear(e.counters + tensor_count_, packet_count_, stream);
    launch_encode_blocks(e, adjusted_, encode_tiles_, stream);
    launch_layout(e, total_bytes, stream);
    launch_payload(e, adjusted_, units_ / kEncodeWarps, stream);
    return launch_status();
}

}  // namespace qcomm::cuda
