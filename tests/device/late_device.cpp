// A device of torch, of the kind privateuse1, that stands in for a GPU in tests.
//
// Its memory is the host's, and its kernels are the CPU's. Its streams run late (late_streams.h). Memory is poisoned
// (every byte 0xFF, a NaN in every dtype) from its allocation until a stream's work writes to it, and again from the
// place in its stream at which it is freed. So the host, or another stream, that does not wait reads NaN or an old
// value.
//
// - A kernel takes its inputs when it is launched, after all work before it on its stream. Its results come later, as
//   work of the stream.
// - A copy between device and page-locked memory that does not block reads and writes when it runs, as a GPU's DMA
// does.
//   Any other copy to the host waits for its stream, and any other copy to the device takes its values at once.
// - Freed memory may be reused at once by its own stream, as with torch's allocator for GPUs. Freed page-locked memory
//   stays as it is until the copies that use it have run, as with torch's, too.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "late_streams.h"

namespace late {
namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr int kPoison = 0xFF;

Streams& streams() {
    static auto* const all = new Streams;  // never destroyed: tensors may be freed after main
    return *all;
}

thread_local int64_t current_stream = 0;

// Copies that are still to be launched before one fails; negative where none does.
std::atomic<int64_t> copies_before_a_failure{-1};

void fail_if_asked() {
    if (copies_before_a_failure >= 0 && copies_before_a_failure-- == 0) TORCH_CHECK(false, "late: a copy failed");
}

// --- memory
// -----------------------------------------------------------------------------------------------------------

struct Block {
    void* data;
    size_t bytes;
    int64_t stream;                // on which it was allocated
    std::vector<int64_t> also_on;  // other streams that have used it
};

// Page-locked memory, and the places behind the copies that use it.
struct PinnedBlock {
    void* data;
    size_t bytes;
    std::vector<Place> uses;

