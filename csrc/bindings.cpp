// The only file of the CPU's core that knows Python. Tensors arrive as addresses, checked by qcomm/codec/checks.py;
// the GIL is released around every operation that walks over data.
//
// Each function turns numbers into a struct of the core, calls one operation, and turns its status into an exception
// once the GIL is held again. Structs arrive as tuples: their fields have the order of the struct's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <string>

#include "qcomm/block.h"
#include "qcomm/checksum.h"
#include "qcomm/entropy.h"
#include "qcomm/huffman.h"
#include "qcomm/packet.h"
#include "qcomm/processor.h"
#include "qcomm/quantize.h"
#include "qcomm/rounding.h"
#include "qcomm/statistics.h"

namespace py = pybind11;
using namespace qcomm;

namespace {

// Python's ints are numbers to pybind11: a tensor's address arrives without its type, and what is behind it was checked
// by the caller.
using Address = std::uintptr_t;

// Set by qcomm/codec/_native.py to qcomm.PacketError.
py::object& packet_error() {
    static auto* error = new py::object();  // never destroyed: module teardown may outlive the interpreter
    return *error;
}

// The exception's text is the status's; `where` follows it, unless that is kNowhere.
void raise_if_error(const Status& status) {
    if (status.ok()) return;
    std::string message = status.what;
    if (status.where != kNowhere) message += " " + std::to_string(status.where);
    // Before set_packet_error() is called there is no such class: ValueError, from which PacketError is derived.
    if (status.code == StatusCode::kBadPacket && packet_error()) {
        PyErr_SetString(packet_error().ptr(), message.c_str());
        throw py::error_already_set();
    }
    throw py::value_error(message);
}

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// `residual` is 0 where there is none.
Values make_values(Address data, int dtype, std::int64_t count, Address residual, double inv_scale) {
    return {pointer<const void>(data), static_cast<DType>(dtype), count, pointer<const float>(residual), inv_scale};
}

// (minimum, maximum, sum of squares, finite)
py::tuple py_measure(Address data, int dtype, std::int64_t count, Address residual, double inv_scale, int threads) {
    // Outside the scope without the GIL: a tuple may only be made once it is held again.
    Statistics s;
    {
        py::gil_scoped_release nogil;
        s = measure(make_values(data, dtype, count, residual, inv_scale), threads);
    }
    return py::make_tuple(s.minimum, s.maximum, s.sum_squares, s.finite);
}

// The entropy in bits. It is exact in 24 bits of fraction, so every machine returns the same double.
// No Python object is made here, so the GIL may stay released to the end.
double py_entropy(Address data, int dtype, std::int64_t count, Address residual, double inv_scale, double lo, double hi,
                  int num_bits, double fraction, std::uint32_t seed, int threads) {
    py::gil_scoped_release nogil;
    const Values values = make_values(data, dtype, count, residual, inv_scale);
    const auto counts = sample_histogram(values, lo, hi, num_bits, fraction, seed, threads);
    return static_cast<double>(entropy_fixed(counts.data(), static_cast<int>(counts.size()))) / (1 << kLogFractionBits);
}

// (coding, table)
py::tuple py_sigma_code(Address data, int dtype, std::int64_t count, Address residual, double inv_scale, int num_bits,
                        double step, double k, std::uint32_t seed, int threads) {
    SigmaCode code{};
    {
        py::gil_scoped_release nogil;
        code =
            choose_sigma_code(make_values(data, dtype, count, residual, inv_scale), num_bits, step, k, seed, threads);
    }
    return py::make_tuple(static_cast<int>(code.coding), static_cast<int>(code.table));
}

// Returns a table's number, or 255 for none.
int py_nearest_static_table(int coding, int num_bits, double k) {
    const StaticCode* code = nearest_static_code(static_cast<Coding>(coding), num_bits, k);
    return code != nullptr ? code->id : kNoTable;
}

// grid, num_bits, coding, table, p0, p1
using QuantizerTuple = std::tuple<int, int, int, int, double, double>;

Quantizer make_quantizer(const QuantizerTuple& q) {
    return {static_cast<Grid>(std::get<0>(q)),
            static_cast<std::uint8_t>(std::get<1>(q)),
            static_cast<Coding>(std::get<2>(q)),
            static_cast<std::uint8_t>(std::get<3>(q)),
            std::get<4>(q),
            std::get<5>(q)};
}

// One symbol a value, for qcomm.quantize: packets are written by other loops, to which tests hold these.
void py_quantize(Address data, int dtype, std::int64_t count, const QuantizerTuple& quantizer, Address symbols) {
    py::gil_scoped_release nogil;
    dispatch(static_cast<DType>(dtype), [&](auto traits) {
        using Tr = decltype(traits);
        with_grid<Tr>(make_quantizer(quantizer), [&](const auto& grid) {
            const Reader<Tr> reader(make_values(data, dtype, count, 0, 1.0));
            for (std::int64_t i = 0; i < count; ++i)
                pointer<std::int32_t>(symbols)[i] = static_cast<std::int32_t>(grid(reader[i]));
        });
    });
}

// Symbols come from users. Python has checked that they are of the alphabet, outside of which a sigma grid's decode()
// would overflow.
void py_dequantize(Address symbols, std::int64_t count, const QuantizerTuple& quantizer, int dtype, Address out) {
    py::gil_scoped_release nogil;
    dispatch(static_cast<DType>(dtype), [&](auto traits) {
        using Tr = decltype(traits);
        with_grid<Tr>(make_quantizer(quantizer), [&](const auto& grid) {
            auto* typed = pointer<typename Tr::Storage>(out);
            for (std::int64_t i = 0; i < count; ++i) {
                typed[i] = Tr::narrow(grid.decode(static_cast<std::uint32_t>(pointer<const std::int32_t>(symbols)[i])));
            }
        });
    });
}

// (values, count, residual or 0, quantizer) of each segment.
using SegmentTuple = std::tuple<Address, std::int64_t, Address, QuantizerTuple, Address>;

// The new residual replaces the old one in place.
// All of it is borrowed: the caller's tensors must stay alive until the operation returns.
std::vector<SegmentInput> make_segments(const std::vector<SegmentTuple>& segments, int dtype, double inv_scale) {
    std::vector<SegmentInput> inputs;
    inputs.reserve(segments.size());
    for (const auto& [data, count, residual, quantizer, sample] : segments) {
        inputs.push_back({make_values(data, dtype, count, residual, inv_scale), make_quantizer(quantizer),
                          pointer<float>(residual), pointer<double>(sample)});
    }
    return inputs;
}

// The scale has no part in a bound; a residual has none either, but is in the tuple. Sizes only, so the GIL stays.
std::int64_t py_encode_bound(const std::vector<SegmentTuple>& segments, int dtype,
                             const std::vector<std::int64_t>& dims, bool checksums, int steps) {
    return encode_bound(make_segments(segments, dtype, 1.0), {static_cast<DType>(dtype), dims, checksums, steps, 1});
}

// Returns the packet's size. A refusal has written nothing, neither to `out` nor to residuals.
std::int64_t py_encode(const std::vector<SegmentTuple>& segments, double inv_scale, int dtype,
                       const std::vector<std::int64_t>& dims, bool checksums, int steps, int threads, Address out,
                       std::int64_t capacity) {
    std::int64_t total = 0;
    Status status;
    {
        py::gil_scoped_release nogil;
        const EncodeOptions options{static_cast<DType>(dtype), dims, checksums, steps, threads};
        status = encode_packet(make_segments(segments, dtype, inv_scale), options, pointer<std::uint8_t>(out), capacity,
                               &total);
    }
    raise_if_error(status);
    return total;
}

// The view points into the packet, which the caller keeps alive meanwhile.
PacketView parse(Address packet, std::int64_t bytes) {
    PacketView view;
    Status status;
    {
        py::gil_scoped_release nogil;
        status = parse_packet(pointer<const std::uint8_t>(packet), bytes, &view);
    }
    raise_if_error(status);
    return view;
}

// The front of a packet as Python objects.
py::dict describe_front(const PacketView& view) {
    py::list records;
    for (const SegmentRecord& r : view.records) {
        records.append(py::make_tuple(r.count, static_cast<int>(r.grid), static_cast<int>(r.num_bits),
                                      static_cast<int>(r.coding), static_cast<int>(r.table), r.p0, r.p1));
    }
    py::dict info;
    info["version"] = static_cast<int>(view.header.version);
    info["dtype"] = static_cast<int>(view.header.dtype);
    info["dims"] = view.dims;
    info["element_count"] = view.header.element_count;
    info["steps"] = static_cast<int>(view.header.steps);
    info["records"] = records;
    return info;
}

// A packet's metadata as Python objects, for qcomm.inspect.
py::dict py_parse(Address packet, std::int64_t bytes) {
    const PacketView view = parse(packet, bytes);
    py::dict info = describe_front(view);
    info["checksums"] = view.checksums != nullptr;
    info["payload_bytes"] = view.payload_bytes;
    return info;
}

// For packets on a device: only the header, then only the front, is copied to the host. The GIL stays, since a front is
// short.
std::int64_t py_front_bytes(Address packet, std::int64_t present, std::int64_t bytes) {
    std::int64_t size = 0;
    raise_if_error(measure_front(pointer<const std::uint8_t>(packet), present, bytes, &size));
    return size;
}

py::dict py_parse_front(Address packet, std::int64_t present, std::int64_t bytes) {
    PacketView view;
    raise_if_error(parse_front(pointer<const std::uint8_t>(packet), present, bytes, &view));
    return describe_front(view);
}

// For tensors on a device, whose sample is gathered there: the indices are those of the CPU's estimate.
void py_sample_indices(std::int64_t size, std::int64_t count, std::uint32_t seed, Address indices) {
    py::gil_scoped_release nogil;
    for (std::int64_t i = 0; i < size; ++i) pointer<std::int64_t>(indices)[i] = sample_index(i, size, count, seed);
}

// Parses again whatever was parsed before: between two calls the bytes are the caller's, who may have changed them.
void py_decode(Address packet, std::int64_t bytes, Address out, std::int64_t count, int dtype, bool accumulate,
               int threads) {
    Status status;
    {
        py::gil_scoped_release nogil;
        PacketView view;
        status = parse_packet(pointer<const std::uint8_t>(packet), bytes, &view);
        // The packet decides how much is written, so `out` is compared with it before anything is.
        if (status.ok() && (static_cast<std::int64_t>(view.header.element_count) != count ||
                            static_cast<int>(view.header.dtype) != dtype)) {
            status = bad_argument("out must have the packet's dtype and element count,",
                                  static_cast<std::int64_t>(view.header.element_count));
        }
        if (status.ok()) status = decode_packet(view, pointer<void>(out), accumulate, threads);
    }
    raise_if_error(status);
}

// `places` are (offset, count) in `out`. Like py_decode.
void py_decode_to(Address packet, std::int64_t bytes, Address out, std::int64_t count, int dtype,
                  const std::vector<std::pair<std::int64_t, std::int64_t>>& places, int threads) {
    Status status;
    {
        py::gil_scoped_release nogil;
        PacketView view;
        status = parse_packet(pointer<const std::uint8_t>(packet), bytes, &view);
        if (status.ok() && static_cast<int>(view.header.dtype) != dtype)
            status = bad_argument("out must have the packet's dtype, number", static_cast<int>(view.header.dtype));
        std::vector<Place> at;
        for (const auto& [offset, length] : places) at.push_back({offset, length});
        if (status.ok()) status = decode_packet_to(view, at, pointer<void>(out), count, threads);
    }
    raise_if_error(status);
}

// Adds to 65536 counters.
void py_count_symbols(Address packet, std::int64_t bytes, std::size_t segment, Address counts) {
    Status status;
    {
        py::gil_scoped_release nogil;
        PacketView view;
        status = parse_packet(pointer<const std::uint8_t>(packet), bytes, &view);
        if (status.ok() && segment >= view.records.size())
            status = bad_argument("no such segment", static_cast<std::int64_t>(segment));
        if (status.ok()) status = count_symbols(view, segment, pointer<std::uint64_t>(counts));
    }
    raise_if_error(status);
}

void py_code_lengths(Address counts, int size, int limit, Address lengths) {
    py::gil_scoped_release nogil;
    code_lengths(pointer<const std::uint64_t>(counts), size, limit, pointer<std::uint8_t>(lengths));
}

// (id, coding, num_bits, lengths) of each table, for tests and for the reference's copy of them.
py::list py_static_tables() {
    py::list tables;
    // 0 and 255 are no tables; most numbers between them are free.
    for (int id = 1; id < kNoTable; ++id) {
        if (const StaticCode* code = find_static_code(static_cast<std::uint8_t>(id))) {
            tables.append(py::make_tuple(id, static_cast<int>(code->coding), code->num_bits, code->lengths));
        }
    }
    return tables;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "qcomm's native core; use it through the qcomm package, which checks its arguments.";
    // The wire format's sizes (docs/format.md), and that of a Quantizer in a plan's workspace.
    m.attr("PACKET_HEADER_BYTES") = sizeof(PacketHeader);
    m.attr("TOTAL_BYTES_AT") = offsetof(PacketHeader, total_bytes);
    m.attr("DIMENSION_BYTES") = kDimensionBytes;
    m.def("record_bytes", [](int dtype) { return record_bytes(static_cast<DType>(dtype)); });
    m.attr("CHECKSUM_BYTES") = kChecksumBytes;
    m.attr("RUNS_BITS") = kRunsBits;
    m.attr("SAMPLE_NUMBERS") = kSampleNumbers;
    m.attr("MAX_CODED_BITS") = kMaxCodedBits;
    m.attr("QUANTIZER_BYTES") = sizeof(Quantizer);
    // The class is Python's, so that users can catch it by its module's name; the core is told of it once.
    // Arguments have no names here: _C.pyi has them, for the only caller, qcomm/codec/_native.py.
    m.def("set_packet_error", [](py::object error) { packet_error() = std::move(error); });
    m.def("measure", &py_measure);
    m.def("entropy", &py_entropy);
    m.def("sample_size", &sample_size);
    m.def("sample_indices", &py_sample_indices);
    m.def("sigma_code", &py_sigma_code);
    m.def("nearest_static_table", &py_nearest_static_table);
    m.def("is_usable",
          [](const QuantizerTuple& q, int dtype) { return is_usable(make_quantizer(q), static_cast<DType>(dtype)); });
    m.def("quantize", &py_quantize);
    m.def("dequantize", &py_dequantize);
    m.def("encode_bound", &py_encode_bound);
    m.def("encode", &py_encode);
    m.def("parse", &py_parse);
    m.def("front_bytes", &py_front_bytes);
    m.def("parse_front", &py_parse_front);
    m.def("decode", &py_decode);
    m.def("decode_to", &py_decode_to);
    m.def("count_symbols", &py_count_symbols);
    m.def("code_lengths", &py_code_lengths);
    m.def("canonical_codes", [](Address lengths, int size, Address codes) {
        canonical_codes(pointer<const std::uint8_t>(lengths), size, pointer<std::uint16_t>(codes));
    });
    m.def("kernel_versions", &kernel_versions);
    m.def("kernel_version", &kernel_version);
    m.def("use_kernel_version", [](const std::string& name) { return use_kernel_version(name.c_str()); });
    m.def("static_tables", &py_static_tables);
    m.def("log2_fixed", &log2_fixed);
    m.def("divide_to_bfloat", [](Address values, std::int64_t count, float divisor, Address out, int threads) {
        py::gil_scoped_release nogil;
        divide_to_bfloat(pointer<const float>(values), count, divisor, pointer<std::uint16_t>(out), threads);
    });
    m.def("checksum",
          [](Address data, std::int64_t bytes) { return checksum(pointer<const std::uint8_t>(data), bytes); });
}
