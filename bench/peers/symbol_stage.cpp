// qcomm's packets without the grid's arithmetic, for bench/bench_codec.py: symbols to bytes and back.
//
// encode_packet and decode_packet run as they are. Only the inner loops that they call for values are others: quantize
// and quantize_counted copy symbols that were made before, decode_lanes and dequantize copy symbols out. So histogram,
// code lengths, tables, blocks, fallbacks, checksums and the packet's layout are those of the library, and one copy of
// the symbols is timed on top of them; AVX-512, which has a value's arithmetic inside the decoder, has the copy there.
// Up to 8 bits they are bytes on the outside, as other coders have them. A value is only ever looked at to find out
// which one it is.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "decode_to_bytes.h"
#include "kernels.h"
#include "qcomm/packet.h"

#define QCOMM_BENCH_EXPORT extern "C" __attribute__((visibility("default")))

namespace qcomm {
namespace {

struct Stage {
    Kernels kernels = kScalarKernels;
    const float* values = nullptr;  // the address of the value 0
    const void* symbols = nullptr;  // encoded
    void* decoded = nullptr;
    void (*decode_lanes)(CodedBlock*, int, const LaneDecoding&) = nullptr;  // of the library
};
thread_local Stage stage;

template <class From, class To>
void copy(const From* from, int n, To* to) {
    for (int i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
}

void copy_symbols(const void* u, int n, const Quantizer& q, std::uint16_t* symbols) {
    const std::ptrdiff_t at = static_cast<const float*>(u) - stage.values;
    if (q.num_bits <= 8) {
        copy(static_cast<const std::uint8_t*>(stage.symbols) + at, n, symbols);
    } else {
        copy(static_cast<const std::uint16_t*>(stage.symbols) + at, n, symbols);
    }
}

SymbolScan copy_in(const void* u, DType, int n, const Quantizer& q, std::uint16_t* symbols) {
    copy_symbols(u, n, q, symbols);
    return {0, false};
}

void copy_in_counted(const Values& values, std::int64_t begin, int n, const Quantizer& q, std::uint16_t* symbols,
                     CodewordCounts* counts, float*) {
    copy_symbols(static_cast<const float*>(values.data) + begin, n, q, symbols);
    counts->add(symbols, n);
}

// Where the byte of a value is.
std::uint8_t* decoded_at(const void* value) {
    return static_cast<std::uint8_t*>(stage.decoded) + (static_cast<const float*>(value) - stage.values);
}

void copy_out(const std::uint16_t* symbols, int n, const Quantizer& q, DType, void* out, bool) {
    const std::ptrdiff_t at = static_cast<const float*>(out) - stage.values;
    if (q.num_bits <= 8) {
        copy(symbols, n, decoded_at(out));
    } else {
        copy(symbols, n, static_cast<std::uint16_t*>(stage.decoded) + at);
    }
}

void decode_and_copy_out(CodedBlock* blocks, int count, const LaneDecoding& how) {
    void* values[2];
#ifdef QCOMM_X86_KERNELS
    if (stage.decode_lanes == kAvx512Kernels.decode_lanes && how.quantizer.num_bits <= 8) {
        for (int i = 0; i < count; ++i) blocks[i].values = decoded_at(blocks[i].values);
        return decode_to_bytes_avx512(blocks, count, how);
    }
#endif
    for (int i = 0; i < count; ++i) values[i] = std::exchange(blocks[i].values, nullptr);
    stage.decode_lanes(blocks, count, how);
    for (int i = 0; i < count; ++i)
        copy_out(blocks[i].symbols, blocks[i].count, how.quantizer, how.dtype, values[i], how.accumulate);
}

const Kernels* find(const char* name) {
#ifdef QCOMM_X86_KERNELS
    if (std::strcmp(name, "avx2") == 0) return &kAvx2Kernels;
    if (std::strcmp(name, "avx512") == 0) return &kAvx512Kernels;
#endif
    return std::strcmp(name, "scalar") == 0 ? &kScalarKernels : nullptr;
}

}  // namespace

// Takes the place of csrc/cpu/kernels.cpp, which the linker therefore leaves in the library.
const Kernels& kernels() { return stage.kernels; }

}  // namespace qcomm

using namespace qcomm;

// Inner loops by their name, one of qcomm.cpu_features(); false when this build has no such.
QCOMM_BENCH_EXPORT bool symbols_use(const char* name) {
    const Kernels* found = find(name);
    if (found == nullptr) return false;
    stage.kernels = *found;
    stage.decode_lanes = found->decode_lanes;
    stage.kernels.quantize = copy_in;
    stage.kernels.quantize_counted = copy_in_counted;
    stage.kernels.decode_lanes = decode_and_copy_out;
    stage.kernels.dequantize = copy_out;
    return true;
}

// A packet of the symbols of `values`, u8 or above 8 bits u16, on a range grid over [0, 1], with a table of its own.
// Returns its bytes, or minus the bytes that `out` would need, or 0 when the request is refused.
QCOMM_BENCH_EXPORT std::int64_t symbols_encode(const float* values, const void* symbols, std::int64_t count,
                                               int num_bits, int steps, bool checksums, std::uint8_t* out,
                                               std::int64_t capacity) {
    const Quantizer q{Grid::kRangeEndpoint, static_cast<std::uint8_t>(num_bits), Coding::kSingle, kTableOnWire, 0., 1.};
    SegmentInput input;
    input.values.data = values;
    input.values.count = count;
    input.quantizer = q;
    EncodeOptions options;
    options.dims = {count};
    options.checksums = checksums;
    options.steps = steps;
    const std::int64_t bound = encode_bound({input}, options);
    if (capacity < bound) return -bound;
    stage.values = values;
    stage.symbols = symbols;
    std::int64_t bytes = 0;
    return encode_packet({input}, options, out, capacity, &bytes).ok() ? bytes : 0;
}

// The symbols of such a packet. `values` as before; none of them is written to.
QCOMM_BENCH_EXPORT bool symbols_decode(const std::uint8_t* packet, std::int64_t bytes, float* values, void* symbols) {
    stage.values = values;
    stage.decoded = symbols;
    PacketView view;
    return parse_packet(packet, bytes, &view).ok() && decode_packet(view, values, false).ok();
}