    bool is_unused() const {
        return std::all_of(uses.begin(), uses.end(), [](Place use) { return streams().has_passed(use); });
    }
};

struct Memory {
    std::unordered_map<void*, Block> used;
    std::multimap<std::pair<int64_t, size_t>, void*> free;  // by stream and bytes
    std::map<const char*, PinnedBlock> pinned;
    std::vector<PinnedBlock> retired;  // freed, while copies that had been launched were still to come
};

Memory& memory() {
    static auto* const all = new Memory;
    return *all;
}

void free_block(void* data) {
    const std::lock_guard<std::recursive_mutex> lock(streams().mutex);
    const auto found = memory().used.find(data);
    const Block block = found->second;
    memory().used.erase(found);
    for (const int64_t other : block.also_on) streams().wait(block.stream, streams().place(other));
    streams().add(block.stream, [=] { std::memset(block.data, kPoison, block.bytes); });
    memory().free.insert({{block.stream, block.bytes}, block.data});
}

struct Allocator final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        const c10::Device device(kDevice, 0);
        if (bytes == 0) return {nullptr, nullptr, &free_block, device};
        const std::lock_guard<std::recursive_mutex> lock(streams().mutex);
        void* data = nullptr;
        const auto found = memory().free.find({current_stream, bytes});
        if (found != memory().free.end()) {
            data = found->second;
            memory().free.erase(found);
        } else {
            data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
            TORCH_CHECK(data != nullptr, "late: no memory for ", bytes, " bytes");
            std::memset(data, kPoison, bytes);
        }
        memory().used.insert({data, {data, bytes, current_stream, {}}});
        return {data, data, &free_block, device};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
    void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

void free_pinned(void* data) {
    const std::lock_guard<std::recursive_mutex> lock(streams().mutex);
    const auto found = memory().pinned.find(static_cast<const char*>(data));
    memory().retired.push_back(std::move(found->second));
    memory().pinned.erase(found);
    auto& retired = memory().retired;
    const auto unused =
        std::partition(retired.begin(), retired.end(), [](const auto& block) { return !block.is_unused(); });
    std::for_each(unused, retired.end(), [](const auto& block) { std::free(block.data); });
    retired.erase(unused, retired.end());
}

struct PinnedAllocator final : at::HostAllocator {
    c10::DataPtr allocate(size_t bytes) override {
        const std::lock_guard<std::recursive_mutex> lock(streams().mutex);
        void* const data = std::aligned_alloc(64, (bytes + 64) / 64 * 64);
        TORCH_CHECK(data != nullptr, "late: no memory for ", bytes, " bytes");
        std::memset(data, kPoison, bytes);
        memory().pinned.emplace(static_cast<const char*>(data), PinnedBlock{data, bytes, {}});
        return {data, data, &free_pinned, c10::Device(c10::kCPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
    void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
    bool record_event(void*, void*, c10::Stream) override { return true; }
    void empty_cache() override {}
    at::HostStats get_stats() override { return {}; }
    void reset_accumulated_stats() override {}
    void reset_peak_stats() override {}
};

// The block of page-locked memory that an address is in, or none.
PinnedBlock* pinned_block(const void* data) {
    const auto* const address = static_cast<const char*>(data);
    const auto next = memory().pinned.upper_bound(address);
    if (next == memory().pinned.begin()) return nullptr;
    auto& [begin, block] = *std::prev(next);
    return address < begin + block.bytes ? &block : nullptr;
}

Allocator allocator;
PinnedAllocator pinned_allocator;

// --- streams and events, as torch asks for them
// -----------------------------------------------------------------------

c10::Stream as_torch(int64_t stream) { return c10::Stream(c10::Stream::UNSAFE, c10::Device(kDevice, 0), stream); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return kDevice; }
    c10::Device exchangeDevice(c10::Device) const override { return {kDevice, 0}; }
    c10::Device getDevice() const override { return {kDevice, 0}; }
    void setDevice(c10::Device) const override {}
    void uncheckedSetDevice(c10::Device) const noexcept override {}
    c10::DeviceIndex deviceCount() const noexcept override { return 1; }
    c10::Stream getStream(c10::Device) const override { return as_torch(current_stream); }
    c10::Stream getDefaultStream(c10::Device) const override { return as_torch(0); }
    c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return as_torch(streams().create()); }
    c10::Stream getNewStream(c10::Device, int) const override { return as_torch(streams().create()); }
    c10::Stream exchangeStream(c10::Stream stream) const override {
        return as_torch(std::exchange(current_stream, stream.id()));
    }
    bool queryStream(const c10::Stream& stream) const override {
        return streams().has_passed(streams().place(stream.id()));
    }
    void synchronizeStream(const c10::Stream& stream) const override { streams().run_to(streams().place(stream.id())); }
    void synchronizeDevice(c10::DeviceIndex) const override { streams().run_all(); }
    void record(void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
        if (*event == nullptr) *event = new Place;
        *static_cast<Place*>(*event) = streams().place(stream.id());
    }
    void block(void* event, const c10::Stream& stream) const override {
        if (event != nullptr) streams().wait(stream.id(), *static_cast<Place*>(event));
    }
    bool queryEvent(void* event) const override {
        return event == nullptr || streams().has_passed(*static_cast<Place*>(event));
    }
    void synchronizeEvent(void* event) const override {
        if (event != nullptr) streams().run_to(*static_cast<Place*>(event));
    }
    void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<Place*>(event); }
    void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
        const std::lock_guard<std::recursive_mutex> lock(streams().mutex);
        const auto found = memory().used.find(data.get());
        if (found != memory().used.end() && found->second.stream != stream.id())
            found->second.also_on.push_back(stream.id());
    }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
REGISTER_ALLOCATOR(kDevice, &allocator);
at::HostAllocatorRegistry<kDevice> registered_pinned_allocator(&pinned_allocator);

struct Hooks final : at::PrivateUse1HooksInterface {
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    c10::DeviceIndex deviceCount() const override { return 1; }
    void setCurrentDevice(c10::DeviceIndex) const override {}
    c10::DeviceIndex getCurrentDevice() const override { return 0; }
    c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
    c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
    bool isPinnedPtr(const void* data) const override {
        const std::lock_guard<std::recursive_mutex> lock(streams().mutex);
        return pinned_block(data) != nullptr;
    }
    at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
};

const bool registered_hooks = [] {
    at::RegisterPrivateUse1HooksInterface(new Hooks);
    return true;
}();

// --- operators
// --------------------------------------------------------------------------------------------------------

// A tensor's place in memory. Late work has no tensors, which keep their memory alive as no GPU's work does.
struct Values {
    void* data;
    std::vector<int64_t> sizes;
    std::vector<int64_t> strides;
    at::ScalarType dtype;

