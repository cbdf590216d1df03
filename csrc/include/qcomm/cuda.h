// Encoding and decoding on a CUDA device: the operations of packet.h and statistics.h on device memory, with the same
// bytes. Nothing here allocates or waits: the caller owns all memory, and every call enqueues kernels on `stream`, a
// cudaStream_t of the current device. Pointers are to device memory unless they say otherwise.
//
// A plan is made once, on the host, for tensors whose addresses do not change, and run in every step. The work of a
// step is then a handful of launches whatever the number of tensors, and it can be captured in a CUDA graph. The caller
//
//   1. makes a plan, and asks status(): the constructor checks everything and launches nothing;
//   2. copies blob() to device memory, and allocates workspace_bytes() there, both aligned to 16;
//   3. passes both to every call. One workspace serves one call at a time, so two streams need two.
//
// After a launch error (kDeviceError) the contents of outputs, residuals and workspace are unspecified.
#pragma once

#include <cstdint>
#include <vector>

#include "qcomm/format.h"
#include "qcomm/quantize.h"
#include "qcomm/statistics.h"
#include "qcomm/status.h"
#include "qcomm/zero_runs.h"

namespace qcomm::cuda {

struct DecodeTables;
struct PacketTask;
class Workspace;

// The static codes as tables, 395 KiB. A caller fills one in host memory, once, and keeps a copy on each device.
struct StaticTables {
    static constexpr int kCodes = 32;  // ids 1..22 are codes 0..21, ids 64..73 are 22..31
    static constexpr int kSingleCodes = 22;
    static constexpr int kMaxEntries = 4096;  // codewords of at most 12 bits

    std::uint32_t encode[kCodes][256];          // codeword | length << 16
    std::uint16_t decode[kCodes][kMaxEntries];  // symbol | length << 12
    std::uint32_t decode_mask[kCodes];
    std::uint8_t num_bits[kCodes];  // of a symbol; the first kSingleCodes are for single symbols, the others for pairs

    // Of zero runs: codeword | its length << 16 | that with extra bits << 24 for each token, and RunCode::entries.
    std::uint32_t run_encode[kRunTableCount][kRunTokens];
    std::uint32_t run_decode[kRunTableCount][1 << kMaxRunCodeLength];
    std::uint32_t run_bounds[kRunTableCount - 1];  // kRunTableBounds

