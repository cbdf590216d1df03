// The host's side of encoding: checks the request, lays out the blob (tasks, as the kernels read them) and the
// workspace, and enqueues the kernels.
//
//   constructor   tensors -> TensorTask; packets -> PacketTask and their segments -> SegmentTask; running totals
//   measure()     statistics.cu, sample.cu
//   encode()      histogram.cu and code_lengths.cu, zero_runs_place.cu, encode.cu, zero_runs_encode.cu, layout.cu,
//                 zero_runs_payload.cu, payload.cu, residual.cu
//
//   blob        | tensors | segments | packets | dimensions | segments that may have a code of their own |
//   workspace   place() lists its arrays
//
// A kernel has one grid of thread blocks for all tensors, segments or packets. Each of these notes the number of its
// first block in that grid ("tile"), and the totals are the grids. A tile covers, by kernel, 32768 values of a tensor
// (statistics), 4 blocks of a segment (encode), 4 units of a packet (payload), a unit being a block or a piece of 64
// KiB.
//
// The host never learns which quantizer a tensor has got, so totals are upper bounds over all that it may get: blocks
// by the code with the most of them, slots by the code with the largest, alphabets by the most bits.
#include <algorithm>
#include <cstring>
#include <iterator>

#include "encode_request.h"
#include "kernels.cuh"
#include "qcomm/huffman.h"
#include "workspace.h"
#include "zero_runs.cuh"

namespace qcomm::cuda {
namespace {

constexpr std::int64_t kMaxPayloadBytes = std::int64_t{4} << 32;  // block ends count 4-byte units in 32 bits
constexpr std::int64_t kMaxLaunch = 0x7FFFFFFF;                   // thread blocks

// Appends arrays to a blob, each aligned to 16 bytes. put() returns where one begins.
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

// Returns the array at an offset of the blob's copy on the device.
template <class T>
const T* at(const void* blob, std::int64_t offset) {
    return reinterpret_cast<const T*>(static_cast<const std::uint8_t*>(blob) + offset);
}

}  // namespace

// Codes and ids are matched by StaticTables::index() alone, as on the device.
void fill_static_tables(StaticTables* tables) {
    std::memset(tables, 0, sizeof(*tables));
    for (int id = 1; id < kNoTable; ++id) {
        const int index = StaticTables::index(id);
        if (index < 0) continue;
        const StaticCode& code = *find_static_code(static_cast<std::uint8_t>(id));
        std::copy(code.encode.entries.begin(), code.encode.entries.end(), tables->encode[index]);
        // The entry that a gather reads behind a table stays out: kernels do not gather, and behind 12 bits it has no
        // room.
        std::copy_n(code.decode.entries.begin(), code.decode.mask + 1, tables->decode[index]);
        tables->decode_mask[index] = code.decode.mask;
        tables->num_bits[index] = static_cast<std::uint8_t>(code.num_bits);
    }
    std::copy(std::begin(kRunTableBounds), std::end(kRunTableBounds), tables->run_bounds);
    for (int t = 0; t < kRunTableCount; ++t) {
        const RunCode& code = run_code(t);
        std::copy(std::begin(code.entries), std::end(code.entries), tables->run_decode[t]);
        for (int s = 0; s < kRunTokens; ++s) {
            const RunClass runs = s == kSkipToken ? RunClass{} : run_class(s / kTokenLevels);
            // A token of its class's shortest run: its extra bits, above the codeword, are 0.
            const std::uint32_t token = s == kSkipToken ? code.skip : code.tokens[8 * runs.shortest + s % kTokenLevels];
            const std::uint32_t length = token >> 16, codeword_length = length - static_cast<std::uint32_t>(runs.extra);
            tables->run_encode[t][s] = (token & 0xFFFFu) | codeword_length << 16 | length << 24;
        }
    }
}

// The lists of which the blob is made, as they grow.
struct EncodePlan::Tasks {
    std::vector<TensorTask> tensors;
    std::vector<SegmentTask> segments;
    std::vector<PacketTask> packets;
    std::vector<std::int64_t> dims;
    std::vector<std::int32_t> own_segments;
};

// The arguments with which measure() and encode() launch kernels.
struct EncodePlan::Arrays {
    EncodeTables tables{};
    TileStatistics* tiles = nullptr;
};

// A plan that status() calls bad has no workspace and launches nothing.
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
    Tasks tasks;
    for (const Tensor& tensor : tensors) QCOMM_RETURN_IF_ERROR(add_tensor(tensor, &tasks));
    for (const Packet& packet : packets) QCOMM_RETURN_IF_ERROR(add_packet(packet, tensors, segments, &tasks));
    // Checked last, since add_packet() takes the segments one after another.
    if (tasks.segments.size() != segments.size()) return bad_argument("there are segments that no packet holds");
    // A grid of blocks has one dimension of 2^31.
    if (std::max({tiles_, sample_tiles_, histogram_tiles_, encode_tiles_, kEncodeWarps * run_tiles_,
                  units_ / kEncodeWarps}) > kMaxLaunch)
        return bad_argument("too many values for one launch");
    write_blob(tasks);
    Workspace measured;
    Arrays nowhere;
    // At address 0, so that the last place is the size.
    place(&measured, &nowhere);
    workspace_bytes_ = measured.bytes();
    return {};
}

