// The CUDA core for Python, as a module of its own: one that has it imports on machines without a GPU, and the rest of
// qcomm works without it. Device memory and streams arrive as addresses, checked by qcomm/codec/_native_cuda.py;
// nothing here allocates device memory or waits. The GIL is released around encodings and decodings, which are several
// launches each.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <tuple>

#include "qcomm/cuda.h"

namespace py = pybind11;
using namespace qcomm;

namespace {

using Address = std::uintptr_t;

// An error of a launch is no fault of the arguments, and becomes a RuntimeError.
void raise_if_error(const Status& status) {
    if (status.ok()) return;
    std::string message = status.what;
    if (status.where != kNowhere) message += " " + std::to_string(status.where);
    if (status.code == StatusCode::kDeviceError) throw std::runtime_error("CUDA: " + message);
    throw py::value_error(message);
}

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// A copy for Python, which puts it into device memory.
py::bytes to_bytes(const void* data, std::size_t size) { return {static_cast<const char*>(data), size}; }

// Plans arrive as tuples of numbers, the records of qcomm/codec/_native_cuda.py, so that this file needs no class for
// each struct of cuda.h. Their fields, in order: grid, num_bits, coding, table
using QuantizerTuple = std::tuple<int, int, int, int>;
// c, entropy_bits, fraction, max_bits, seed, choose_code
using RuleTuple = std::tuple<double, int, double, int, std::uint32_t, bool>;
// values, count, residual, inv_scale, quantizer, k, rule, nonfinite_is_constant, as_it_is, zero_keeps_residual
using TensorTuple =
    std::tuple<Address, std::int64_t, Address, Address, QuantizerTuple, double, RuleTuple, bool, bool, bool>;
// tensor, offset, count, residual_out
using SegmentTuple = std::tuple<std::int32_t, std::int64_t, std::int64_t, Address>;
// segments, out, capacity, dims
using PacketTuple = std::tuple<std::int32_t, Address, std::int64_t, std::vector<std::int64_t>>;
// packet, bytes, out, elements, exact
using TaskTuple = std::tuple<Address, std::int64_t, Address, std::int64_t, bool>;
// from, to, count, first_fault, faults, tensor, residual
using RunTuple = std::tuple<Address, Address, std::int64_t, std::int32_t, std::int32_t, std::int32_t, Address>;

cuda::Tensor make_tensor(const TensorTuple& t) {
    const auto& [values, count, residual, inv_scale, q, k, rule, nonfinite_is_constant, as_it_is, zero_keeps_residual] =
        t;
    const auto& [c, entropy_bits, fraction, max_bits, seed, choose_code] = rule;
    // p0 and p1 are measured on the device: Python does not know them when it makes a plan.
    const Quantizer quantizer{static_cast<Grid>(std::get<0>(q)),
                              static_cast<std::uint8_t>(std::get<1>(q)),
                              static_cast<Coding>(std::get<2>(q)),
                              static_cast<std::uint8_t>(std::get<3>(q)),
                              0.0,
                              0.0};
    return {pointer<const void>(values),
            pointer<const float>(residual),
            pointer<const double>(inv_scale),
            count,
            quantizer,
            k,
            {c, entropy_bits, fraction, max_bits, seed, choose_code},
            nonfinite_is_constant,
            as_it_is,
            zero_keeps_residual};
}

// A plan that refuses its arguments never reaches Python.
cuda::EncodePlan make_encode_plan(int dtype, int steps, bool checksums, const std::vector<TensorTuple>& tensors,
                                  const std::vector<SegmentTuple>& segments, const std::vector<PacketTuple>& packets) {
    // Plans copy what they need of these vectors into the blob, so they may go when this returns.
    std::vector<cuda::Tensor> made_tensors;
    std::vector<cuda::Segment> made_segments;
    std::vector<cuda::Packet> made_packets;
    for (const TensorTuple& t : tensors) made_tensors.push_back(make_tensor(t));
    for (const auto& [tensor, offset, count, residual_out] : segments)
        made_segments.push_back({tensor, offset, count, pointer<float>(residual_out)});
    for (const auto& [count, out, capacity, dims] : packets)
        made_packets.push_back({count, dims, pointer<std::uint8_t>(out), capacity});
    cuda::EncodePlan plan(static_cast<DType>(dtype), steps, checksums, made_tensors, made_segments, made_packets);
    raise_if_error(plan.status());
    return plan;
}

// measure() and encode() together: Python has nothing to do between them, since the device decides.
void encode(const cuda::EncodePlan& plan, Address blob, Address codes, Address workspace, Address total_bytes,
            Address stream) {
    Status status;
    {
        py::gil_scoped_release nogil;
        const auto* const tables = pointer<const cuda::StaticTables>(codes);
        status = plan.measure(pointer<const void>(blob), tables, pointer<void>(workspace), pointer<void>(stream));
        if (status.ok()) {
            status = plan.encode(pointer<const void>(blob), tables, pointer<void>(workspace),
                                 pointer<std::int64_t>(total_bytes), pointer<void>(stream));
        }
    }
    raise_if_error(status);
}

// It is one launch, so the GIL stays; so it does for runs.
void count(const cuda::EncodePlan& plan, Address blob, Address workspace, Address total_bytes, Address account,
           Address stream) {
    raise_if_error(plan.count(pointer<const void>(blob), pointer<void>(workspace),
                              pointer<const std::int64_t>(total_bytes), pointer<cuda::Account>(account),
                              pointer<void>(stream)));
}

// Memory of packets need not hold packets yet: a plan only notes where they will be.
cuda::DecodePlan make_decode_plan(int dtype, int steps, int max_segments, const std::vector<TaskTuple>& tasks,
                                  int own_code_bits, bool takes_runs) {
    std::vector<cuda::DecodeTask> made;
    for (const auto& [packet, bytes, out, elements, exact] : tasks)
        made.push_back({pointer<const std::uint8_t>(packet), bytes, pointer<void>(out), elements, exact});
    cuda::DecodePlan plan(static_cast<DType>(dtype), steps, max_segments, made, own_code_bits, takes_runs);
    raise_if_error(plan.status());
    return plan;
}

void decode(const cuda::DecodePlan& plan, Address blob, Address codes, Address workspace, Address faults,
            Address stream) {
    Status status;
    {
        py::gil_scoped_release nogil;
        const auto* const tables = pointer<const cuda::StaticTables>(codes);
        status = plan.decode(pointer<const void>(blob), tables, pointer<void>(workspace), pointer<unsigned>(faults),
                             pointer<void>(stream));
    }
    raise_if_error(status);
}

// The order of the tasks is that of the additions.
void decode_sum(const cuda::DecodePlan& plan, Address blob, Address codes, Address workspace, Address faults, bool add,
                Address stream) {
    Status status;
    {
        py::gil_scoped_release nogil;
        const auto* const tables = pointer<const cuda::StaticTables>(codes);
        status = plan.decode_sum(pointer<const void>(blob), tables, pointer<void>(workspace), pointer<unsigned>(faults),
                                 pointer<void>(stream), add);
    }
    raise_if_error(status);
}

cuda::RunPlan make_run_plan(int to, const std::vector<RunTuple>& runs) {
    std::vector<cuda::Run> made;
    for (const auto& [from, target, count, first_fault, faults, tensor, residual] : runs)
        made.push_back({pointer<const void>(from), pointer<void>(target), count, first_fault, faults, tensor,
                        pointer<float>(residual)});
    cuda::RunPlan plan(static_cast<DType>(to), made);
    raise_if_error(plan.status());
    return plan;
}

void copy_runs(const cuda::RunPlan& plan, Address blob, double divisor, Address factor, Address faults,
               Address stream) {
    raise_if_error(plan.copy(pointer<const void>(blob), divisor, pointer<const double>(factor),
                             pointer<const unsigned>(faults), pointer<void>(stream)));
}

// `workspace` is that of `measured`, which must have been measured in it on the same stream.
void add_own(const cuda::RunPlan& plan, Address blob, const cuda::EncodePlan& measured, Address workspace,
             Address inv_scale, bool add, Address stream) {
    raise_if_error(plan.add_own(pointer<const void>(blob), measured, pointer<void>(workspace),
                                pointer<const double>(inv_scale), add, pointer<void>(stream)));
}

// In host memory; the caller makes a copy for each device.
py::bytes static_tables() {
    // On the heap, since a thread's stack may not have 400 KiB to spare.
    const auto tables = std::make_unique<cuda::StaticTables>();
    cuda::fill_static_tables(tables.get());
    return to_bytes(tables.get(), sizeof(*tables));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "qcomm's CUDA core; use it through the qcomm package, which checks its arguments.";
    m.def("static_tables", &static_tables);
    // A plan is moved into its Python object and has no pointers to itself; several threads may use one object, each
    // with a workspace of its own, since all its operations are const.
    py::class_<cuda::EncodePlan>(m, "EncodePlan")
        .def(py::init(&make_encode_plan))
        .def("blob", [](const cuda::EncodePlan& p) { return to_bytes(p.blob().data(), p.blob().size()); })
        .def("workspace_bytes", &cuda::EncodePlan::workspace_bytes)
        .def("bound", &cuda::EncodePlan::bound)
        .def("quantizers",
             // An address inside the workspace, from which Python copies the quantizers on the device.
             [](const cuda::EncodePlan& p, Address workspace) {
                 return reinterpret_cast<Address>(p.quantizers(pointer<void>(workspace)));
             })
        .def("encode", &encode)
        .def("count", &count);
    py::class_<cuda::DecodePlan>(m, "DecodePlan")
        .def(py::init(&make_decode_plan))
        .def("blob", [](const cuda::DecodePlan& p) { return to_bytes(p.blob().data(), p.blob().size()); })
        .def("workspace_bytes", &cuda::DecodePlan::workspace_bytes)
        .def("decode", &decode)
        .def("decode_sum", &decode_sum);
    py::class_<cuda::RunPlan>(m, "RunPlan")
        .def(py::init(&make_run_plan))
        .def("blob", [](const cuda::RunPlan& p) { return to_bytes(p.blob().data(), p.blob().size()); })
        .def("copy", &copy_runs)
        .def("add_own", &add_own);
}