    explicit Values(const at::Tensor& tensor)
        : data(tensor.data_ptr()),
          sizes(tensor.sizes().vec()),
          strides(tensor.strides().vec()),
          dtype(tensor.scalar_type()) {}

    at::Tensor on_cpu() const { return at::from_blob(data, sizes, strides, at::TensorOptions(dtype)); }
};

// Waits for the current stream and returns the values that it leaves.
at::Tensor wait_for(const Values& values) {
    streams().run_to(streams().place(current_stream));
    return values.on_cpu();
}

void copy_values(const Values& read, bool from_host, const Values& written, bool to_host, bool non_blocking) {
    const std::lock_guard<std::recursive_mutex> lock(streams().mutex);
    if (non_blocking && (to_host || from_host)) fail_if_asked();
    PinnedBlock* const pinned = non_blocking ? pinned_block(to_host ? written.data : read.data) : nullptr;
    if (to_host && pinned == nullptr) {
        written.on_cpu().copy_(wait_for(read));
    } else if (from_host && pinned == nullptr) {
        const at::Tensor taken = read.on_cpu().clone();
        streams().add(current_stream, [=] { written.on_cpu().copy_(taken); });
    } else {
        streams().add(current_stream, [=] { written.on_cpu().copy_(read.on_cpu()); });
        if (pinned != nullptr) pinned->uses.push_back(streams().place(current_stream));
    }
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
    const at::NoGradGuard no_grad;
    if (to.numel() == 0) return to;
    const at::Tensor source = from.resolve_neg().expand_as(to);
    copy_values(Values(source), from.is_cpu(), Values(to), to.is_cpu(), non_blocking);
    return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
    at::native::resize_(to, from.sizes(), std::nullopt);
    return copy_from(from, to, false);
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
    const std::lock_guard<std::recursive_mutex> lock(streams().mutex);
    return at::native::_local_scalar_dense_cpu(wait_for(Values(self)));
}

void record_stream(at::Tensor& self, c10::Stream stream) {
    Guard().recordDataPtrOnStream(self.storage().data_ptr(), stream);
}

at::Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
    return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                     c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
    return at::detail::empty_strided_generic(
        size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
    return at::cpu::as_strided_symint(self, size, stride, offset);
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
    return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
    return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
    return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) { return at::native::set_tensor_(self, source); }

at::Tensor& set_storage(at::Tensor& self, at::Storage source) { return at::native::set_(self, source); }

at::Tensor& set_storage_offset(at::Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size,
                               c10::IntArrayRef stride) {
    return at::cpu::set_(self, source, offset, size, stride);
}

// Takes the inputs to the CPU, runs the CPU's kernel, and copies its results back, late.
void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) { at::native::cpu_fallback(op, stack); }

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
    m.impl("empty.memory_format", empty);
    m.impl("empty_strided", empty_strided);
    m.impl("as_strided", as_strided);
    m.impl("_reshape_alias", reshape_alias);
    m.impl("view", view);
    m.impl("resize_", resize);
    m.impl("set_.source_Tensor", set_tensor);
    m.impl("set_.source_Storage", set_storage);
    m.impl("set_.source_Storage_storage_offset", set_storage_offset);
    m.impl("_copy_from", copy_from);
    m.impl("_copy_from_and_resize", copy_from_and_resize);
    m.impl("_local_scalar_dense", local_scalar_dense);
    m.impl("record_stream", record_stream);
}

// Controls of tests.
TORCH_LIBRARY(late, m) {
    m.def("run_early(int seed) -> ()", [](int64_t seed) { streams().run_early(static_cast<uint64_t>(seed)); });
    m.def("fail_copy(int number) -> ()", [](int64_t number) { copies_before_a_failure = number; });
    m.def("pinned_bytes() -> int", [] {
        const std::lock_guard<std::recursive_mutex> lock(streams().mutex);
        size_t total = 0;
        for (const auto& [begin, block] : memory().pinned) total += block.bytes;
        return static_cast<int64_t>(total);
    });
}

}  // namespace late