// The first check that fails is told, with the tensor's number.
Status EncodePlan::add_tensor(const Tensor& t, Tasks* tasks) {
    QCOMM_RETURN_IF_ERROR(check_tensor(t, dtype_, static_cast<std::int64_t>(tasks->tensors.size())));
    TensorTask task{};
    task.values = t.values;
    task.residual = t.residual;
    task.inv_scale = t.inv_scale;
    task.count = t.count;
    task.first_tile = tiles_;
    task.k = t.k;
    task.wanted = make_wanted(t);
    task.nonfinite_is_constant = t.nonfinite_is_constant;
    task.as_it_is = t.as_it_is;
    task.zero_keeps_residual = t.zero_keeps_residual;
    task.first_sample_tile = sample_tiles_;
    task.sample = make_sample(t, bins_);
    tasks->tensors.push_back(task);

    // The next tensor's tiles and bins begin behind this one's.
    const std::int64_t per_sample = t.quantizer.grid == Grid::kSigma ? 2 : 1;  // values: pairs on a sigma grid
    tiles_ += statistics_tiles(measured_count(task));
    bins_ += task.sample.bins;
    sample_tiles_ += ceil_div(per_sample * task.sample.count, kSampleTile);
    // encode_blocks copies a code to shared memory, whose size is one for the whole launch.
    const bool has_code = is_block_coded(t.quantizer.coding) && t.quantizer.table != kNoTable;
    if (has_code || may_own_code(t) || t.sample.choose_code)
        max_symbols_ = std::max(max_symbols_, may_own_code(t) ? own_alphabet(t) : kMaxStaticSymbols);
    adjusted_ |= t.residual != nullptr || t.inv_scale != nullptr;
    return {};
}

Status EncodePlan::add_packet(const Packet& packet, const std::vector<Tensor>& tensors,
                              const std::vector<Segment>& segments, Tasks* tasks) {
    const auto number = static_cast<std::int64_t>(tasks->packets.size());
    if (packet.segments < 1) return bad_argument("a packet needs at least one segment", number);
    if (packet.dims.size() > kMaxDims) return bad_argument("a tensor has at most 64 dimensions", number);
    PacketTask task{};
    task.out = packet.out;
    task.capacity = packet.capacity;
    task.first_dim = static_cast<std::int64_t>(tasks->dims.size());
    task.ndim = static_cast<std::int32_t>(packet.dims.size());
    task.first_segment = static_cast<std::int32_t>(tasks->segments.size());
    task.segments = packet.segments;
    task.first_block = blocks_;
    task.first_unit = units_;
    tasks->dims.insert(tasks->dims.end(), packet.dims.begin(), packet.dims.end());

    auto bound = static_cast<std::int64_t>(sizeof(PacketHeader) + 8 * packet.dims.size()) +
                 record_bytes(dtype_) * packet.segments;
    std::int64_t run_values = 0;
    for (int i = 0; i < packet.segments; ++i) {
        const std::size_t s = tasks->segments.size();
        if (s == segments.size()) return bad_argument("the packets have more segments than there are", number);
        QCOMM_RETURN_IF_ERROR(check_segment(segments[s], tensors, static_cast<std::int64_t>(s)));
        const Tensor& tensor = tensors[static_cast<std::size_t>(segments[s].tensor)];
        if (tensor.quantizer.coding == Coding::kRuns) run_values += segments[s].count;
        bound += add_segment(segments[s], tensor, tasks);
    }
    bound += add_run_blocks(run_values, &task);
    task.blocks = blocks_ - task.first_block;
    task.units = units_ - task.first_unit;
    // Thread blocks do not straddle packets, and each packet has one to complete it.
    units_ = task.first_unit + kEncodeWarps * std::max<std::int64_t>(1, ceil_div(task.units, kEncodeWarps));
    // Where the bound fits, nothing will be dropped, and residuals of sigma grids are written as blocks are coded.
    task.may_drop = packet.capacity < bound;
    tasks->packets.push_back(task);
    if (bound >= kMaxPayloadBytes) return bad_argument("a packet holds at most 16 GiB; split the tensor", number);
    bounds_.push_back(bound);
    return {};
}