    // Returns the number of a table's code, or -1 when there is no such table. It is arithmetic, so that a kernel need
    // not search.
    QCOMM_HOST_DEVICE static constexpr int index(int id) {
        return id >= 1 && id <= kSingleCodes ? id - 1 : id >= 64 && id <= 73 ? id - 42 : -1;
    }
    // Returns the alphabet that check() of qcomm/quantize.h asks for, on a device.
    QCOMM_HOST_DEVICE StaticAlphabet alphabet(int id) const {
        const int i = index(id);
        if (i < 0) return {};
        return {i < kSingleCodes ? Coding::kSingle : Coding::kPair, num_bits[i]};
    }
};
// Fills tables in host memory.
void fill_static_tables(StaticTables* tables);

// The choices that a sample of a tensor's values decides on the device, as plan() of qcomm/codec/quantize.py does on
// the host.
struct SampleRule {
    // Range grid with num_bits 0: N = min(ceil(H + c), floor(c + entropy_bits), max_bits), at least 1, H being the
    // entropy in bits of 2^entropy_bits bins of a part `fraction` of the values.
    double c = 6.0;
    int entropy_bits = 4;
    double fraction = 0.03;
    int max_bits = 16;
    std::uint32_t seed = 0;
    // Sigma grid: the cheapest code, instead of the quantizer's coding and table.
    bool choose_code = false;
};

// u = values * inv_scale + residual, as in values.h; measured as a whole. The scale is read from device memory when the
// kernels run, since a loss scaler changes it there and the host does not know it.
struct Tensor {
    const void* values = nullptr;       // of the packets' dtype, aligned to it
    const float* residual = nullptr;    // or null; needs float32 or float64 values, like inv_scale
    const double* inv_scale = nullptr;  // one number; or null for 1
    std::int64_t count = 0;
    // Grid, num_bits, coding and table are the caller's; p0 and p1 are measured: on a sigma grid the step is k times
    // the RMS, range grids get lo and hi. Range grids are single with table 0 up to 12 bits, fixed otherwise, and
    // num_bits is 0 where the sample decides. Coding runs needs a residual_out in all of the tensor's segments.
    Quantizer quantizer;
    double k = 1.0;
    SampleRule sample;
    bool nonfinite_is_constant = false;  // a tensor with a non-finite value becomes a constant NaN instead of raw
    bool as_it_is = false;               // not measured: raw whatever the values are
    // Where all values are 0, the residual notwithstanding, the tensor is a constant 0 and the residual stays as it is.
    bool zero_keeps_residual = false;
};

// Values [offset, offset + count) of tensor number `tensor`. Segments of one tensor share its grid, in whichever
// packets they are.
struct Segment {
    std::int32_t tensor = 0;
    std::int64_t offset = 0, count = 0;
    float* residual_out = nullptr;  // `count` numbers, or null; may be the tensor's residual at `offset`
};

// The next `segments` of the plan's segments, in order. `dims` multiply to the sum of their counts.
struct Packet {
    std::int32_t segments = 1;
    std::vector<std::int64_t> dims;
    std::uint8_t* out = nullptr;  // `capacity` bytes, aligned to 4
    std::int64_t capacity = 0;
};

// Sums over encodings, kept on the device and zeroed by the caller: they are read seldom, so that steps need not wait
// for numbers.
// All fields are 64-bit: Python reads them as an int64 tensor, in the order of ACCOUNT in qcomm/codec/plans_cuda.py.
struct Account {
    std::int64_t packet_bytes = 0;
    std::int64_t largest_packet = 0;  // the most bytes that a packet needed to hold all its values
    std::int64_t dropped_values = 0;
    std::int64_t unsent_packets = 0;  // their capacity did not suffice, although blocks were dropped
    std::int64_t nonfinite_tensors = 0;
};

// An encoding that is run again and again: the tensors of a bucket, cut into segments, gathered in packets. blob()
// holds the pointers above, so they stay valid as long as the plan is used.
class EncodePlan {
public:
    // Checks everything; status() tells. `steps` and `checksums` are those of EncodeOptions.
    EncodePlan(DType dtype, int steps, bool checksums, const std::vector<Tensor>& tensors,
               const std::vector<Segment>& segments, const std::vector<Packet>& packets);

    const Status& status() const { return status_; }
    // The tasks as the kernels read them, in host memory; a copy of it on the device is needed.
    const std::vector<std::uint8_t>& blob() const { return blob_; }
    std::int64_t workspace_bytes() const { return workspace_bytes_; }
    // Returns the capacity that suffices for a packet whatever the values are.
    std::int64_t bound(int packet) const { return bounds_[static_cast<std::size_t>(packet)]; }

    // Puts statistics and quantizers of the tensors into the workspace. A plan may have no packets, if it has no
    // segments.
    Status measure(const void* blob, const StaticTables* codes, void* workspace, void* stream) const;
    // Writes the packets, with the quantizers that measure() has found in the same workspace. total_bytes[packet]
    // receives each size. Where a capacity is below bound() and too small, blocks of sigma segments with a residual are
    // replaced by zeros, from the packet's end on, and the residual keeps their values; if that does not suffice,
    // total_bytes is minus the least size, nothing of the packet is written, and the residuals keep all of u.
    Status encode(const void* blob, const StaticTables* codes, void* workspace, std::int64_t* total_bytes,
                  void* stream) const;
    // Adds the results of the last encode() to `account`, one in device memory.
    Status count(const void* blob, void* workspace, const std::int64_t* total_bytes, Account* account,
                 void* stream) const;