// Returns the most bytes that the segment adds to its packet, beyond its record.
std::int64_t EncodePlan::add_segment(const Segment& segment, const Tensor& tensor, Tasks* tasks) {
    const std::int64_t item = item_bytes(dtype_);
    const BlockSpace space = block_space(tensor, segment.count, steps_, item);
    const std::int64_t bytes = align4(segment.count * item);
    SegmentTask task{};
    task.tensor = segment.tensor;
    task.packet = static_cast<std::int32_t>(tasks->packets.size());
    task.offset = segment.offset;
    task.count = segment.count;
    task.residual_out = segment.residual_out;
    task.first_tile = encode_tiles_;
    task.first_unit = units_;
    // The segment may turn out raw or coded: units are enough for its blocks and for its pieces.
    task.units = std::max(space.blocks, ceil_div(bytes, kChecksumPiece));
    task.first_block = blocks_;
    task.blocks = space.blocks;
    task.slots = slot_bytes_;
    task.first_histogram_tile = histogram_tiles_;
    task.first_codeword = codewords_;
    const auto number = static_cast<std::int32_t>(tasks->segments.size());
    tasks->segments.push_back(task);

    encode_tiles_ += ceil_div(task.blocks, kEncodeWarps);
    units_ += task.units;
    blocks_ += task.blocks;
    slot_bytes_ += space.slots;
    range_residuals_ |= is_range(tensor.quantizer.grid) && segment.residual_out != nullptr;
    // Every block may be raw, with its info, end, checksum and padding.
    const std::int64_t bound = bytes + 16 * task.blocks + 4;
    if (!may_own_code(tensor)) return bound;
    tasks->own_segments.push_back(number);
    histogram_tiles_ += ceil_div(segment.count, kHistogramTile);
    codewords_ += own_alphabet(tensor);
    return bound + own_alphabet(tensor);  // its list: three nibbles for two symbols at most
}

// Makes room for the run blocks of a packet. Returns the most bytes that they add to it beyond their raw values.
std::int64_t EncodePlan::add_run_blocks(std::int64_t values, PacketTask* task) {
    task->run_blocks = run_blocks(values, steps_);
    task->run_slots = slot_bytes_;
    task->first_run_tile = run_tiles_;
    run_tiles_ += ceil_div(task->run_blocks, kEncodeWarps);
    blocks_ += task->run_blocks;
    slot_bytes_ += task->run_blocks * RunSlotShape(steps_).bytes;
    // With its info, end, checksum and padding. A fixed one has fewer bits a value than a raw one.
    return 16 * task->run_blocks;
}

// Tensors come first, at offset 0.
void EncodePlan::write_blob(const Tasks& tasks) {
    BlobWriter writer(&blob_);
    writer.put(tasks.tensors);
    segments_at_ = writer.put(tasks.segments);
    packets_at_ = writer.put(tasks.packets);
    dims_at_ = writer.put(tasks.dims);
    own_segments_at_ = writer.put(tasks.own_segments);
    own_count_ = static_cast<std::int32_t>(tasks.own_segments.size());
}

// The order is free, since kernels get pointers. The counts must be those that the constructor found, as each call
// places the arrays again.
void EncodePlan::place(Workspace* workspace, Arrays* arrays) const {
    EncodeTables& e = arrays->tables;
    workspace->put(e.statistics, tensor_count_);
    workspace->put(e.quantizers, tensor_count_);
    workspace->put(arrays->tiles, tiles_);
    workspace->put(e.blocks, blocks_);
    workspace->put(e.ends, blocks_);
    workspace->put(e.piece_sums, units_);
    workspace->put(e.segment_states, segment_count_);
    workspace->put(e.packet_states, packet_count_);
    workspace->put(e.run_places, run_tiles_ > 0 ? segment_count_ : 0);
    workspace->put(e.run_totals, run_tiles_ > 0 ? packet_count_ : 0);
    workspace->put(e.dropped, packet_count_);
    workspace->put(e.wanted_bytes, packet_count_);
    workspace->put(e.absent, tensor_count_);
    workspace->put(e.counters, std::int64_t{2} * tensor_count_ + packet_count_);
    workspace->put(e.slots, slot_bytes_);
    workspace->put(e.list_bytes, segment_count_);
    // Segments that may have codes of their own share these, each from its first_codeword on.
    workspace->put(e.counts, codewords_);
    workspace->put(e.packages, codewords_);
    workspace->put(e.own_entries, codewords_);
    workspace->put(e.lists, codewords_);
    workspace->put(e.sample_counts, bins_);
}