    // Return where measure() leaves its results in a workspace: [tensors].
    Statistics* statistics(void* workspace) const;
    Quantizer* quantizers(void* workspace) const;
    // Returns where encode() leaves how many values were replaced by zeros: [packets].
    std::int64_t* dropped_values(void* workspace) const;
    // Returns where measure() leaves whether the residual takes no part, because all values are 0: [tensors].
    std::uint8_t* absent(void* workspace) const;

private:
    struct Tasks;
    struct Arrays;
    Status build(const std::vector<Tensor>& tensors, const std::vector<Segment>& segments,
                 const std::vector<Packet>& packets);
    // Each checks one, appends its task, and counts the blocks, tiles and memory that it needs.
    Status add_tensor(const Tensor& tensor, Tasks* tasks);
    Status add_packet(const Packet& packet, const std::vector<Tensor>& tensors, const std::vector<Segment>& segments,
                      Tasks* tasks);
    std::int64_t add_segment(const Segment& segment, const Tensor& tensor, Tasks* tasks);
    std::int64_t add_run_blocks(std::int64_t values, PacketTask* task);
    void write_blob(const Tasks& tasks);
    // Puts each array of the workspace in its place: the one list of them.
    void place(Workspace* workspace, Arrays* arrays) const;
    Arrays placed(void* workspace) const;
    Arrays arrays(const void* blob, const StaticTables* codes, void* workspace) const;

    Status status_;
    DType dtype_;
    int steps_;
    bool checksums_, adjusted_ = false, range_residuals_ = false;
    std::int32_t tensor_count_, segment_count_, packet_count_, own_count_ = 0;
    int max_symbols_ = 1;  // of a code that encode_blocks needs
    std::int64_t tiles_ = 0, sample_tiles_ = 0, bins_ = 0;
    std::int64_t run_tiles_ = 0, encode_tiles_ = 0, histogram_tiles_ = 0, codewords_ = 0, units_ = 0, blocks_ = 0,
                 slot_bytes_ = 0;
    std::int64_t segments_at_ = 0, packets_at_ = 0, dims_at_ = 0, own_segments_at_ = 0;  // byte offsets in the blob
    std::int64_t workspace_bytes_ = 0;
    std::vector<std::uint8_t> blob_;
    std::vector<std::int64_t> bounds_;
};

// The status word of a packet. Threads that find something wrong take the maximum, so where several things are wrong
// the word does not depend on their order.
// FAULTS in qcomm/codec/_native_cuda.py has a text for each number. A fault that explains others is larger than they
// are: bytes that are no packet have bad records and blocks, too.
enum class Fault : unsigned {
    kNone,
    kPiece,     // the checksum of a raw or fixed segment
    kBlock,     // a block's contents; its checksum
    kLayout,    // block ends, or a payload that segments do not fill
    kRecords,   // segment records, dimensions, code lengths; a code of its own, or zero runs, not expected
    kMismatch,  // another dtype, shape, number of steps or segments than expected
    kHeader,    // no packet, an unknown version, truncated, a wrong header checksum
};

// One packet to decode. Its real size is in its header; with `exact` it must be `bytes`.
struct DecodeTask {
    const std::uint8_t* packet = nullptr;  // aligned to 4
    std::int64_t bytes = 0;                // how much may be read
    void* out = nullptr;                   // `elements` values of the dtype; see the operations
    std::int64_t elements = 0;
    bool exact = false;
};

// Packets that are decoded together. The launches are sized for their expected shape before anything is read. The bytes
// are checked on the device, and not trusted: no read leaves [packet, packet + bytes), no write leaves `out`, and no
// packet makes a kernel run longer than its size allows.
class DecodePlan {
public:
    // All packets have `steps` and at most max_segments segments. own_code_bits is the maximum number of bits of a
    // symbol in a segment that has a code of its own, 4 with pairs. The workspace has room for one code for each
    // segment, from 8.5 KiB up to 8 bits to 68 KiB with 12. With 0 no code lengths are expected, and packets with some
    // are refused.
    // Segments of coding runs are refused, too, unless `takes_runs`.
    DecodePlan(DType dtype, int steps, int max_segments, const std::vector<DecodeTask>& tasks, int own_code_bits = 0,
               bool takes_runs = false);

    const Status& status() const { return status_; }
    // The tasks as the kernels read them, in host memory; a copy of it on the device is needed.
    const std::vector<std::uint8_t>& blob() const { return blob_; }
    std::int64_t workspace_bytes() const { return workspace_bytes_; }

    // Decodes each packet to its own `out`. faults[packet] receives a Fault; after one the contents of `out` are
    // unspecified.
    Status decode(const void* blob, const StaticTables* codes, void* workspace, unsigned* faults, void* stream) const;
    // Stores the sum of the packets' values in the first task's `out`, or, with `add`, adds it to the values there. It
    // is added in the order of the tasks, whatever their number, so that all ranks get the same bits. All packets have
    // the first one's number of elements and its segments. float32 and float64 only.
    Status decode_sum(const void* blob, const StaticTables* codes, void* workspace, unsigned* faults, void* stream,
                      bool add = false) const;

private:
    void place(Workspace* workspace, DecodeTables* tables) const;  // as in EncodePlan
    DecodeTables tables(const void* blob, const StaticTables* codes, void* workspace, unsigned* faults) const;
    void prepare(const DecodeTables& d, void* stream) const;

    Status status_;
    DType dtype_;
    int steps_, max_segments_, packet_count_, own_code_bits_;
    bool takes_runs_;
    std::int64_t tiles_ = 0, run_tiles_ = 0, sum_tiles_ = 0, piece_tiles_ = 0;  // at most, of one packet
    std::int64_t workspace_bytes_ = 0;
    std::vector<std::uint8_t> blob_;
};

// `count` neighbouring values that RunPlan copies or adds, such as a tensor and its place in a bucket. Both pointers
// are aligned to their types.
struct Run {
    const void* from = nullptr;
    void* to = nullptr;
    std::int64_t count = 0;
    std::int32_t first_fault = 0, faults = 0;  // copy(): of the packets that the values come from
    std::int32_t tensor = -1;                  // add_own(): its number in the EncodePlan; -1: of no tensor there
    float* residual = nullptr;                 // add_own(): `count` numbers, or null
};

// Many runs of values in one launch.
class RunPlan {
public:
    // `to` is the dtype of Run::to. Run::from is float64 where `to` is, and float32 otherwise.
    RunPlan(DType to, const std::vector<Run>& runs);

    const Status& status() const { return status_; }
    // The tasks as the kernels read them, in host memory; a copy of it on the device is needed. There is no workspace.
    const std::vector<std::uint8_t>& blob() const { return blob_; }

    // to = from / divisor * factor, in the arithmetic of `from`; NaN where one of the run's faults is not 0. `factor`,
    // in device memory, may be null for 1, and `faults` may be null for none. A run's `to` may be its `from`.
    Status copy(const void* blob, double divisor, const double* factor, const unsigned* faults, void* stream) const;
    // to = from * inv_scale, or, with `add`, to += from * inv_scale; then to += residual, and residual = 0. `to` is NaN
    // where `measured`, whose workspace this is, has found a tensor with a non-finite value; residuals stay there, and
    // those of tensors whose values are all 0. float32 and float64 only.
    Status add_own(const void* blob, const EncodePlan& measured, void* workspace, const double* inv_scale, bool add,
                   void* stream) const;

private:
    Status status_;
    DType dtype_;
    std::int32_t run_count_;
    std::int64_t tiles_ = 0;
    std::vector<std::uint8_t> blob_;
};

}  // namespace qcomm::cuda