EncodePlan::Arrays EncodePlan::placed(void* base) const {
    Workspace workspace(base);
    Arrays arrays;
    place(&workspace, &arrays);
    return arrays;
}

// The arguments of the kernels: arrays of the blob and of the workspace, and the plan's numbers.
EncodePlan::Arrays EncodePlan::arrays(const void* blob, const StaticTables* codes, void* workspace) const {
    Arrays arrays = placed(workspace);
    EncodeTables& e = arrays.tables;
    e.tensors = at<TensorTask>(blob, 0);
    e.segments = at<SegmentTask>(blob, segments_at_);
    e.packets = at<PacketTask>(blob, packets_at_);
    e.dims = at<std::int64_t>(blob, dims_at_);
    e.own_segments = at<std::int32_t>(blob, own_segments_at_);
    e.codes = codes;
    e.tensor_count = tensor_count_;
    e.segment_count = segment_count_;
    e.packet_count = packet_count_;
    e.own_count = own_count_;
    e.dtype = dtype_;
    e.steps = steps_;
    e.checksums = checksums_;
    return arrays;
}

Statistics* EncodePlan::statistics(void* workspace) const { return placed(workspace).tables.statistics; }
Quantizer* EncodePlan::quantizers(void* workspace) const { return placed(workspace).tables.quantizers; }
std::int64_t* EncodePlan::dropped_values(void* workspace) const { return placed(workspace).tables.dropped; }
std::uint8_t* EncodePlan::absent(void* workspace) const { return placed(workspace).tables.absent; }

// Counters are zeroed by each call, since the kernels before may have left them anywhere: two for each tensor here, one
// for each packet by layout_packets.
Status EncodePlan::measure(const void* blob, const StaticTables* codes, void* workspace, void* stream) const {
    QCOMM_RETURN_IF_ERROR(status_);
    const Arrays a = arrays(blob, codes, workspace);
    const EncodeTables& e = a.tables;
    launch_clear(e.counters, 8 * std::int64_t{tensor_count_}, stream);
    launch_measure(e, adjusted_, a.tiles, tiles_, stream);
    if (sample_tiles_ > 0) {
        launch_clear(e.sample_counts, 8 * bins_, stream);
        launch_sample(e, adjusted_, sample_tiles_, stream);
    }
    return launch_status();
}

// The launches follow each other on the stream, and each reads the results of those before. Those that a plan can never
// need are left out; a launch whose segments turn out not to need it costs blocks that return.
Status EncodePlan::encode(const void* blob, const StaticTables* codes, void* workspace, std::int64_t* total_bytes,
                          void* stream) const {
    QCOMM_RETURN_IF_ERROR(status_);
    const EncodeTables e = arrays(blob, codes, workspace).tables;
    if (own_count_ > 0) {
        launch_clear(e.counts, 8 * codewords_, stream);
        launch_histogram(e, adjusted_, histogram_tiles_, stream);
        launch_code_lengths(e, stream);
    }
    if (run_tiles_ > 0) {
        launch_place_runs(e, stream);
        launch_encode_run_blocks(e, run_tiles_, stream);
    }
    launch_encode_blocks(e, adjusted_, encode_tiles_, max_symbols_, stream);
    launch_layout(e, total_bytes, stream);
    if (run_tiles_ > 0) launch_write_run_blocks(e, run_tiles_, stream);
    launch_payload(e, adjusted_, units_ / kEncodeWarps, stream);
    if (range_residuals_) launch_range_residuals(e, adjusted_, units_ / kEncodeWarps, stream);
    return launch_status();
}

Status EncodePlan::count(const void* blob, void* workspace, const std::int64_t* total_bytes, Account* account,
                         void* stream) const {
    QCOMM_RETURN_IF_ERROR(status_);
    // It reads results only, no codes.
    launch_count(arrays(blob, nullptr, workspace).tables, total_bytes, account, stream);
    return launch_status();
}

}  // namespace qcomm::cuda
